//! The rules of the house as tests: which module may import which, what the README promises about
//! the tree, how long a file may be, which flags there are.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{CommandFactory as _, ValueEnum as _};
use rr_launch::manual::Manual;

/// The floors of `src/`, as in `docs/architecture.md`. A module imports only from floors below its
/// own; floor 0 is `rr_launch::contract`.
const FLOORS: &[(u8, &[&str])] = &[
    (1, &["atomic", "config", "error", "mapped", "ordered", "seed"]),
    (2, &["data", "text", "metrics", "hub"]),
    (3, &["torch_ext"]),
    (4, &["model", "loss", "optim", "comm"]),
    (5, &["shard"]),
    (6, &["checkpoint"]),
    (7, &["engine"]),
    (8, &["convert", "train", "score", "eval"]),
    (9, &["cli", "main"]),
];

/// The imports inside one floor, all of them.
const WITHIN_A_FLOOR: &[(&str, &str)] = &[
    ("atomic", "error"),
    ("config", "error"),
    ("eval", "score"),
    ("hub", "text"),
    ("main", "cli"),
    ("mapped", "error"),
    ("metrics", "data"),
    ("ordered", "error"),
    ("text", "data"),
    ("train", "score"),
];

/// The flags of each command, hidden ones and aliases included: scripts depend on them.
const FLAGS: &[(&str, &str)] = &[
    (
        "rr-launch",
        "--bind --config --config-file --config_file --cpu --dry-run --generate --gpus --grace \
         --hang-timeout --help --log-dir --log-format --master-port --max-restarts --nnodes \
         --node-rank --node-timeout --nproc --overwrite --parallel --prefix --preempt-signal --rdzv \
         --rdzv-timeout --resume --resume-anyway --run-id --set --show --skip-bad-records --stack-timeout \
         --timeout --version",
    ),
    ("reranker", "--help --version"),
    ("reranker generate", "--help"),
    (
        "reranker train",
        "--config --config-file --config_file --device --help --overwrite --parallel --resume \
         --resume-anyway --set --skip-bad-records --timeout",
    ),
    (
        "reranker distill",
        "--config --config-file --config_file --device --help --overwrite --parallel --resume \
         --resume-anyway --scores-only --set --skip-bad-records --timeout",
    ),
    (
        "reranker check",
        "--config --config-file --config_file --device --for-launch --gpus --help --json --nnodes --nproc \
         --overwrite --parallel --resume --resume-anyway --set --skip-bad-records --timeout",
    ),
    (
        "reranker score",
        "--batch-size --device --document-format --echo --format --help --input --max-len --model \
         --output --precision --prompt --query-format --seq --special-token --timeout",
    ),
    (
        "reranker eval",
        "--batch-size --bm25 --complete --data --device --document-format --gain --help --json --k \
         --label-key --max-len --model --per-query --precision --prompt --qrels --query-format --run \
         --seq --special-token --timeout --write-qrels --write-run",
    ),
    (
        "reranker convert",
        "--gather --help --input --label-key --lossy --max-label --merge --min-label --output \
         --positive-from --to",
    ),
];

