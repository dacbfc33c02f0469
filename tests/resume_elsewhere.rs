//! Where a run goes on that replaces a finished run, or takes up the checkpoint of another directory; and
//! that runs of every kind go on to the bit.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::ranks::free_port;
use common::training::{Bench, end, killed_at, succeed, weights};
use reranker::checkpoint::training::Manifest;
use serde_json::Value;

#[test]
fn a_kill_before_the_last_save_leaves_no_model() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    succeed(&mut bench.saving("whole", &[]));
    killed_at("before_model_moves:1@0", &mut bench.saving("run", &[]));
    assert!(!root.join("run/model").exists());
    let said = succeed(&mut bench.saving("run", &[]));
    assert!(said.contains("going on from run/checkpoints/step-14"), "{said}");
    assert!(weights(&root.join("run/model")) == weights(&root.join("whole/model")));
    assert!(!root.join("run/.model.partial").exists());
}

#[test]
fn a_run_that_replaces_a_finished_one_goes_on_as_any_other() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    succeed(&mut bench.saving("whole", &["lr=5e-4"]));
    succeed(&mut bench.saving("run", &[]));
    let finished = weights(&root.join("run/model"));
    let mut replaces = bench.saving("run", &["lr=5e-4"]);
    killed_at("before_states:3@0", replaces.arg("--overwrite"));
    assert!(weights(&root.join("run/model")) == finished, "the old model stays until the new one");
    // With the flag or without: it is an unfinished run.
    let mut again = bench.saving("run", &["lr=5e-4"]);
    again.arg("--overwrite").env("RR_FAIL_POINT", "before_states:3@0");
    let (code, said) = end(&mut again);
    assert_eq!(code, 137, "{said}");
    assert!(said.contains("going on from run/checkpoints/step-4"), "{said}");
    let said = succeed(&mut bench.saving("run", &["lr=5e-4"]));
    assert!(said.contains("going on from run/checkpoints/step-8"), "{said}");
    assert!(weights(&root.join("run/model")) == weights(&root.join("whole/model")));
    let (code, said) = end(&mut bench.saving("run", &["lr=5e-4"]));
    assert_eq!(code, 2, "it is finished now: {said}");
}

/// The directories of a run's checkpoints.
fn steps_kept(run: &Path) -> Vec<String> {
    let entries = fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn no_start_removes_checkpoints_that_it_cannot_go_on_from() {
    let bench = Bench::new(0.1);
    killed_at("before_states:3@0", &mut bench.saving("run", &[]));
    let run = bench.root.path().join("run");
    let before = steps_kept(&run);
    assert!(before.contains(&"step-4".to_owned()), "{before:?}");
    // As torchrun, srun or a person starts a worker: nothing has checked it before.
    let worker = |resume: &str| {
        let mut worker = Command::new(env!("CARGO_BIN_EXE_reranker"));
        worker.current_dir(bench.root.path()).args(["train", "--device", "cpu"]);
        worker.args(["--config", "t.yaml", "--set", "output_dir=run", "--set", "batch_size=2"]);
        worker.args(["--set", "save_steps=2", "--resume", resume]).stdin(Stdio::null());
        worker
    };
    let (code, said) = end(&mut worker("never"));
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("holds the checkpoints of an earlier run, up to step 4"), "{said}");
    assert_eq!(steps_kept(&run), before);
    // What a newer program has saved is not damage, in whose place an older checkpoint may stand.
    let newest = run.join("checkpoints/step-4");
    let mut manifest = Manifest::read(&newest).unwrap();
    manifest.format_version = 99;
    manifest.write(&newest).unwrap();
    for command in [&mut bench.saving("run", &[]), &mut worker("auto")] {
        let (code, said) = end(command);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains("step-4/manifest.json: format_version is 99, this program reads 1"));
        assert!(!said.contains("going on from"), "{said}");
        assert_eq!(steps_kept(&run), before);
    }
}

