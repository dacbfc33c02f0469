//! Going on where something has changed meanwhile: the size of the steps, the data, the tokenizer, the
//! paths, who else was in the output directory.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/launch.rs"]
mod launch;

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::training::{Bench, end, killed_at, succeed};
use reranker::checkpoint::training::Manifest;
use serde_json::Value;

/// The command that trains with `ranks` workers, a checkpoint every two steps.
fn command(bench: &Bench, name: &str, ranks: usize, more: &[&str]) -> Command {
    let mut command = bench.command(name, ranks, &[&["save_steps=2"], more].concat());
    command.env("OMP_NUM_THREADS", "1").stdin(Stdio::null());
    command
}

fn refused(command: &mut Command) -> String {
    let (code, said) = end(command);
    assert_eq!(code, 2, "{command:?}: {said}");
    said
}

fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("runs/metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn sidecar(dir: &Path) -> Value {
    serde_json::from_slice(&fs::read(dir.join("reranker.json")).unwrap()).unwrap()
}

#[test]
fn steps_of_another_size_use_up_the_schedule_with_the_data() {
    let bench = Bench::new(0.0);
    let best = ["metric_for_best=loss", "eval_steps=50", "epochs=4"];
    let settings = |batch| [&best[..], &[batch]].concat();
    // 27 steps an epoch become 14, then 27 again; 53 pairs an epoch.
    for (name, first, second) in [("more", 1, 2), ("fewer", 2, 1)] {
        killed_at(
            "before_states:9@0",
            &mut command(&bench, name, first, &settings("batch_size=1")),
        );
        let mut changed = command(&bench, name, second, &settings("batch_size=1"));
        let (code, said) = end(changed.env("RR_FAIL_POINT", "before_states:3@0"));
        assert_eq!(code, 137, "{said}");
        assert!(said.contains("other workers than before"), "{said}");
        // The checkpoint that it goes on from now is of steps like its own.
        let said = succeed(&mut command(&bench, name, second, &settings("batch_size=1")));
        assert!(!said.contains("other workers than before"), "{said}");
        assert!(!said.contains("stopped early"), "{said}");
        let run = bench.root.path().join(name);
        let resumed = metrics(&run).into_iter().filter_map(|line| line["resumed_after"].as_u64());
        assert_eq!(resumed.collect::<Vec<_>>(), [16, 20], "{name}");
        let is_late = |line: &Value| line["type"] == "train" && line["step"].as_u64() > Some(15);
        let trained: Vec<Value> = metrics(&run).into_iter().filter(is_late).collect();
        let lr = |line: &Value| line["lr"].as_f64().unwrap();
        let last = trained.last().unwrap();
        assert!(lr(last) > 0.0 && lr(last) < 2e-5, "{name}: the last rate is {}", lr(last));
        // The rate goes on where it was.
        for pair in trained.windows(2) {
            let jump = (lr(&pair[0]) - lr(&pair[1])).abs();
            assert!(jump < 1e-4, "{name}: from {} to {}", pair[0], pair[1]);
        }
        assert!(trained.iter().all(|line| line["left_s"].as_f64().unwrap() < 1e6), "{name}");
        let end = metrics(&run).into_iter().rfind(|line| line["type"] == "validation").unwrap();
        assert_eq!(end["step"], last["step"], "{name}: the end is validated");
        assert!(run.join("best/model.safetensors").exists(), "{name}");
    }
}

#[test]
fn an_epoch_of_which_nothing_is_left_is_over() {
    let bench = Bench::new(0.0);
    let settings = ["batch_size=8", "epochs=3", "gradient_accumulation_steps=1"];
    killed_at("before_states:4@0", &mut command(&bench, "run", 1, &settings));
    let pairs = fs::read_to_string(bench.root.path().join("pairs.jsonl")).unwrap();
    let fewer: Vec<&str> = pairs.lines().take(40).collect();
    fs::write(bench.root.path().join("pairs.jsonl"), fewer.join("\n")).unwrap();
    let mut again = command(&bench, "run", 1, &settings);
    let said = succeed(again.arg("--resume-anyway"));
    assert!(said.contains("step 6, epoch 1") && !said.contains("stopped early"), "{said}");
    // The rest of the first epoch is nothing, the other two have five steps each.
    assert_eq!(metrics(&bench.root.path().join("run")).last().unwrap()["type"], "memory");
    assert!(said.contains("trained 80 pairs"), "{said}");
}