/// The most lines of a source file.
const MAX_LINES: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The files that git tracks and that are on the disk, relative to the root.
fn tracked() -> Vec<String> {
    let output = Command::new("git")
        // A checkout that belongs to another user, as in a container, is read all the same.
        .args(["-c", "safe.directory=*", "-c", "core.quotePath=false", "ls-files"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let list = String::from_utf8(output.stdout).unwrap();
    let files: Vec<_> =
        list.lines().filter(|path| root().join(path).exists()).map(str::to_owned).collect();
    assert!(files.iter().any(|path| path == "Cargo.toml"), "git lists no Cargo.toml");
    files
}

/// Tracked text files, with their contents.
fn tracked_texts() -> Vec<(String, String)> {
    let text = |path: String| {
        let text = String::from_utf8(std::fs::read(root().join(&path)).ok()?).ok()?;
        Some((path, text))
    };
    tracked().into_iter().filter_map(text).collect()
}

fn has_extension(path: &str, extensions: &[&str]) -> bool {
    let extension = Path::new(path).extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|extension| extensions.contains(&extension))
}

/// The code of `folder` by file, without comments, test modules and test files.
fn code_of(folder: &str) -> Vec<(String, String)> {
    let mut files = Vec::new();
    for path in tracked() {
        let inside = path.strip_prefix(folder).filter(|_| has_extension(&path, &["rs"]));
        let is_test = path.ends_with("tests.rs") || path.contains("/tests/");
        if inside.is_none() || is_test {
            continue;
        }
        let text = read(&path);
        let lines = text.lines().map(str::trim).filter(|line| !line.starts_with("//"));
        // A test module with a body is the end of its file.
        let code: Vec<_> = lines.take_while(|line| !line.starts_with("mod tests {")).collect();
        files.push((path, code.join("\n")));
    }
    assert!(!files.is_empty(), "no code under {folder}");
    files
}

/// `src/data/load.rs` and `src/error.rs` belong to `data` and `error`.
fn module_of(path: &str) -> &str {
    let inside = path.strip_prefix("src/").unwrap();
    inside.split('/').next().unwrap().trim_end_matches(".rs")
}

/// The modules named behind `prefix` (`crate::`), a braced list of several included.
fn modules_behind<'a>(code: &'a str, prefix: &str) -> Vec<&'a str> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let name = |text: &'a str| text.trim_start().split(|c| !is_name(c)).next().unwrap();
    let mut found = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        if code[..at].ends_with(is_name) {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.push(name(rest));
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (i, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                ',' | '}' if depth == 0 => {
                    found.push(name(&list[start..i]));
                    start = i + 1;
                }
                '}' => depth -= 1,
                _ => {}
            }
            if c == '}' && depth == 0 && start == i + 1 {
                break;
            }
        }
    }
    // `crate::Error` and `crate::Result` are re-exports of the module `error`.
    let module = |name: &'a str| if name.starts_with(char::is_uppercase) { "error" } else { name };
    found.into_iter().filter(|name| !name.is_empty()).map(module).collect()
}

fn floor_of(module: &str) -> u8 {
    let floor = FLOORS.iter().find(|(_, modules)| modules.contains(&module));
    floor.unwrap_or_else(|| panic!("{module} stands on no floor; add it to FLOORS")).0
}

#[test]
fn imports_are_found_in_every_form() {
    let code = "use crate::data::Pair;\nuse crate::{eval, text::{A, B}, train};\n-> crate::Error\n\
                mycrate::other";
    assert_eq!(modules_behind(code, "crate::"), ["data", "eval", "text", "train", "error"]);
}

#[test]
fn modules_import_only_downward() {
    let mut within = BTreeSet::new();
    for (path, code) in code_of("src/") {
        let module = module_of(&path);
        if module == "lib" {
            continue;
        }
        let prefix = if module == "main" { "reranker::" } else { "crate::" };
        for import in modules_behind(&code, prefix).into_iter().filter(|&import| import != module) {
            let (own, other) = (floor_of(module), floor_of(import));
            assert!(other <= own, "{path}: {module} (floor {own}) imports {import} ({other})");
            if other == own {
                within.insert((module.to_owned(), import.to_owned()));
            }
        }
        for part in modules_behind(&code, "rr_launch::") {
            let is_shared = part == "contract" || (part == "manual" && module == "cli");
            assert!(is_shared, "{path}: only contract and manual of the launcher are shared");
        }
    }
    let listed = WITHIN_A_FLOOR.iter().map(|&(from, to)| (from.to_owned(), to.to_owned()));
    assert_eq!(within, listed.collect(), "WITHIN_A_FLOOR lists the imports inside one floor");
}

#[test]
fn every_module_stands_on_a_floor_and_the_page_draws_the_same_floors() {
    let modules: BTreeSet<_> =
        code_of("src/").iter().map(|(path, _)| module_of(path).to_owned()).collect();
    let standing = FLOORS.iter().flat_map(|(_, modules)| modules.iter());
    let expected: BTreeSet<_> = standing.chain(&["lib"]).map(|&module| module.to_owned()).collect();
    assert_eq!(modules, expected);

    let mut drawn = BTreeMap::new();
    for line in read("docs/architecture.md").lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        if let [_, floor, names, ..] = cells[..]
            && let Ok(floor) = floor.parse::<u8>()
        {
            let names = names.split(',').map(|name| name.trim().trim_matches('`').to_owned());
            drawn.insert(floor, names.collect::<BTreeSet<_>>());
        }
    }
    let mut expected: BTreeMap<_, BTreeSet<_>> = FLOORS
        .iter()
        .map(|(floor, names)| (*floor, names.iter().map(|&name| name.to_owned()).collect()))
        .collect();
    expected.insert(0, BTreeSet::from(["rr_launch::contract".to_owned()]));
    assert_eq!(drawn, expected, "the table of floors in docs/architecture.md");
}