#[test]
fn a_checkpoint_of_another_directory_brings_its_best_model() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let best = "metric_for_best=loss";
    succeed(&mut bench.saving("whole", &[best]));
    // The first validation is after step 7.
    killed_at("before_states:6@0", &mut bench.saving("run", &[best]));
    let from = ["--resume", "run/checkpoints/step-10"];
    let mut moved = bench.saving("moved", &[best]);
    killed_at("before_states:1@0", moved.args(from));
    assert!(weights(&root.join("moved/best")) == weights(&root.join("run/best")));
    let said = succeed(bench.saving("moved", &[best]).args(from));
    assert!(!said.contains("taking the best model"), "it is there already: {said}");
    for model in ["model", "best"] {
        let whole = weights(&root.join("whole").join(model));
        assert!(weights(&root.join("moved").join(model)) == whole, "{model}");
    }
    // Where it is nowhere, nobody speaks of a model that is not there.
    fs::remove_dir_all(root.join("run/best")).unwrap();
    let said = succeed(bench.saving("alone", &[best]).args(from));
    let missing = format!(
        "is not in {}; the next validation is the best again",
        root.join("run/best").display()
    );
    assert!(said.contains(&missing), "{said}");
    assert!(root.join("alone/best/model.safetensors").exists());
}

#[test]
fn a_checkpoint_of_another_directory_does_not_replace_others_unasked() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    succeed(&mut bench.saving("whole", &[]));
    killed_at("before_states:3@0", &mut bench.saving("run", &[]));
    let best = ["lr=5e-4", "metric_for_best=loss", "eval_steps=1"];
    killed_at("before_states:2@0", &mut bench.saving("other", &best));
    assert!(root.join("other/best").exists());
    let before = steps_kept(&root.join("other"));
    let from = ["--resume", "run/checkpoints/step-4"];
    let (code, said) = end(bench.saving("other", &[]).args(from));
    assert_eq!(code, 2, "{said}");
    let refusal = "other holds the checkpoints of an earlier run, up to step 2; go on from them \
                   with --resume auto, choose another output_dir, or pass --overwrite to remove them";
    assert!(said.contains(refusal), "{said}");
    assert_eq!(steps_kept(&root.join("other")), before);
    let said = killed_and_again(&bench, "other", &[], &[&from[..], &["--overwrite"]].concat());
    assert!(said[0].contains("run/checkpoints/step-4: step 4, epoch 1"), "{}", said[0]);
    assert!(!root.join("other/checkpoints/step-2").exists());
    assert!(said[1].contains("going on from other/checkpoints/step-8: step 8"), "{}", said[1]);
    assert!(weights(&root.join("other/model")) == weights(&root.join("whole/model")));
    // Nothing of the earlier run is taken for this one's.
    let logged: Vec<u64> = steps(&root.join("other")).into_iter().map(|(step, _)| step).collect();
    assert_eq!(logged, (5..=14).collect::<Vec<_>>());
    assert!(!root.join("other/best").exists());
    // A step of the run's own directory is no stranger, and may be gone when the run goes on.
    let from = ["--resume", "./run/checkpoints/step-2"];
    let said = killed_and_again(&bench, "run", &["num_max_checkpoints=1"], &from);
    assert!(said[0].contains("run/checkpoints/step-2: step 2"), "{}", said[0]);
    assert!(said[0].contains("up to step 4, are left behind"), "{}", said[0]);
    assert!(said[1].contains("going on from run/checkpoints/step-6: step 6"), "{}", said[1]);
    assert!(weights(&root.join("run/model")) == weights(&root.join("whole/model")));
}

/// Runs a command twice, the first time until it saves for the third time; what it said.
fn killed_and_again(bench: &Bench, name: &str, more: &[&str], flags: &[&str]) -> [String; 2] {
    let run = |command: &mut Command| end(command.args(flags));
    let mut first = bench.saving(name, more);
    let (code, said) = run(first.env("RR_FAIL_POINT", "before_states:3@0"));
    assert_eq!(code, 137, "{said}");
    let (code, said_again) = run(&mut bench.saving(name, more));
    assert_eq!(code, 0, "{said_again}");
    [said, said_again]
}