#[test]
fn validation_may_be_added_and_read_otherwise() {
    let bench = Bench::new(0.0);
    killed_at(
        "before_states:3@0",
        &mut command(&bench, "run", 1, &["batch_size=4", "val_dataset=null"]),
    );
    let best = ["metric_for_best=mrr@10", "eval_steps=2", "batch_size=4"];
    let settings = [&best[..], &["val_dataset_type=grouped"]].concat();
    killed_at("before_states:2@0", &mut command(&bench, "run", 1, &settings));
    let groups = bench.root.path().join("groups.jsonl");
    let scored = fs::read_to_string(&groups).unwrap().replace("\"label\"", "\"score\"");
    fs::write(&groups, scored).unwrap();
    let otherwise = [&settings[..], &["val_label_key=score"]].concat();
    let said = succeed(&mut command(&bench, "run", 1, &otherwise));
    assert!(said.contains("going on from run/checkpoints/step-6"), "{said}");
    assert!(said.contains("val_dataset is another than before"), "{said}");
}

/// What a run that found no room is told to do has an effect before the next checkpoint needs room.
#[test]
fn fewer_checkpoints_are_kept_from_the_start_on() {
    let bench = Bench::new(0.0);
    let settings = ["batch_size=4", "num_max_checkpoints=9", "epochs=3"];
    killed_at("before_states:5@0", &mut command(&bench, "run", 1, &settings));
    let fewer = [&settings[..], &["num_max_checkpoints=1"]].concat();
    killed_at("before_states:1@0", &mut command(&bench, "run", 1, &fewer));
    let entries = fs::read_dir(bench.root.path().join("run/checkpoints")).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let whole: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
    assert_eq!(whole, ["step-8"]);
    let said = succeed(&mut command(&bench, "run", 1, &fewer));
    assert!(said.contains("going on from run/checkpoints/step-8"), "{said}");
}

#[test]
fn a_vocabulary_alone_is_a_tokenizer_and_its_settings_belong_to_the_run() {
    let bench = Bench::new(0.0);
    let root = bench.root.path();
    let base = root.join("base");
    let tokenizer: Value =
        serde_json::from_slice(&fs::read(base.join("tokenizer.json")).unwrap()).unwrap();
    let mut words: Vec<(&String, u64)> = tokenizer["model"]["vocab"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(word, id)| (word, id.as_u64().unwrap()))
        .collect();
    words.sort_by_key(|&(_, id)| id);
    let lines: Vec<&str> = words.iter().map(|(word, _)| word.as_str()).collect();
    fs::write(base.join("vocab.txt"), lines.join("\n")).unwrap();
    fs::remove_file(base.join("tokenizer.json")).unwrap();
    // Its class reads tokenizer.json alone.
    let config = fs::read(base.join("tokenizer_config.json")).unwrap();
    let mut other: Value = serde_json::from_slice(&config).unwrap();
    other["tokenizer_class"] = "BertTokenizer".into();
    let config = other.to_string();
    fs::write(base.join("tokenizer_config.json"), &config).unwrap();
    killed_at("before_states:3@0", &mut command(&bench, "run", 1, &["batch_size=4"]));
    other["model_input_names"] = serde_json::json!(["input_ids", "attention_mask"]);
    fs::write(base.join("tokenizer_config.json"), other.to_string()).unwrap();
    let said = refused(&mut command(&bench, "run", 1, &["batch_size=4"]));
    assert!(said.contains("tokenizer's settings (CRC-32)"), "{said}");
    fs::write(base.join("tokenizer_config.json"), config).unwrap();
    // The same files under another path are the same model.
    fs::rename(&base, root.join("moved")).unwrap();
    let moved = ["batch_size=4", "model_name_or_path=moved"];
    let said = succeed(&mut command(&bench, "run", 1, &moved));
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
}

