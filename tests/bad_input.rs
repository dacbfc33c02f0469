//! Everything a user can get wrong before training: one line that says what and where, exit code
//! 2, no worker started, nothing written. Alone and through rr-launch.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

#[path = "common/launch.rs"]
mod launch;
#[path = "common/program.rs"]
mod program;

use std::fs;
use std::net::TcpListener;
use std::path::Path;

use launch::{Outcome, copy_model, launcher, reranker, run, snapshot};
use program::write_program;
use tempfile::TempDir;

const TRAINING: &str = "model_name_or_path: model
model_type: bert_encoder
train_dataset: train.jsonl
output_dir: out
max_len: 32
";

const RECORD: &str = r#"{"query": "how to boil water", "content": "heat the water", "label": 1}"#;

/// A run that would work, spoiled in one place.
struct Case {
    dir: TempDir,
    args: Vec<String>,
}

impl Case {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_model("bert_tiny", &dir.path().join("model"));
        let case = Self { dir, args: vec!["--config".into(), "training.yaml".into()] };
        case.write("training.yaml", TRAINING).write("train.jsonl", format!("{RECORD}\n{RECORD}\n"))
    }

    fn write(self, name: &str, bytes: impl AsRef<[u8]>) -> Self {
        fs::write(self.dir.path().join(name), bytes).unwrap();
        self
    }

    /// A line after the training file's five.
    fn yaml(self, line: &str) -> Self {
        self.write("training.yaml", format!("{TRAINING}{line}\n"))
    }

    /// Data whose first line is good.
    fn second_line(self, line: impl AsRef<[u8]>) -> Self {
        self.write("train.jsonl", [RECORD.as_bytes(), b"\n", line.as_ref(), b"\n"].concat())
    }

    fn remove(self, name: &str) -> Self {
        let path = self.dir.path().join(name);
        if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        self
    }

    /// Replaces bytes in a file by as many others.
    fn replace(self, name: &str, old: &str, new: &str) -> Self {
        let mut bytes = fs::read(self.dir.path().join(name)).unwrap();
        let at = bytes.windows(old.len()).position(|w| w == old.as_bytes()).unwrap();
        bytes.splice(at..at + old.len(), new.bytes());
        self.write(name, bytes)
    }

    fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(ToString::to_string));
        self
    }

    /// Asserts that a worker by itself and a launch of two refuse with `message` alone.
    fn refused(&self, message: &str) {
        self.refused_with(|error| assert_eq!(error, message));
    }

    fn refused_with(&self, judge: impl Fn(&str)) {
        self.refused_alone(&judge);
        let dir = self.dir.path();
        let before = snapshot(dir);
        let flags: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let calls = Calls::new();
        let launched = [&["--cpu", "--nproc", "2"][..], &flags].concat();
        let mut command = launcher(dir, &launched);
        let outcome = run(command.env("RR_RERANKER", calls.program()));
        judge(&only_line(&outcome, "error: "));
        assert_eq!(calls.made(), "check\n", "no worker is started");
        assert!(snapshot(dir) == before, "rr-launch wrote something: {:?}", names(dir));
    }

    /// The same for a worker by itself only, for variants of a case that a launch has too.
    fn refused_alone(&self, judge: impl Fn(&str)) {
        let dir = self.dir.path();
        let before = snapshot(dir);
        let flags: Vec<&str> = self.args.iter().map(String::as_str).collect();
        let alone = [&["train", "--device", "cpu"][..], &flags].concat();
        judge(&only_line(&run(&mut reranker(dir, &alone)), "error: "));
        assert!(snapshot(dir) == before, "train wrote something: {:?}", names(dir));
    }
}

fn names(dir: &Path) -> Vec<std::path::PathBuf> {
    snapshot(dir).into_keys().collect()
}