#[test]
fn a_run_sent_elsewhere_goes_on_where_steps_are_spread_otherwise() {
    let bench = Bench::new(0.1);
    killed_at("before_states:2@0", &mut bench.saving("run", &[]));
    let from = ["--resume", "run/checkpoints/step-2", "--overwrite"];
    killed_at("before_states:3@0", bench.saving("moved", &[]).args(from));
    // As many pairs a step on half of the workers, as a script makes it after the number of nodes.
    let settings = ["batch_size=2", "save_steps=2", "gradient_accumulation_steps=4"];
    let said = succeed(bench.command("moved", 1, &settings).args(from));
    assert!(said.contains("going on from moved/checkpoints/step-6: step 6"), "{said}");
}

#[test]
fn a_command_that_asks_for_another_training_goes_back_to_where_it_is_sent() {
    let bench = Bench::new(0.1);
    killed_at("before_states:2@0", &mut bench.saving("run", &[]));
    let from = ["--resume", "run/checkpoints/step-2"];
    killed_at("before_states:2@0", bench.saving("moved", &[]).args(from));
    let check = |more: &[&str]| {
        let mut check = Command::new(env!("CARGO_BIN_EXE_reranker"));
        check.current_dir(bench.root.path()).args(["check", "--config", "t.yaml"]).args(from);
        check.args(["--set", "output_dir=moved", "--set", "batch_size=2", "--nproc", "2"]);
        check.args(["--device", "cpu"]).args(more).stdin(Stdio::null());
        let output = check.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let said = check(&[]);
    let own = "moved holds an unfinished run, which goes on from its checkpoint of step 4";
    assert!(said.contains(own), "{said}");
    let said = check(&["--set", "lr=1e-7", "--resume-anyway", "--overwrite"]);
    assert!(said.contains("goes on from run/checkpoints/step-2"), "{said}");
}

/// Starts two workers that see the disk as two machines do, each in a folder of its own; what each
/// said when both have ended.
fn on_two_machines(folders: [&Path; 2]) -> [(i32, String); 2] {
    // Nothing is saved on the way: a checkpoint takes a directory that both see.
    on_two_machines_with(folders, &[])
}

/// [`on_two_machines`] with more settings.
fn on_two_machines_with(folders: [&Path; 2], more: &[&str]) -> [(i32, String); 2] {
    let port = free_port();
    let start = |(rank, folder): (usize, &Path)| {
        let mut worker = Command::new(env!("CARGO_BIN_EXE_reranker"));
        worker.args(["train", "--device", "cpu", "--config", "t.yaml", "--timeout", "10"]);
        for setting in ["output_dir=run", "batch_size=2"].iter().chain(more) {
            worker.args(["--set", setting]);
        }
        worker.current_dir(folder).stdin(Stdio::null()).stderr(Stdio::piped());
        worker.env("OMP_NUM_THREADS", "1").env("RANK", rank.to_string()).env("WORLD_SIZE", "2");
        worker.env("LOCAL_RANK", "0").env("LOCAL_WORLD_SIZE", "1");
        worker.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
        worker.spawn().unwrap()
    };
    let workers: Vec<_> = folders.into_iter().enumerate().map(start).collect();
    let ends = workers.into_iter().map(|worker| {
        let output = worker.wait_with_output().unwrap();
        (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
    });
    ends.collect::<Vec<_>>().try_into().unwrap()
}

#[test]
fn machines_that_see_different_checkpoints_go_on_from_one_that_both_see() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    succeed(&mut bench.saving("whole", &[]));
    killed_at("before_states:4@0", &mut bench.saving("run", &[]));
    let there = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-r").arg(root.join(".")).arg(there.path()).status();
    assert!(copied.unwrap().success());
    // The second machine has not seen step 6 yet, and at step 4 what was there before.
    fs::remove_dir_all(there.path().join("run/checkpoints/step-6")).unwrap();
    let stale = there.path().join("run/checkpoints/step-4");
    let mut manifest = Manifest::read(&stale).unwrap();
    manifest.progress.items += 1;
    manifest.write(&stale).unwrap();
    let [(code, said), (other_code, other_said)] = on_two_machines([root, there.path()]);
    assert_eq!((code, other_code), (0, 0), "{said}\n{other_said}");
    assert!(said.contains("step-6: rank 1 cannot read it"), "{said}");
    assert!(said.contains("step-4: the ranks see different checkpoints there"), "{said}");
    assert!(said.contains("going on from run/checkpoints/step-2"), "{said}");
    assert!(weights(&root.join("run/model")) == weights(&root.join("whole/model")));
}

/// A copy of a folder, as another machine has it.
fn copy_of(folder: &Path) -> tempfile::TempDir {
    let there = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-r").arg(folder.join(".")).arg(there.path()).status();
    assert!(copied.unwrap().success());
    there
}

/// Each rank would write its part of a checkpoint where rank 0 never finds it.
#[test]
fn machines_that_share_no_directory_are_refused_where_they_would_save_into_it() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    let there = copy_of(root);
    for (code, said) in on_two_machines_with([root, there.path()], &["save_steps=2"]) {
        assert_eq!(code, 2, "{said}");
        let refusal = "run is not the same directory for rank 1 as for rank 0, which is on another \
                       machine; checkpoints need one that all machines share";
        assert!(said.contains(refusal), "{said}");
        assert!(!said.contains("trained step"), "{said}");
    }
    for folder in [root, there.path()] {
        assert!(!folder.join("run/checkpoints").exists(), "nothing is left there");
    }
    // Without checkpoints nothing is missing but a way to make room.
    let [(code, said), (other_code, other_said)] = on_two_machines([root, there.path()]);
    assert_eq!((code, other_code), (0, 0), "{said}\n{other_said}");
    assert!(said.contains("can save no checkpoint"), "{said}");
    assert!(root.join("run/model/model.safetensors").exists());
    // A directory that both see, by whatever name.
    fs::create_dir(root.join("common")).unwrap();
    std::os::unix::fs::symlink(root.join("common"), there.path().join("common")).unwrap();
    let settings = ["output_dir=common", "save_steps=2"];
    let [(code, said), (other_code, other_said)] =
        on_two_machines_with([root, there.path()], &settings);
    assert_eq!((code, other_code), (0, 0), "{said}\n{other_said}");
    assert!(root.join("common/checkpoints/step-14").is_dir(), "{said}");
}