#[test]
fn a_best_model_of_other_data_or_of_another_past_is_none() {
    let bench = Bench::new(0.0);
    let root = bench.root.path();
    let settings = ["batch_size=4", "metric_for_best=loss", "eval_steps=1", "lr=5e-3"];
    killed_at("before_states:4@0", &mut command(&bench, "run", 1, &settings));
    for entry in fs::read_dir(root.join("run/checkpoints")).unwrap() {
        let dir = entry.unwrap().path();
        if dir.file_name().unwrap().to_string_lossy().starts_with("step-") {
            let manifest = Manifest::read(&dir).unwrap();
            assert_eq!(sidecar(&dir.join("model"))["metrics"], manifest.job["metrics"]);
        }
    }
    let copied = Command::new("cp").arg("-r").arg(root.join("run")).arg(root.join("back")).status();
    assert!(copied.unwrap().success());
    // A kill, and nothing else: the same as ever.
    let said = succeed(&mut command(&bench, "run", 1, &settings));
    assert!(!said.contains("the best again"), "{said}");
    // Back to where another model was the best, and on at a rate that hardly changes anything.
    let mut back = command(&bench, "back", 1, &[&settings[..3], &["lr=1e-7"]].concat());
    let said = succeed(back.args(["--resume", "back/checkpoints/step-2", "--resume-anyway"]));
    let best = sidecar(&root.join("back/best"));
    assert_eq!(best["run"]["training"]["lr"], 1e-7, "{said}");
    let named = format!("loss {:.4}", best["metrics"]["loss"].as_f64().unwrap());
    assert!(said.contains(&format!("the best model, {named}")), "{said}");

    killed_at("before_states:4@0", &mut command(&bench, "other", 1, &settings));
    let groups = fs::read_to_string(root.join("groups.jsonl")).unwrap();
    let fewer: Vec<&str> = groups.lines().take(9).collect();
    fs::write(root.join("groups.jsonl"), fewer.join("\n")).unwrap();
    let said = succeed(&mut command(&bench, "other", 1, &settings));
    assert!(said.contains("val_dataset is another than before"), "{said}");
}

#[test]
fn a_directory_called_best_is_not_removed_unasked() {
    let bench = Bench::new(0.0);
    let root = bench.root.path();
    let notes = root.join("run/best/notes.txt");
    fs::create_dir_all(notes.parent().unwrap()).unwrap();
    fs::write(&notes, "precious").unwrap();
    for more in [&[][..], &["--overwrite"]] {
        let said = refused(command(&bench, "run", 1, &[]).args(more));
        assert!(said.contains("run/best is no model of a run"), "{said}");
    }
    assert_eq!(fs::read_to_string(&notes).unwrap(), "precious");
    fs::remove_dir_all(root.join("run")).unwrap();

    let best = ["batch_size=4", "metric_for_best=loss"];
    succeed(&mut command(&bench, "run", 1, &best));
    fs::remove_dir_all(root.join("run/model")).unwrap();
    fs::remove_dir_all(root.join("run/runs")).unwrap();
    fs::remove_dir_all(root.join("run/checkpoints")).unwrap();
    let said = refused(&mut command(&bench, "run", 1, &["batch_size=4"]));
    assert!(said.contains("run/best is an earlier run's best model"), "{said}");
    // A run that replaces it and has no best model of its own leaves none, also when it was killed.
    let mut replaces = command(&bench, "run", 1, &["batch_size=4"]);
    killed_at("before_states:3@0", replaces.arg("--overwrite"));
    assert!(root.join("run/best/model.safetensors").exists(), "it stays until the end");
    // Nor where it is killed as soon as it has ended.
    killed_at("after_end:1@0", &mut command(&bench, "run", 1, &["batch_size=4"]));
    assert!(root.join("run/model/model.safetensors").exists() && !root.join("run/best").exists());
}