/// The one line on stderr, without its prefix, of a program that ended with a user error.
fn only_line(outcome: &Outcome, prefix: &str) -> String {
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert_eq!(outcome.stdout, "");
    let line = outcome.stderr.strip_suffix('\n').unwrap_or(&outcome.stderr);
    assert!(!line.contains('\n'), "more than one line: {line}");
    line.strip_prefix(prefix).unwrap_or_else(|| panic!("no {prefix:?}: {line}")).to_owned()
}

/// A stand-in for `reranker` that notes what it is asked for and then does it.
struct Calls(TempDir);

impl Calls {
    fn new() -> Self {
        let calls = Self(tempfile::tempdir().unwrap());
        let (log, real) = (calls.0.path().join("log"), env!("CARGO_BIN_EXE_reranker"));
        let script =
            format!("#!/bin/sh\necho \"$1\" >> '{}'\nexec '{real}' \"$@\"\n", log.display());
        write_program(&calls.program(), &script);
        calls
    }

    fn program(&self) -> std::path::PathBuf {
        self.0.path().join("reranker")
    }

    fn made(&self) -> String {
        fs::read_to_string(self.0.path().join("log")).unwrap_or_default()
    }
}

/// The unspoiled case works, so that every refusal below is due to what was spoiled.
#[test]
fn the_unspoiled_run_trains() {
    let case = Case::new().yaml("epochs: 1");
    let outcome = run(&mut launcher(
        case.dir.path(),
        &["--cpu", "--nproc", "2", "--config", "training.yaml"],
    ));
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    assert!(case.dir.path().join("out/model/model.safetensors").is_file());
}

#[test]
fn configuration() {
    Case::new().yaml("warmup_proprtion: 0.1").refused(
        "training.yaml:6:1: warmup_proprtion: unknown key; did you mean warmup_proportion?",
    );
    Case::new()
        .yaml("lr: fast")
        .refused("training.yaml:6:5: lr: expected a number, found the text \"fast\"");
    Case::new()
        .yaml("epochs: [1]")
        .refused("training.yaml:6:9: epochs: expected an integer, found a list");
    Case::new()
        .yaml("max_len: 16")
        .refused("training.yaml:6:1: max_len: given twice, first on line 5; keep one of them");
    Case::new()
        .args(&["--set", "batchsize=4"])
        .refused("--set batchsize=4: batchsize: unknown key; did you mean batch_size?");
    Case::new()
        .remove("training.yaml")
        .refused("training.yaml: cannot read: No such file or directory (os error 2)");
    Case::new()
        .args(&["--parallel", "ddp.yaml"])
        .refused("ddp.yaml: cannot read: No such file or directory (os error 2)");
    Case::new()
        .write("ddp.yaml", "distributed_type: MULTI_CPU\nmixed_precison: no\n")
        .args(&["--parallel", "ddp.yaml"])
        .refused("ddp.yaml:2:1: mixed_precison: unknown key; did you mean mixed_precision?");
    Case::new()
        .args(&["--set", "max_len=65"])
        .refused("--set max_len=65: max_len: 65 is more than the model's 64 positions");
    Case::new().yaml("loss_type: listwise_ce").refused(
        "training.yaml:6:12: loss_type: compares the hits of a query, but train_dataset holds single \
         pairs; give grouped records, or use pointwise_bce or pointwise_mse",
    );
}

