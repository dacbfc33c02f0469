//! The man page and the completions that the binary prints, each read by the program that it is for
//! where that is installed.

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::process::Command;

use common::{launcher, run};

fn generated(kind: &str) -> String {
    let outcome = run(launcher().args(["--generate", kind]));
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""), "{kind}");
    outcome.stdout
}

/// The visible flags, with their hyphens.
fn flags() -> Vec<String> {
    let mut command = rr_launch::args::Args::command();
    command.build();
    let visible = command.get_arguments().filter(|argument| !argument.is_hide_set());
    visible.filter_map(|argument| Some(format!("--{}", argument.get_long()?))).collect()
}

/// Runs a program on the text as a file, if there is such a program.
fn reads(program: &[&str], text: &str) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text).unwrap();
    let output = Command::new(program[0]).args(&program[1..]).arg(file.path()).output();
    if let Ok(output) = output {
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && errors.is_empty(), "{program:?}: {errors}");
    }
}

#[test]
fn every_form_names_every_visible_flag() {
    let flags = flags();
    assert!(flags.len() > 20, "{flags:?}");
    for kind in ["man", "bash", "zsh", "fish"] {
        let text = generated(kind).replace(r"\-", "-");
        for flag in &flags {
            // fish takes a long flag without its hyphens.
            let fish = format!("-l {} ", flag.trim_start_matches('-'));
            let is_named = if kind == "fish" { text.contains(&fish) } else { text.contains(flag) };
            assert!(is_named, "{kind} lacks {flag}");
        }
        assert!(kind != "man" || !text.contains("--generate"), "{kind} names a hidden flag");
    }
}

#[test]
fn their_readers_take_them() {
    reads(&["bash", "-n"], &generated("bash"));
    reads(&["zsh", "-n"], &generated("zsh"));
    reads(&["fish", "-n"], &generated("fish"));
    reads(&["groff", "-man", "-Tutf8", "-ww", "-z"], &generated("man"));
}

#[test]
fn bash_completes_a_flag() {
    let script = generated("bash");
    let (_, registered) = script.split_once("complete -F ").unwrap();
    let function = registered.split_whitespace().next().unwrap();
    let ask = format!(
        r#"COMP_WORDS=(rr-launch --max-re); COMP_CWORD=1
        {function} rr-launch --max-re rr-launch; echo "${{COMPREPLY[@]}}""#
    );
    let output = Command::new("bash").arg("-c").arg(format!("{script}\n{ask}")).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.trim(), "--max-restarts", "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_man_page_has_the_long_texts() {
    let page = generated("man").replace(r"\-", "-");
    for part in [".SH OPTIONS", ".SH EXAMPLES", "attempt-A/rank-R.log"] {
        assert!(page.contains(part), "no {part}: {page}");
    }
    let help = run(launcher().arg("--help"));
    assert!(!help.stdout.contains("attempt-A"), "the help is one screen");
}