#[test]
fn torch_stays_above_floor_two_and_unsafe_in_three_places() {
    for (path, code) in code_of("src/") {
        let module = module_of(&path);
        if module != "lib" && floor_of(module) <= 2 {
            let torch = modules_behind(&code, "tch::");
            assert!(torch.is_empty(), "{path}: floors 0 to 2 are free of torch");
        }
        if !["torch_ext", "mapped"].contains(&module) {
            assert!(!code.contains("unsafe "), "{path}: unsafe belongs into torch_ext and mapped");
        }
    }
    for (path, code) in code_of("launcher/src/") {
        if path != "launcher/src/sys.rs" && !path.starts_with("launcher/src/sys/") {
            assert!(!code.contains("unsafe "), "{path}: unsafe belongs into sys.rs and its parts");
        }
    }
}

#[test]
fn the_launcher_is_free_of_libtorch() {
    let manifest = read("launcher/Cargo.toml");
    for word in ["torch", "\ntch", "\nreranker", "path ="] {
        assert!(!manifest.contains(word), "launcher/Cargo.toml mentions {word}");
    }
    for (path, code) in code_of("launcher/src/") {
        for other in ["tch::", "torch_sys::", "reranker::"] {
            assert!(modules_behind(&code, other).is_empty(), "{path} uses {other}");
        }
    }
    assert!(read("Cargo.toml").contains(r#"rr-launch = { path = "launcher" }"#));
}

/// The block behind `<!-- tree -->`: files, and directories that stand for all they hold.
fn readme_tree() -> (BTreeSet<String>, BTreeSet<String>) {
    let readme = read("README.md");
    let (_, rest) = readme.split_once("<!-- tree -->").expect("README.md has <!-- tree -->");
    let block = rest.split("```").nth(1).unwrap();
    let lines: Vec<_> = block.lines().skip(1).filter(|line| !line.trim().is_empty()).collect();
    let depth = |line: &str| (line.len() - line.trim_start().len()) / 2;
    let (mut files, mut folders) = (BTreeSet::new(), BTreeSet::new());
    let mut parents: Vec<&str> = Vec::new();
    for (i, line) in lines.iter().enumerate() {
        let (name, what) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        assert!(!what.trim().is_empty(), "README.md: {name} has no description");
        parents.truncate(depth(line));
        let path = parents.concat() + name;
        let is_open = lines.get(i + 1).is_some_and(|next| depth(next) > depth(line));
        if name.ends_with('/') {
            parents.push(name);
            if !is_open {
                folders.insert(path);
            }
        } else {
            assert!(!is_open, "README.md: {name} holds files but does not end in a slash");
            assert!(files.insert(path), "README.md lists {name} twice");
        }
    }
    (files, folders)
}

#[test]
fn the_tree_in_the_readme_is_the_tree_on_disk() {
    let (files, folders) = readme_tree();
    let tracked: BTreeSet<String> = tracked().into_iter().collect();
    let is_covered =
        |path: &&String| folders.iter().any(|folder| path.starts_with(folder.as_str()));
    let listed: BTreeSet<_> = files.iter().collect();
    let alone: BTreeSet<_> = tracked.iter().filter(|path| !is_covered(path)).collect();
    let missing: Vec<_> = alone.difference(&listed).collect();
    let stale: Vec<_> = listed.difference(&alone).collect();
    assert!(missing.is_empty(), "README.md's tree lacks {missing:?}");
    assert!(stale.is_empty(), "README.md's tree lists what git does not track: {stale:?}");
    for folder in &folders {
        let is_there = tracked.iter().any(|path| path.starts_with(folder.as_str()));
        assert!(is_there, "README.md's tree lists {folder}, which holds nothing");
    }
}

#[test]
fn no_source_file_is_long() {
    let sources = ["rs", "cpp", "h", "py", "sh"];
    let mut seen = 0;
    for (path, text) in tracked_texts() {
        if has_extension(&path, &sources) {
            let lines = text.lines().count();
            assert!(lines < MAX_LINES, "{path} has {lines} lines, expected below {MAX_LINES}");
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} source files found");
}

fn flags_of(command: &clap::Command) -> BTreeSet<String> {
    let names = command.get_arguments().flat_map(|argument| {
        let aliases = argument.get_all_aliases().unwrap_or_default();
        argument.get_long().into_iter().chain(aliases)
    });
    names.map(|name| format!("--{name}")).collect()
}

#[test]
fn the_flags_are_frozen() {
    let mut launcher = rr_launch::args::Args::command();
    launcher.build();
    let mut reranker = reranker::cli::Cli::command();
    reranker.build();
    let mut found = BTreeMap::from([
        ("rr-launch".to_owned(), flags_of(&launcher)),
        ("reranker".to_owned(), flags_of(&reranker)),
    ]);
    for command in reranker.get_subcommands().filter(|command| command.get_name() != "help") {
        found.insert(format!("reranker {}", command.get_name()), flags_of(command));
    }
    let frozen: BTreeMap<_, BTreeSet<_>> = FLAGS
        .iter()
        .map(|(name, flags)| {
            ((*name).to_owned(), flags.split_whitespace().map(str::to_owned).collect())
        })
        .collect();
    assert_eq!(found, frozen, "a flag came or went: that changes scripts, so change FLAGS too");
}

#[test]
fn the_man_page_and_the_completions_name_every_flag() {
    let mut reranker = reranker::cli::Cli::command();
    reranker.build();
    let commands = reranker.get_subcommands().filter(|command| !command.is_hide_set());
    let flags: BTreeSet<_> = commands
        .flat_map(|command| command.get_arguments().filter(|argument| !argument.is_hide_set()))
        .filter_map(clap::Arg::get_long)
        .collect();
    assert!(flags.len() > 30, "{flags:?}");
    for manual in Manual::value_variants() {
        let text = manual.text(reranker::cli::Cli::command()).replace(r"\-", "-");
        for flag in &flags {
            assert!(text.contains(flag), "{manual:?} lacks --{flag}");
        }
    }
}

#[test]
fn no_file_names_a_place_on_one_machine() {
    // Written in two parts, so that this file passes its own test.
    let places = [concat!("/ro", "ot/"), concat!("/wo", "rk/"), concat!("/ho", "me/")];
    for (path, text) in tracked_texts() {
        for place in places {
            assert!(!text.contains(place), "{path} names {place}, a place on one machine");
        }
    }
}

/// The targets of a Markdown page's relative links, without their anchors.
fn relative_links(text: &str) -> Vec<&str> {
    let targets = text.split("](").skip(1).filter_map(|rest| rest.split(')').next());
    targets
        .filter(|target| !target.contains("://") && !target.starts_with("mailto:"))
        .map(|target| target.split('#').next().unwrap())
        .filter(|target| !target.is_empty())
        .collect()
}

#[test]
fn links_between_the_pages_lead_somewhere() {
    let mut seen = 0;
    for (path, text) in tracked_texts().iter().filter(|(path, _)| has_extension(path, &["md"])) {
        let folder = root().join(path).parent().map(PathBuf::from).unwrap();
        for link in relative_links(text) {
            assert!(folder.join(link).exists(), "{path} links to {link}, which is not there");
            seen += 1;
        }
    }
    assert!(seen > 3, "only {seen} links found");
}

/// The text literals of a Rust file that could be keys: lower-case words joined by underscores.
fn key_literals(path: &str) -> BTreeSet<String> {
    let code = code_of(path).remove(0).1;
    let is_key = |text: &&str| {
        text.starts_with(|c: char| c.is_ascii_lowercase())
            && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_')
    };
    code.split('"').skip(1).step_by(2).filter(is_key).map(str::to_owned).collect()
}

#[test]
fn the_configuration_page_names_every_key_and_no_other() {
    let page = read("docs/configuration.md");
    let files = ["training", "lora", "teacher", "parallel"];
    let read = files.map(|file| key_literals(&format!("src/config/{file}.rs")));
    let keys: BTreeSet<_> = read.into_iter().flatten().collect();
    assert!(keys.contains("train_group_size") && keys.contains("zero_stage"), "{keys:?}");
    let deepspeed = key_literals("src/config/deepspeed_file.rs");
    assert!(deepspeed.contains("zero_optimization"), "{deepspeed:?}");
    for key in keys.union(&deepspeed) {
        assert!(page.contains(&format!("`{key}`")), "docs/configuration.md does not name {key}");
    }
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
    for key in rows.filter_map(|row| row.split('`').next()).filter(|key| !key.starts_with("--")) {
        assert!(keys.contains(key), "docs/configuration.md documents {key}, which nobody reads");
    }
}