#[test]
fn a_machine_that_sees_no_checkpoints_does_not_make_them_damaged() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    killed_at("before_states:4@0", &mut bench.saving("run", &[]));
    let before = steps_kept(&root.join("run"));
    let there = copy_of(root);
    fs::remove_dir_all(there.path().join("run")).unwrap();
    for (code, said) in on_two_machines([root, there.path()]) {
        assert_eq!(code, 1, "a start may find it mounted: {said}");
        assert!(said.contains("step-6: rank 1 cannot read it"), "{said}");
        assert!(said.contains("is output_dir mounted on its machine"), "{said}");
        assert!(!said.contains("--overwrite"), "{said}");
    }
    assert_eq!(steps_kept(&root.join("run")), before);
}

/// One stale file on one host: the ranks would train a mixture, or meet in collectives of different sizes.
#[test]
fn machines_that_were_given_different_things_train_nothing() {
    let bench = Bench::new(0.1);
    let root = bench.root.path();
    for (file, from, to, says) in [
        ("t.yaml", "lr: 1e-3", "lr: 5e-2", ["lr is 0.001 here", "lr is 0.05 here"]),
        ("t.yaml", "epochs: 2", "epochs: 3", ["epochs is 2 here", "epochs is 3 here"]),
        ("pairs.jsonl", "\"label\":1", "\"label\":0", ["training data (CRC-32) is "; 2]),
        ("groups.jsonl", "{", "{\"more\":1,", ["validation data (CRC-32) is "; 2]),
    ] {
        let there = tempfile::tempdir().unwrap();
        let copied = Command::new("cp").arg("-r").arg(root.join(".")).arg(there.path()).status();
        assert!(copied.unwrap().success());
        let text = fs::read_to_string(root.join(file)).unwrap();
        let stale = text.replacen(from, to, 1);
        assert_ne!(text, stale, "{file}");
        fs::write(there.path().join(file), stale).unwrap();
        let ends = on_two_machines([root, there.path()]);
        for ((code, said), says) in ends.iter().zip(says) {
            assert_eq!(*code, 2, "{file}: {said}");
            assert!(said.contains(says), "{file}: {said}");
            assert!(!said.contains("trained step"), "{file}: {said}");
        }
        let _ = fs::remove_dir_all(root.join("run"));
    }
}