#[test]
fn strategies_that_make_no_sense() {
    let fsdp = |strategy: &str, more: &str| {
        Case::new()
            .write("p.yaml", format!("distributed_type: FSDP\n{more}fsdp_config: {{{strategy}}}\n"))
            .args(&["--parallel", "p.yaml"])
    };
    let key = "fsdp_config.fsdp_sharding_strategy";
    for (strategy, instead) in [("HYBRID_SHARD", "FULL_SHARD"), ("5", "SHARD_GRAD_OP")] {
        fsdp(&format!("fsdp_sharding_strategy: {strategy}"), "").refused_with(|error| {
            let start = format!(
                "p.yaml:2:39: {key}: hybrid sharding divides inside a machine and repeats over \
                 machines of one size, but these "
            );
            let end = format!(" worker(s) are on 1; use {instead}");
            assert!(error.starts_with(&start) && error.ends_with(&end), "{error}");
        });
    }
    fsdp("", "num_machines: 2\n").refused_with(|error| {
        assert!(error.starts_with("p.yaml:2:15: num_machines: 2, but these "), "{error}");
        assert!(error.ends_with(" every machine: rr-launch --nnodes 2, torchrun or srun"));
    });
    fsdp("", "").args(&["--set", "num_processes=3"]).refused_with(|error| {
        let start = "--set num_processes=3: num_processes: this run has ";
        assert!(error.starts_with(start) && error.ends_with(" processes; start 3"), "{error}");
    });
    Case::new()
        .write("ds.json", "{\"zero_optimization\": {\"stage\": 2},\n\"fp16\": {\"enabled\": 3}}")
        .write(
            "p.yaml",
            "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}",
        )
        .args(&["--parallel", "p.yaml"])
        .refused(
            "ds.json:2:21: fp16.enabled: expected true, false or \"auto\", found the number 3",
        );
}

#[test]
fn model_directory() {
    Case::new().remove("model").refused(
        "training.yaml:1:21: model_name_or_path: no directory \"model\" here, and the Hugging Face \
         cache hf/hub does not hold that model in full, while HF_HUB_OFFLINE forbids fetching it; \
         give a directory, or fetch the model once without HF_HUB_OFFLINE",
    );
    Case::new()
        .remove("model/config.json")
        .refused("model/config.json: cannot read: No such file or directory (os error 2)");
    Case::new().remove("model/model.safetensors").refused(
        "model: no weights here; expected one of model.safetensors, model.safetensors.index.json, \
         pytorch_model.bin, pytorch_model.bin.index.json",
    );
    Case::new().remove("model/tokenizer.json").refused(
        "model: no tokenizer: expected tokenizer.json (or vocab.txt, for BERT) beside the model; \
         save_pretrained of transformers' AutoTokenizer writes it",
    );
    Case::new().write("model/tokenizer.json", "{}").refused_with(|error| {
        assert!(error.starts_with("model/tokenizer.json: not a tokenizer: "), "{error}");
    });
    Case::new().replace("model/config.json", "\"bert\"", "\"t5\"").refused(
        "model/config.json: unknown architecture: model_type is \"t5\", supported: bert, roberta, \
         xlm-roberta, modernbert, qwen2, qwen3, llama, mistral, gemma",
    );
    Case::new().write("model/config.json", "{\"model_type\": \"bert\"").refused(
        "model/config.json: not valid JSON: EOF while parsing an object at line 1 column 21",
    );
    Case::new()
        .replace("model/config.json", "\"layer_norm_eps\": 1e-12", "\"layer_norm_eps\": -1")
        .refused(
            "model/config.json: layer_norm_eps is -1 and initializer_range 0.3, expected neither \
             below 0",
        );
    Case::new().replace("model/config.json", "\"vocab_size\": 186", "\"vocab_size\": 85").refused(
        "model/model.safetensors: tensor bert.embeddings.word_embeddings.weight has shape \
         [186, 32], expected [85, 32] from config.json",
    );
}