/// One of two workers, started by hand in `folder`, with the output directory `out`.
fn by_hand(folder: &Path, out: &Path, port: u16, rank: &str, arguments: &[&str]) -> Child {
    let mut worker = Command::new(env!("CARGO_BIN_EXE_reranker"));
    worker.current_dir(folder).args(arguments).args(["--config", "t.yaml", "--timeout", "120"]);
    worker.arg("--set").arg(format!("output_dir={}", out.display()));
    worker.envs([("RANK", rank), ("LOCAL_RANK", "0"), ("GROUP_RANK", rank), ("WORLD_SIZE", "2")]);
    worker.envs([
        ("LOCAL_WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("OMP_NUM_THREADS", "1"),
    ]);
    worker.env("MASTER_PORT", port.to_string()).env_remove("RUST_LOG");
    worker.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Whether somebody listens on a port, asked of the kernel alone.
fn listens(port: u16) -> bool {
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"]
        .map(|path| fs::read_to_string(path).unwrap_or_default());
    let own = format!(":{port:04X}");
    tables.iter().flat_map(|table| table.lines()).any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.len() > 3 && words[1].ends_with(&own) && words[3] == "0A"
    })
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_run_that_ended_while_another_waited_is_not_replaced() {
    let bench = Bench::new(0.0);
    let root = bench.root.path();
    let (port, out) = (common::ranks::free_port(), root.join("run"));
    let arguments = ["train", "--device", "cpu"];
    // It has looked at its output directory, and waits for its peer.
    let mut first = by_hand(root, &out, port, "0", &arguments);
    while !listens(port) {
        assert!(first.try_wait().unwrap().is_none(), "it does not wait");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    succeed(&mut command(&bench, "run", 1, &["lr=5e-3"]));
    let finished = fs::read(out.join("model/model.safetensors")).unwrap();
    // On a machine that does not see it.
    let second = by_hand(root, &root.join("elsewhere"), port, "1", &arguments);
    let [first, second] = [first, second].map(|worker| worker.wait_with_output().unwrap());
    assert_eq!(first.status.code(), Some(2), "{}", said(&first));
    assert!(said(&first).contains("already holds a finished run"), "{}", said(&first));
    assert_ne!(second.status.code(), Some(0));
    assert!(fs::read(out.join("model/model.safetensors")).unwrap() == finished);
}

/// Two machines have the same teacher in places of their own, with times of their own.
#[test]
fn machines_with_copies_of_a_teacher_distil_together() {
    let benches = [Bench::new(0.0), Bench::new(0.0)];
    let out = benches[0].root.path().join("run");
    for bench in &benches {
        launch::copy_model("bert_tiny", &bench.root.path().join("teacher"));
    }
    let arguments = [
        "distill",
        "--device",
        "cpu",
        "--set",
        "teacher.model_name_or_path=teacher",
        "--set",
        "loss_type=pointwise_mse",
        "--set",
        "val_dataset=null",
    ];
    let start = || {
        let port = common::ranks::free_port();
        let rank = |rank: usize| {
            by_hand(benches[rank].root.path(), &out, port, ["0", "1"][rank], &arguments)
        };
        [rank(0), rank(1)].map(|worker| worker.wait_with_output().unwrap())
    };
    for output in start() {
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    }
    // The scores are there, and both take them.
    fs::remove_dir_all(out.join("model")).unwrap();
    let [first, second] = start();
    assert_eq!((first.status.code(), second.status.code()), (Some(0), Some(0)), "{}", said(&first));
    assert!(said(&first).contains("the scores of teacher are in"), "{}", said(&first));
}
