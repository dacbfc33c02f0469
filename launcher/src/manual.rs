//! The man page and the shell completions, made from a command's flags, so that they name all of them.

use std::io;

use clap::{Command, ValueEnum};
use clap_complete::{Shell, generate};
use clap_mangen::Man;

/// What can be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Manual {
    /// A man page, in roff.
    Man,
    /// Completions for bash.
    Bash,
    /// Completions for zsh.
    Zsh,
    /// Completions for fish.
    Fish,
}

impl Manual {
    /// The text for `command`; its subcommands are sections of the same man page.
    #[must_use]
    pub fn text(self, mut command: Command) -> String {
        let mut text = Vec::new();
        match self {
            // Writing into a vector never fails.
            Self::Man => drop(page(&command, &mut text)),
            Self::Bash | Self::Zsh | Self::Fish => {
                let name = command.get_name().to_owned();
                generate(self.shell(), &mut command, name, &mut text);
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }

    fn shell(self) -> Shell {
        match self {
            Self::Man | Self::Bash => Shell::Bash,
            Self::Zsh => Shell::Zsh,
            Self::Fish => Shell::Fish,
        }
    }
}

fn page(command: &Command, out: &mut Vec<u8>) -> io::Result<()> {
    use io::Write as _;

    let examples = command.get_after_help().map(ToString::to_string);
    let man = Man::new(command.clone());
    man.render_title(out)?;
    man.render_name_section(out)?;
    man.render_synopsis_section(out)?;
    man.render_description_section(out)?;
    man.render_options_section(out)?;
    for subcommand in command.get_subcommands().filter(|command| !command.is_hide_set()) {
        let name = format!("{} {}", command.get_name(), subcommand.get_name());
        let about = subcommand.get_about().map(ToString::to_string).unwrap_or_default();
        writeln!(out, ".SH \"{}\"\n{}", name.to_uppercase(), escaped(&about))?;
        let mut options = Vec::new();
        Man::new(subcommand.clone()).render_options_section(&mut options)?;
        out.extend(String::from_utf8_lossy(&options).replace(".SH OPTIONS\n", "").bytes());
    }
    if let Some(examples) = examples {
        let lines = examples.trim_start_matches("Examples:").trim_matches('\n');
        writeln!(out, ".SH EXAMPLES\n.nf\n{}\n.fi", escaped(lines))?;
    }
    Ok(())
}

/// Text that roff leaves as it is: no line begins with a control character, a hyphen is a minus.
fn escaped(text: &str) -> String {
    let text = text.replace('\\', r"\e").replace('-', r"\-");
    text.lines().map(|line| format!(r"\&{line}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use clap::Arg;

    use super::*;

    #[test]
    fn every_form_names_every_flag_of_every_command() {
        let flag = |name: &'static str| Arg::new(name).long(name).help("It does something");
        let command = Command::new("tool")
            .about("A tool")
            .arg(flag("first-flag"))
            .after_help("Examples:\n  tool --first-flag x\n")
            .subcommand(Command::new("run").about("Runs").arg(flag("second-flag")))
            .subcommand(Command::new("inner").hide(true));
        for manual in Manual::value_variants() {
            let text = manual.text(command.clone()).replace(r"\-", "-");
            for flag in ["first-flag", "second-flag"] {
                assert!(text.contains(flag), "{manual:?} lacks {flag}: {text}");
            }
        }
        let page = Manual::Man.text(command);
        assert!(page.contains(".SH \"TOOL RUN\"\n\\&Runs\n"), "{page}");
        assert!(page.contains(".nf\n\\&  tool \\-\\-first\\-flag x\n.fi\n"), "{page}");
        assert!(!page.contains("TOOL INNER"), "{page}");
    }
}