#[test]
fn weights() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bert_tiny/model.safetensors");
    let whole = fs::read(path).unwrap();
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let size = whole.len();
    let cut = |bytes: usize| Case::new().write("model/model.safetensors", &whole[..bytes]);
    let cases = [
        (0, "truncated: 0 bytes are no safetensors file".to_owned()),
        (5, "truncated: 5 bytes are no safetensors file".to_owned()),
        (
            100,
            format!(
                "truncated or not safetensors: the header says {header} bytes, the file has 100"
            ),
        ),
    ];
    let in_data = [header + 8, header + 500, size - 1].map(|bytes| {
        let message =
            format!("truncated or damaged: its header promises {size} bytes, the file has {bytes}");
        (bytes, message)
    });
    for (bytes, message) in cases.into_iter().chain(in_data) {
        let message = format!("model/model.safetensors: {message}");
        if bytes == size - 1 {
            cut(bytes).refused(&message);
        } else {
            cut(bytes).refused_alone(|error| assert_eq!(error, message));
        }
    }
    let name = "bert.encoder.layer.1.attention.self.query.weight";
    Case::new()
        .replace("model/model.safetensors", name, &name.replace("weight", "weighs"))
        .refused(&format!("model: tensor {name} is missing from the weights (57 tensors here)"));
    Case::new()
        .replace(
            "model/model.safetensors",
            "weight\":{\"dtype\":\"F32\"",
            "weight\":{\"dtype\":\"I32\"",
        )
        .refused(
            "model/model.safetensors: tensor bert.embeddings.LayerNorm.weight holds I32, expected \
             floats",
        );
    Case::new().replace("model/model.safetensors", "[0,128]", "[128,0]").refused_alone(|error| {
        let start = "model/model.safetensors: not a safetensors file: ";
        assert!(error.starts_with(start), "{error}");
    });
    Case::new().replace("model/model.safetensors", "[186,32]", "[32,186]").refused(
        "model/model.safetensors: tensor bert.embeddings.word_embeddings.weight has shape \
             [32, 186], expected [186, 32] from config.json",
    );
}

