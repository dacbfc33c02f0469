//! Checkpoints: a run that stops and goes on is the run that never stopped, on the same ranks bit
//! for bit, on others within rounding; what is damaged is named and never loaded.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::time::Instant;

use common::ranks::{Case, STEPS, STRATEGIES, Trainer, ZERO1, ZERO2, ZERO3, on_ranks};
use common::{golden_dir, relative};
use reranker::checkpoint::Sidecar;
use reranker::checkpoint::model_dir::ModelFiles;
use reranker::checkpoint::training::{
    Identity, Lock, Manifest, Moment, Progress, SaveOptions, Saver, Store,
};
use reranker::comm::Groups;
use reranker::model::ModelConfig;
use reranker::model::weights::WeightFiles;
use reranker::shard::Offload;
use serde_json::{Value, json};
use tch::Kind;

type Parameters = BTreeMap<String, Vec<f64>>;

fn identity() -> Identity {
    Identity(BTreeMap::from([("lr".to_owned(), json!(1e-3))]))
}

fn saver_into(root: &Path, keep: usize, groups: &Groups) -> Saver {
    let base = golden_dir("bert_odd");
    let config = ModelConfig::from_dir(&base).unwrap();
    let sidecar: Sidecar = serde_json::from_value(json!({
        "format_version": 1, "model_type": "bert_encoder", "query_format": "{}",
        "document_format": "{}", "seq": "", "special_token": "", "max_len": 32, "min_label": 0.0,
        "max_label": 1.0, "base_model": "golden", "run": {}, "metrics": null,
    }))
    .unwrap();
    let options = SaveOptions {
        identity: identity(),
        items_per_step: 4,
        keep,
        timeout: Duration::from_secs(60),
        model: ModelFiles::read(&config, &base, Some(sidecar), 40_000).unwrap(),
    };
    Saver::new(Store::new(root.to_owned()), options, groups).unwrap()
}

fn progress(step: usize) -> Progress {
    Progress { step, epoch: 0, items: 4 * step }
}

fn save(saver: &mut Saver, step: usize, job: Value, trainer: &Trainer, groups: &Groups) {
    let loss_scale = trainer.engine.loss_scale().copied();
    let now = Moment { began: Instant::now(), progress: progress(step), loss_scale, job };
    saver.finish(groups).unwrap();
    saver.save(now, trainer.engine.units(), groups).unwrap();
}

/// Trains to the end, with checkpoints after the steps `at`; returns rank 0's parameters.
fn train_and_save(case: Case, root: &Path, at: &'static [usize]) -> Parameters {
    let root = root.to_owned();
    let outcomes = on_ranks(case, None, move |groups| {
        let mut trainer = Trainer::new(case, groups);
        let mut saver = saver_into(&root, 5, groups);
        let mut done = 0;
        for &step in at {
            trainer.steps(done, step, groups);
            save(&mut saver, step, json!({"best": step}), &trainer, groups);
            done = step;
        }
        trainer.steps(done, STEPS, groups);
        saver.finish(groups).unwrap();
        trainer.parameters(groups)
    });
    outcomes.into_iter().next().unwrap()
}

/// Goes on from the checkpoint after `step` steps up to `end`; returns rank 0's parameters.
fn resume(case: Case, root: &Path, step: usize, end: usize) -> Parameters {
    let store = Store::new(root.to_owned());
    let outcomes = on_ranks(case, None, move |groups| {
        let (rank, ranks) = (groups.world.rank(), groups.world.world_size());
        let manifest = store.verify(step, rank, ranks).unwrap();
        assert_eq!(manifest.progress, progress(step));
        assert_eq!(manifest.job, json!({"best": step}));
        let mut trainer = Trainer::new(case, groups);
        manifest.restore(&store.path(step), trainer.engine.units(), groups).unwrap();
        if let Some(loss_scale) = manifest.loss_scale {
            trainer.engine.set_loss_scale(loss_scale);
        }
        trainer.steps(step, end, groups);
        trainer.parameters(groups)
    });
    outcomes.into_iter().next().unwrap()
}

#[test]
fn a_resumed_run_is_bit_identical() {
    for (name, sharding) in STRATEGIES {
        for (ranks, kind, offloaded) in [
            (1, Kind::Float, false),
            (2, Kind::Float, false),
            (3, Kind::BFloat16, false),
            (2, Kind::Half, false),
            (2, Kind::BFloat16, true),
        ] {
            let root = tempfile::tempdir().unwrap();
            let offload = Offload { states: offloaded, parameters: false };
            let base = Case::reference(2, Some(0.5));
            let case = Case { sharding, ranks, kind, offload, ..base };
            let whole = train_and_save(case, root.path(), &[7, 13]);
            for step in [7, 13] {
                let resumed = resume(case, root.path(), step, STEPS);
                assert_eq!(resumed, whole, "{name}, {ranks} ranks, {kind:?}, from step {step}");
            }
        }
    }
}

