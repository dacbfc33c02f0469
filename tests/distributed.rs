//! Data-parallel training over Gloo, with real processes: any number of ranks takes the steps of
//! one, and a run repeats itself.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::path::Path;

use common::relative;
use common::training::Bench;
use serde_json::Value;
use tch::Tensor;

fn metrics(run: &Path, kind: &str, key: &str) -> Vec<f64> {
    std::fs::read_to_string(run.join("runs/metrics.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|line| line["type"] == kind)
        .map(|line| line[key].as_f64().unwrap())
        .collect()
}

fn weights(run: &Path) -> Vec<(String, Tensor)> {
    let mut all = Tensor::read_safetensors(run.join("model/model.safetensors")).unwrap();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn assert_same_training(bench: &Bench, reference: &Path, other: &Path, compares: bool) {
    let name = other.file_name().unwrap().to_string_lossy().into_owned();
    for (kind, key) in [("train", "loss"), ("train", "grad_norm"), ("train", "tokens")] {
        let (one, many) = (metrics(reference, kind, key), metrics(other, kind, key));
        assert!(one.len() > 4);
        let worst = common::worst(&many, &one);
        assert!(worst <= 1e-5, "{name}: {key} differs by {worst}");
    }
    for key in ["loss", "ndcg@10", "mrr@10", "map", "queries"] {
        let (one, many) =
            (metrics(reference, "validation", key), metrics(other, "validation", key));
        assert!(!one.is_empty());
        assert!(common::worst(&many, &one) <= 1e-5, "{name}: validation {key}");
    }
    let base = Tensor::read_safetensors(bench.root.path().join("base/model.safetensors")).unwrap();
    for ((name_one, one), (name_many, many)) in weights(reference).iter().zip(&weights(other)) {
        assert_eq!(name_one, name_many);
        // The exact gradient is 0 for a key bias, and for the last bias under a loss that only
        // compares scores: AdamW follows rounding noise there.
        if name_one.ends_with("key.bias") || (compares && name_one == "classifier.bias") {
            continue;
        }
        let (one, many) = (common::floats(one), common::floats(many));
        let difference = relative(&many, &one);
        assert!(difference <= 1e-5, "{name}: {name_one} differs by {difference}");
        let start = base.iter().find(|(n, _)| n == name_one).map(|(_, t)| common::floats(t));
        assert_ne!(Some(one), start, "{name_one} was trained");
    }
}

#[test]
fn any_number_of_ranks_takes_the_steps_of_one() {
    let bench = Bench::new(0.0);
    let one = bench.train("one", 1, &["batch_size=6"]);
    for ranks in [2, 3] {
        let setting = format!("batch_size={}", 6 / ranks);
        let many = bench.train(&format!("ranks-{ranks}"), ranks, &[&setting]);
        assert_same_training(&bench, &one, &many, false);
    }
}

#[test]
fn more_ranks_than_pairs_in_the_last_batch() {
    let bench = Bench::new(0.0);
    // 53 pairs in micro-batches of 4: the last holds one pair, so three of four ranks have none.
    let one = bench.train("one", 1, &["batch_size=4", "loss_type=pointwise_mse"]);
    let four = bench.train("four", 4, &["batch_size=1", "loss_type=pointwise_mse"]);
    assert_same_training(&bench, &one, &four, false);
}

#[test]
fn group_losses_over_ragged_groups() {
    let bench = Bench::new(0.0);
    for loss in ["pairwise_ranknet", "listwise_ce"] {
        let settings = |batch: &str| {
            [
                format!("loss_type={loss}"),
                "train_dataset=groups.jsonl".to_owned(),
                "train_dataset_type=grouped".to_owned(),
                "train_group_size=4".to_owned(),
                format!("batch_size={batch}"),
            ]
        };
        let run = |name: &str, ranks, batch: &str| {
            let settings = settings(batch);
            let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
            bench.train(&format!("{loss}-{name}"), ranks, &settings)
        };
        assert_same_training(&bench, &run("one", 1, "4"), &run("two", 2, "2"), true);
    }
}

#[test]
fn the_same_run_twice_is_bit_identical_with_dropout() {
    let bench = Bench::new(0.1);
    let first = bench.train("first", 2, &["batch_size=3"]);
    let second = bench.train("second", 2, &["batch_size=3"]);
    for ((name, a), (_, b)) in weights(&first).iter().zip(&weights(&second)) {
        assert!(a.equal(b), "{name} differs between two runs");
    }
    let without = Bench::new(0.0);
    let undropped = without.train("undropped", 2, &["batch_size=3"]);
    assert_ne!(metrics(&first, "train", "loss"), metrics(&undropped, "train", "loss"));
}

#[test]
fn another_seed_is_another_run() {
    let bench = Bench::new(0.1);
    let runs: Vec<Vec<f64>> = ["1", "2"]
        .iter()
        .map(|seed| {
            let run = bench.train(&format!("seed-{seed}"), 1, &[&format!("seed={seed}")]);
            metrics(&run, "train", "loss")
        })
        .collect();
    assert_ne!(runs[0], runs[1]);
}

#[test]
fn sharded_runs_end_with_the_same_model_and_validate_alike() {
    let bench = Bench::new(0.0);
    let one = bench.train("one", 1, &["batch_size=6"]);
    for (strategy, ranks) in [("zero1", 2), ("zero2", 3), ("zero3", 3), ("full_shard", 2)] {
        let batch_size = format!("batch_size={}", 6 / ranks);
        let mut command = bench.command(strategy, ranks, &[&batch_size]);
        let output = command.args(["--parallel", &format!("{strategy}.yaml")]).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{strategy}: {stderr}");
        assert_same_training(&bench, &one, &bench.root.path().join(strategy), false);
    }
}

#[test]
fn recomputed_activations_have_the_same_dropout() {
    let bench = Bench::new(0.1);
    for precision in ["no", "bf16"] {
        let runs: Vec<_> = ["false", "true"]
            .iter()
            .map(|recompute| {
                let settings = [
                    format!("gradient_checkpointing={recompute}"),
                    format!("mixed_precision={precision}"),
                    "batch_size=3".to_owned(),
                ];
                let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
                weights(&bench.train(&format!("{precision}-{recompute}"), 2, &settings))
            })
            .collect();
        for ((name, kept), (_, recomputed)) in runs[0].iter().zip(&runs[1]) {
            assert!(kept.equal(recomputed), "{precision}: {name} differs when recomputed");
        }
    }
}

#[test]
fn hybrid_sharding_on_one_machine_is_refused_with_what_works() {
    let bench = Bench::new(0.0);
    let parallel = bench.root.path().join("hybrid.yaml");
    let text = "distributed_type: FSDP\nfsdp_config:\n  fsdp_sharding_strategy: HYBRID_SHARD\n";
    std::fs::write(parallel, text).unwrap();
    let output = bench.command("out", 2, &[]).args(["--parallel", "hybrid.yaml"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(
        stderr.trim_end(),
        "error: hybrid.yaml:3:27: fsdp_config.fsdp_sharding_strategy: hybrid sharding divides inside \
         a machine and repeats over machines of one size, but these 2 worker(s) are on 1; use \
         FULL_SHARD"
    );
    assert!(!bench.root.path().join("out").exists());
}