#[test]
fn sharded_weights() {
    let sharded = || {
        let case = Case::new().remove("model");
        copy_model("bert_odd", &case.dir.path().join("model"));
        case
    };
    sharded().remove("model/model-00002-of-00003.safetensors").refused(
        "model/model-00002-of-00003.safetensors: cannot read: No such file or directory (os error \
         2)",
    );
    sharded()
        .write("model/model.safetensors.index.json", "{}")
        .refused("model/model.safetensors.index.json: expected an object \"weight_map\"");
    sharded()
        .write("model/model.safetensors.index.json", r#"{"weight_map": {"a": "../a.safetensors"}}"#)
        .refused(
            "model/model.safetensors.index.json: weight_map names \"../a.safetensors\", expected \
             a file in this directory",
        );
}

#[test]
fn data() {
    let table: [(&[u8], &str); 9] = [
        (
            b"{\"query\": \"q\", ",
            "broken JSON at column 15: EOF while parsing a value; expected one object a line",
        ),
        (b"{\"query\": \"\xff\"}", "not UTF-8 at byte 12 of the line, expected UTF-8"),
        (
            b"{\"query\": \"q\", \"label\": 1}",
            "no documents (keys found: \"label\", \"query\"), expected \"content\", \"hits\", or \
             \"pos\" and \"neg\"",
        ),
        (
            b"{\"content\": \"c\", \"label\": 1}",
            "no \"query\" (keys found: \"content\", \"label\"), expected a string there",
        ),
        (
            b"{\"query\": 1, \"content\": \"c\", \"label\": 1}",
            "\"query\" is a number, expected a string",
        ),
        (
            b"{\"query\": \"q\", \"content\": \"c\", \"label\": \"1\"}",
            "\"label\" is a string, expected a number",
        ),
        (
            b"{\"query\": \"q\", \"content\": \"c\", \"label\": 2}",
            "\"label\" is 2, expected 0 to 1 (min_label, max_label)",
        ),
        (
            b"{\"query\": \"q\", \"content\": \"c\"}",
            "no \"label\" (keys found: \"content\", \"query\"), expected a number there or another \
             label key",
        ),
        (b"[1, 2]", "a list, expected one JSON object a line"),
    ];
    for (i, (line, message)) in table.into_iter().enumerate() {
        let (case, message) = (Case::new().second_line(line), format!("train.jsonl:2: {message}"));
        if i % 3 == 0 {
            case.refused(&message);
        } else {
            case.refused_alone(|error| assert_eq!(error, message));
        }
    }
}

/// The other two forms, each read as either kind.
#[test]
fn data_in_groups() {
    let pointwise = "train_dataset_type: pointwise";
    let grouped = "loss_type: listwise_ce\ntrain_dataset_type: grouped";
    for (settings, line, message) in [
        (
            pointwise,
            r#"{"query": "q", "hits": [{"content": "c", "label": 1}, {"content": "d", "label": 2}]}"#,
            "\"hits[1].label\" is 2, expected 0 to 1 (min_label, max_label)",
        ),
        (
            grouped,
            r#"{"query": "q", "hits": [{"content": "c", "label": 1}, {"content": "d"}]}"#,
            "no \"hits[1].label\" (keys found: \"content\"), expected a number there or another \
             label key",
        ),
        (
            pointwise,
            r#"{"query": "q", "pos": ["c"], "pos_scores": [3]}"#,
            "\"pos_scores[0]\" is 3, expected 0 to 1 (min_label, max_label)",
        ),
        (
            grouped,
            r#"{"query": "q", "pos": ["c"], "neg": ["d", "e"], "neg_scores": [0]}"#,
            "\"neg_scores\" has 1 entries, expected 2 as in \"neg\"",
        ),
        (
            grouped,
            r#"{"query": "q", "pos": [], "neg": []}"#,
            "\"pos\" and \"neg\" are empty, expected at least one text",
        ),
    ] {
        let case = Case::new().second_line(line).yaml(settings);
        case.refused_alone(|error| assert_eq!(error, format!("train.jsonl:2: {message}")));
        // Through a cache the message is the same, and no cache is left.
        let dir = case.dir.path();
        let flags = ["train", "--config", "training.yaml", "--set", "cache_dir=cache"];
        let outcome = run(&mut reranker(dir, &flags));
        assert_eq!(only_line(&outcome, "error: "), format!("train.jsonl:2: {message}"));
        let left = fs::read_dir(dir.join("cache")).unwrap().map(|entry| entry.unwrap().path());
        assert!(left.into_iter().all(|path| path.extension().is_some_and(|name| name == "lock")));
    }
    Case::new().yaml("cache_dir: train.jsonl").refused_alone(|error| {
        assert!(error.starts_with("train.jsonl: cannot create the directory: "), "{error}");
    });
}

#[test]
fn data_sets() {
    for name in ["train", "val"] {
        let line = format!("{name}_dataset: data/lost.jsonl");
        let others = TRAINING.lines().filter(|line| !line.starts_with(&format!("{name}_dataset")));
        let lines: Vec<&str> = others.chain([line.as_str()]).collect();
        Case::new().write("training.yaml", lines.join("\n")).refused_alone(|error| {
            let place = format!(": {name}_dataset: no file \"data/lost.jsonl\" in /");
            assert!(error.starts_with("training.yaml:") && error.contains(&place), "{error}");
        });
    }
    for nothing in ["", "\n  \n"] {
        Case::new()
            .write("train.jsonl", nothing)
            .refused("train.jsonl: holds no records, expected one JSON object a line");
    }
    Case::new().write("train.jsonl", "{}\n{\"query\n{}\n").args(&["--skip-bad-records"]).refused(
        "train.jsonl: no usable record is left; dropped 1 broken JSON (first at line 2), 2 \
             missing key (first at line 1)",
    );
    Case::new()
        .write("valid.jsonl", "{\"query\": \"q\", \"content\": \"c\", \"label\": 7}\n")
        .yaml("val_dataset: valid.jsonl")
        .refused("valid.jsonl:1: \"label\" is 7, expected 0 to 1 (min_label, max_label)");
    Case::new().write("train.jsonl", [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1]).refused_with(
        |error| {
            assert!(error.starts_with("train.jsonl: cannot read on after line 0: "), "{error}");
        },
    );
    Case::new()
        .write("train.jsonl", r#"{"query": "q", "hits": [{"content": "c", "label": 1}]}"#)
        .yaml("loss_type: listwise_ce")
        .refused("train.jsonl: no group has two distinct labels, so none can be learned from");
    let hits = r#"{"query": "q", "hits": [{"content": "c", "label": 1}]}"#;
    Case::new().write("train.jsonl", hits).refused(
        "training.yaml: loss_type: judges single pairs, but train_dataset is read as grouped; set \
         train_dataset_type: pointwise, or use pairwise_ranknet or listwise_ce",
    );
}

#[test]
fn output_directory() {
    Case::new()
        .write("out", "")
        .refused("training.yaml:4:13: output_dir: out is a file, expected a directory");
    let case = Case::new().args(&["--set", "output_dir=train.jsonl/a/b"]);
    case.refused(&format!(
        "--set output_dir=train.jsonl/a/b: output_dir: {}/train.jsonl is a file, expected a \
         directory",
        case.dir.path().canonicalize().unwrap().display()
    ));
    let elsewhere = tempfile::tempdir().unwrap();
    let link = elsewhere.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let setting = format!("output_dir={}", link.display());
    let says =
        format!("--set {setting}: output_dir: {} is a symbolic link to nothing", link.display());
    Case::new().args(&["--set", &setting]).refused(&says);
    let case = Case::new();
    fs::create_dir_all(case.dir.path().join("out/model")).unwrap();
    case.refused(
        "training.yaml:4:13: output_dir: out already holds a finished run; choose another \
         directory or pass --overwrite",
    );
    // Not even root may write there, though the permissions of /sys say that it may.
    for place in ["/proc/self", "/sys"] {
        let case = Case::new().args(&["--set", &format!("output_dir={place}/out")]);
        let start = format!("--set output_dir={place}/out: output_dir: cannot write to {place}: ");
        case.refused_with(|error| assert!(error.starts_with(&start), "{error}"));
    }
}

#[test]
fn a_port_that_is_taken() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let case = Case::new();
    let dir = case.dir.path();
    let before = snapshot(dir);
    let calls = Calls::new();
    let args =
        ["--cpu", "--nproc", "2", "--config", "training.yaml", "--master-port", port.as_str()];
    let outcome = run(launcher(dir, &args).env("RR_RERANKER", calls.program()));
    assert_eq!(
        only_line(&outcome, "rr-launch: "),
        format!(
            "--master-port: port {port} is taken by another program; choose another, or leave the \
             flag out to get a free one"
        )
    );
    assert_eq!(calls.made(), "", "nothing is started, not even the check");

    let mut worker = reranker(dir, &["train", "--device", "cpu", "--config", "training.yaml"]);
    worker.envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")]);
    worker.envs([("LOCAL_WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port)]);
    assert_eq!(
        only_line(&run(&mut worker), "error: "),
        format!(
            "port {port} on 127.0.0.1 is taken; choose another MASTER_PORT (rr-launch \
                 --master-port)"
        )
    );
    assert!(snapshot(dir) == before, "nothing is written");
}

#[test]
fn an_environment_that_makes_no_sense() {
    let case = Case::new();
    let before = snapshot(case.dir.path());
    for (rank, world, message) in [
        (
            "zero",
            "2",
            "environment variable RANK is `zero`, expected a whole number below WORLD_SIZE, which \
             is 2",
        ),
        (
            "2",
            "2",
            "environment variable RANK is `2`, expected a whole number below WORLD_SIZE, which is \
             2",
        ),
        ("0", "many", "environment variable WORLD_SIZE is `many`, expected a whole number from 1"),
    ] {
        let args = ["train", "--device", "cpu", "--config", "training.yaml"];
        let mut worker = reranker(case.dir.path(), &args);
        worker.envs([("RANK", rank), ("WORLD_SIZE", world), ("LOCAL_RANK", "0")]);
        worker.envs([("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")]);
        assert_eq!(only_line(&run(&mut worker), "error: "), message);
    }
    assert!(snapshot(case.dir.path()) == before, "nothing is written");
}