#[test]
fn other_ranks_and_strategies_go_on_within_rounding() {
    let base = Case::reference(1, None);
    let hybrid = Case { sharding: ZERO3, ranks: 4, block: Some(2), ..base };
    let three = Case { sharding: ZERO2, ranks: 3, ..base };
    for writer in [Case { sharding: ZERO1, ranks: 2, ..base }, three, hybrid] {
        let root = tempfile::tempdir().unwrap();
        train_and_save(writer, root.path(), &[7]);
        let here = resume(writer, root.path(), 7, 8);
        for (_, sharding) in STRATEGIES {
            for ranks in [1, 2, 3] {
                let reader = Case { sharding, ranks, ..base };
                // Before any step it is the same to the bit.
                assert_eq!(
                    resume(reader, root.path(), 7, 7),
                    resume(writer, root.path(), 7, 7),
                    "{writer:?} {reader:?}"
                );
                for (name, values) in resume(reader, root.path(), 7, 8) {
                    if name.ends_with("key.bias") {
                        continue;
                    }
                    let difference = relative(&values, &here[&name]);
                    assert!(difference <= 1e-5, "{writer:?} {reader:?}: {name} {difference}");
                }
            }
        }
    }
}

#[test]
fn a_checkpoint_holds_the_model_for_transformers() {
    let root = tempfile::tempdir().unwrap();
    let case = Case { sharding: ZERO3, ranks: 2, ..Case::reference(1, None) };
    train_and_save(case, root.path(), &[STEPS]);
    let model = root.path().join(format!("step-{STEPS}/model"));
    for name in ["config.json", "tokenizer.json", "reranker.json", "model.safetensors.index.json"] {
        assert!(model.join(name).exists(), "{name}");
    }
    let weights = WeightFiles::open(&model).unwrap();
    let saved = resume(case, root.path(), STEPS, STEPS);
    let config = ModelConfig::from_dir(&model).unwrap();
    let mut seen = 0;
    for stage in reranker::model::stages(&config) {
        for spec in stage.parameters().iter().flat_map(|parameter| &parameter.parts) {
            let values = weights.read(spec).unwrap().unwrap();
            assert_eq!(common::floats(&values.flatten(0, -1)), saved[&spec.name], "{}", spec.name);
            seen += 1;
        }
    }
    assert_eq!(seen, saved.len());
}

/// Every file of a checkpoint, by its path inside it.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn damage_to_any_file_is_named_and_nothing_is_loaded() {
    let root = tempfile::tempdir().unwrap();
    let case = Case { sharding: ZERO2, ranks: 2, ..Case::reference(1, None) };
    train_and_save(case, root.path(), &[3]);
    let store = Store::new(root.path().to_owned());
    let verify = || store.verify(3, 0, 1);
    let all = files(&store.path(3));
    assert!(all.len() >= 8, "{all:?}");
    verify().unwrap();
    for path in all {
        let bytes = fs::read(&path).unwrap();
        let mut flipped = bytes.clone();
        // Somewhere in the middle, and the last byte.
        for place in [bytes.len() / 2, bytes.len() - 1] {
            flipped[place] ^= 0x10;
            fs::write(&path, &flipped).unwrap();
            let message = verify().unwrap_err().to_string();
            assert!(message.starts_with(&path.display().to_string()), "{message}");
            assert!(message.contains("damaged"), "{message}");
            flipped[place] ^= 0x10;
        }
        for length in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            fs::write(&path, &bytes[..length]).unwrap();
            let message = verify().unwrap_err().to_string();
            assert!(message.starts_with(&path.display().to_string()), "{message}");
        }
        fs::remove_file(&path).unwrap();
        let message = verify().unwrap_err().to_string();
        assert!(message.starts_with(&path.display().to_string()), "{message}");
        fs::write(&path, &bytes).unwrap();
    }
    verify().unwrap();
}

