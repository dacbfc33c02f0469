//! A folder with a tiny model and data to train on, and runs of the launcher in it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;

/// Texts over the golden vocabulary, from 2 to about 60 tokens, so that ranks get uneven shares.
fn write_pairs(path: &Path, pairs: usize) {
    let words = ["water", "tea", "the", "train", "bank", "loan", "plant", "leaf", "dog", "cup"];
    let mut text = String::new();
    for i in 0..pairs {
        let query = format!("how to {} {}", words[i % 10], words[(i * 3 + 1) % 10]);
        let content: Vec<&str> =
            (0..=(i * 7) % 40).map(|j| words[(i * 5 + j * j + j) % 10]).collect();
        let (content, label) = (content.join(" "), [0.0, 2.0, 1.0, 0.5][i % 4]);
        let record = serde_json::json!({"query": query, "content": content, "label": label});
        writeln!(text, "{record}").unwrap();
    }
    std::fs::write(path, text).unwrap();
}

/// Groups of 2 to 9 hits.
fn write_groups(path: &Path, groups: usize) {
    let mut text = String::new();
    for i in 0..groups {
        let hits: Vec<Value> = (0..2 + (i * 3) % 8)
            .map(|j| {
                let content = vec!["tea water"; 1 + (i + j * 5) % 15].join(" ");
                serde_json::json!({"content": content, "label": (i + j) % 3})
            })
            .collect();
        let record = serde_json::json!({"query": format!("the {i} cup"), "hits": hits});
        writeln!(text, "{record}").unwrap();
    }
    std::fs::write(path, text).unwrap();
}

/// The golden model with another dropout.
fn write_model(dir: &Path, dropout: f64) {
    std::fs::create_dir(dir).unwrap();
    let golden = super::golden_dir("bert_tiny");
    for name in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(golden.join(name), dir.join(name)).unwrap();
    }
    let config = std::fs::read_to_string(golden.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    for key in ["hidden_dropout_prob", "attention_probs_dropout_prob"] {
        config[key] = dropout.into();
    }
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

/// A folder to train in.
pub struct Bench {
    pub root: tempfile::TempDir,
}

impl Bench {
    /// Data, configuration, and the golden model with this dropout.
    pub fn new(dropout: f64) -> Self {
        let root = tempfile::tempdir().unwrap();
        write_model(&root.path().join("base"), dropout);
        write_pairs(&root.path().join("pairs.jsonl"), 53);
        write_groups(&root.path().join("groups.jsonl"), 17);
        let config = "model_name_or_path: base\nmodel_type: bert_encoder\n\
             train_dataset: pairs.jsonl\nval_dataset: groups.jsonl\nmax_len: 48\nmax_label: 2\n\
             loss_type: pointwise_bce\nepochs: 2\nlr: 1e-3\nmax_grad_norm: 0.5\nlog_interval: 1\n\
             gradient_accumulation_steps: 2\n";
        std::fs::write(root.path().join("t.yaml"), config).unwrap();
        for strategy in [
            "deepspeed/zero1",
            "deepspeed/zero2",
            "deepspeed/zero3",
            "fsdp/full_shard",
            "fsdp/hybrid",
        ] {
            let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(strategy);
            let name = strategy.split('/').next_back().unwrap();
            let to = root.path().join(name).with_extension("yaml");
            std::fs::copy(shipped.with_extension("yaml"), to).unwrap();
        }
        Self { root }
    }

    /// Trains with `ranks` workers into `name`.
    pub fn train(&self, name: &str, ranks: usize, settings: &[&str]) -> PathBuf {
        let output = self.command(name, ranks, settings).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{name}: {}\n{stderr}", output.status);
        self.root.path().join(name)
    }

    /// The command that trains with `ranks` workers into `name`.
    pub fn command(&self, name: &str, ranks: usize, settings: &[&str]) -> Command {
        let launcher = Path::new(env!("CARGO_BIN_EXE_reranker")).with_file_name("rr-launch");
        assert!(launcher.exists(), "{} is not built", launcher.display());
        let mut command = Command::new(launcher);
        command.current_dir(self.root.path()).env_remove("RUST_LOG");
        command.args(["--cpu", "--nproc", &ranks.to_string(), "--config", "t.yaml"]);
        command.args(["--set", &format!("output_dir={name}")]);
        for setting in settings {
            command.args(["--set", setting]);
        }
        command
    }

    /// 14 steps on two workers, a checkpoint after every second.
    pub fn saving(&self, name: &str, more: &[&str]) -> Command {
        let settings = [&["batch_size=2", "save_steps=2"], more].concat();
        let mut command = self.command(name, 2, &settings);
        command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
        command
    }
}

/// The weights of a model directory, to compare bit for bit.
pub fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

/// The exit code of a command, and what it said.
pub fn end(command: &mut Command) -> (i32, String) {
    let output = command.output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Runs a command that succeeds; returns what it said.
pub fn succeed(command: &mut Command) -> String {
    let (code, said) = end(command);
    assert_eq!(code, 0, "{command:?}: {said}");
    said
}

/// Starts a run that dies at this place of its saves.
pub fn killed_at(place: &str, command: &mut Command) {
    let (code, said) = end(command.env("RR_FAIL_POINT", place));
    assert_eq!(code, 137, "{place}: {said}");
}