/// The loss and gradient norm of every step that a run has logged, in the order of the lines.
fn steps(dir: &Path) -> Vec<(u64, String)> {
    let text = fs::read_to_string(dir.join("runs/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .filter(|line| line["type"] == "train")
        .map(|line| {
            let step = line["step"].as_u64().unwrap();
            (step, format!("{} {} {}", line["epoch"], line["loss"], line["grad_norm"]))
        })
        .collect()
}

/// A kind of run: its name, parallel file, and settings.
type Kind = (&'static str, Option<&'static str>, &'static [&'static str]);

const GROUPS: &str = "train_dataset=groups.jsonl";

/// What has a state of its own, or draws random numbers of its own.
const KINDS: [Kind; 7] = [
    ("groups drawn afresh", None, &[GROUPS, "loss_type=listwise_ce", "train_group_size=3"]),
    ("pairs in groups", None, &[GROUPS, "loss_type=pairwise_ranknet", "train_group_size=4"]),
    ("shuffled chunks", None, &["shuffle_rate=0.5"]),
    ("bf16 under ZeRO-2", Some("zero2.yaml"), &["mixed_precision=bf16"]),
    ("fp16 under ZeRO-3", Some("zero3.yaml"), &["mixed_precision=fp16"]),
    ("a window of several steps", None, &["gradient_accumulation_steps=3"]),
    (
        "early stopping",
        None,
        &["eval_steps=1", "metric_for_best=mrr@10", "early_stopping_patience=4", "lr=5e-3"],
    ),
];

#[test]
fn every_kind_of_run_goes_on_to_the_bit_twice() {
    let bench = Bench::new(0.1);
    for (number, (kind, parallel, settings)) in KINDS.into_iter().enumerate() {
        let settings: Vec<&str> =
            settings.iter().copied().chain(["save_steps=1", "num_max_checkpoints=1"]).collect();
        let run = |name: &str| {
            let mut command = bench.saving(&format!("{name}{number}"), &settings);
            if let Some(file) = parallel {
                command.args(["--parallel", file]);
            }
            command
        };
        succeed(&mut run("whole"));
        // The first kill is in the first epoch's middle, the second behind it.
        for _ in 0..2 {
            killed_at("before_states:3@0", &mut run("run"));
        }
        let said = succeed(&mut run("run"));
        assert!(said.contains("going on from"), "{kind}: {said}");
        let dir = |name: &str| bench.root.path().join(format!("{name}{number}"));
        let (whole, run) = (dir("whole"), dir("run"));
        assert_eq!(steps(&run), steps(&whole), "{kind}");
        assert!(weights(&run.join("model")) == weights(&whole.join("model")), "{kind}");
    }
}