#[test]
fn old_checkpoints_go_and_what_is_no_checkpoint_stays() {
    let root = tempfile::tempdir().unwrap();
    let case = Case { sharding: ZERO1, ranks: 2, ..Case::reference(1, None) };
    // Neither counts: a directory of the user's, and a checkpoint without a manifest.
    fs::create_dir_all(root.path().join("step-notes")).unwrap();
    fs::create_dir_all(root.path().join("step-1")).unwrap();
    let dir = root.path().to_owned();
    on_ranks(case, None, move |groups| {
        let mut trainer = Trainer::new(case, groups);
        let mut saver = saver_into(&dir, 2, groups);
        for step in 2..6 {
            trainer.steps(step, step + 1, groups);
            save(&mut saver, step, json!(null), &trainer, groups);
        }
        saver.finish(groups).unwrap();
    });
    let store = Store::new(root.path().to_owned());
    assert_eq!(store.steps().unwrap(), [5, 4, 1]);
    assert!(root.path().join("step-notes").exists());
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 4, "nothing half-built");
    // Nor does one whose file is cut short.
    let file = store.path(4).join("rank-00001-of-00002.safetensors");
    fs::File::options().write(true).open(&file).unwrap().set_len(100).unwrap();
    let dir = root.path().to_owned();
    on_ranks(case, None, move |groups| {
        let trainer = Trainer::new(case, groups);
        let mut saver = saver_into(&dir, 2, groups);
        save(&mut saver, 6, json!(null), &trainer, groups);
        saver.finish(groups).unwrap();
    });
    assert_eq!(store.steps().unwrap(), [6, 5, 4, 1], "5 is the only whole one before 6");
    fs::remove_dir_all(store.path(4)).unwrap();
    // A run that went on from an earlier checkpoint leaves no later one of another past behind.
    let dir = root.path().to_owned();
    on_ranks(Case { ranks: 1, ..case }, None, move |groups| {
        let trainer = Trainer::new(Case { ranks: 1, ..case }, groups);
        let mut saver = saver_into(&dir, 2, groups);
        save(&mut saver, 3, json!(null), &trainer, groups);
        saver.finish(groups).unwrap();
    });
    assert_eq!(store.steps().unwrap(), [3, 1]);
}

#[test]
fn leftovers_are_cleared_and_directories_held() {
    let root = tempfile::tempdir().unwrap();
    for name in [".step-4.00000000000000ab.partial", ".step-3.17.removed", "keep"] {
        fs::create_dir_all(root.path().join(name).join("model")).unwrap();
    }
    Store::new(root.path().to_owned()).clear_leftovers();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    let path = root.path().join(".lock");
    let first = Lock::take(&path, "run 7 (host a, process 12)").unwrap();
    let message = Lock::take(&path, "run 8").unwrap_err().to_string();
    assert!(message.contains("is held by run 7 (host a, process 12)"), "{message}");
    assert!(message.contains("where its machine is lost"), "{message}");
    let message = Lock::check(&path).unwrap_err().to_string();
    assert!(message.contains("is held by run 7"), "{message}");
    drop(first);
    Lock::take(&path, "run 8").unwrap();
}

#[test]
fn checks_on_several_nodes_disturb_neither_each_other_nor_a_run() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(".lock");
    Lock::check(&path).unwrap();
    assert!(!path.exists());
    // What a run that was killed leaves behind.
    fs::write(&path, "run 7\n").unwrap();
    let other = fs::File::open(&path).unwrap();
    other.lock_shared().unwrap();
    Lock::check(&path).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), "run 7\n");
    let begun = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let run = scope.spawn(|| {
            begun.wait();
            Lock::take(&path, "run 8")
        });
        begun.wait();
        std::thread::sleep(Duration::from_millis(30));
        drop(other);
        let _held = run.join().unwrap().unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "run 8\n");
        assert!(Lock::check(&path).is_err());
    });
}

#[test]
fn a_manifest_of_another_version_is_refused_by_name() {
    let root = tempfile::tempdir().unwrap();
    let case = Case::reference(1, None);
    train_and_save(case, root.path(), &[1]);
    let dir = root.path().join("step-1");
    let mut manifest = Manifest::read(&dir).unwrap();
    assert_eq!(manifest.identity.differences(&identity(), |_| true), Vec::<String>::new());
    manifest.format_version = 99;
    manifest.write(&dir).unwrap();
    let message = Manifest::read(&dir).unwrap_err().to_string();
    assert!(message.contains("format_version is 99, this program reads 1"), "{message}");
}

#[test]
fn what_differs_between_two_runs_is_said() {
    let other = Identity(BTreeMap::from([
        ("lr".to_owned(), json!(2e-3)),
        ("loss_type".to_owned(), json!("listwise_ce")),
    ]));
    assert_eq!(
        identity().differences(&other, |_| true),
        ["loss_type: nothing there, \"listwise_ce\" here", "lr: 0.001 there, 0.002 here"]
    );
    assert_eq!(
        identity().differences(&other, |name| name != "loss_type"),
        ["lr: 0.001 there, 0.002 here"]
    );
}
