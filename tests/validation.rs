//! Validation while training: when it happens, which model is kept as the best, when training stops.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;
#[path = "common/launch.rs"]
mod launch;

use std::path::Path;

use common::training::Bench;
use launch::{output_of, reranker};
use serde_json::Value;

/// The validations of a run, in order.
fn validations(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("runs/metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["type"] == "validation").collect()
}

fn steps(lines: &[Value]) -> Vec<u64> {
    lines.iter().map(|line| line["step"].as_u64().unwrap()).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_best_model_is_kept_whole_under_ddp_and_zero3() {
    let bench = Bench::new(0.0);
    for (name, parallel) in [("ddp", None), ("zero3", Some("zero3.yaml"))] {
        let settings =
            ["eval_steps=2", "metric_for_best=loss", "batch_size=3", "lr=2e-2", "max_label=2"];
        let mut command = bench.command(name, 2, &settings);
        command.args(parallel.into_iter().flat_map(|file| ["--parallel", file]));
        let stderr = String::from_utf8_lossy(&command.output().unwrap().stderr).into_owned();
        let run = bench.root.path().join(name);
        let found = validations(&run);
        // 53 pairs in steps of 12 make 5 steps an epoch; the last step is validated too.
        assert_eq!(steps(&found), [2, 4, 6, 8, 10], "{stderr}");
        let losses: Vec<f64> = found.iter().map(|line| line["loss"].as_f64().unwrap()).collect();
        let mut least = f64::INFINITY;
        for (line, &loss) in found.iter().zip(&losses) {
            assert_eq!(line["best"], loss < least, "{losses:?}");
            least = least.min(loss);
        }
        assert!(losses.last() != Some(&least), "the test wants a run that gets worse: {losses:?}");
        let best = found.iter().rfind(|line| line["best"] == true).unwrap();
        let told = format!("the best model, loss {least:.4} after step {}, is", best["step"]);
        assert!(stderr.contains(&told), "{stderr}");

        let metrics = &json(&run.join("best/reranker.json"))["metrics"];
        assert_eq!(metrics["loss"], best["loss"]);
        let model = format!("{name}/best");
        let args = ["eval", "--model", &model, "--data", "groups.jsonl", "--json"];
        let again: Value =
            serde_json::from_str(&output_of(&mut reranker(bench.root.path(), &args))).unwrap();
        for key in ["ndcg@10", "mrr@10", "map"] {
            let (then, now) = (best[key].as_f64().unwrap(), again["model"][key].as_f64().unwrap());
            assert!((then - now).abs() <= 1e-9, "{key}: {then} then, {now} now");
        }
        assert!(run.join("model/model.safetensors").exists());
    }
}

/// Whatever batches the rest falls into, and so whatever the number of workers.
#[test]
fn one_label_out_of_range_leaves_no_validation_loss() {
    let bench = Bench::new(0.0);
    let path = bench.root.path().join("groups.jsonl");
    let groups = std::fs::read_to_string(&path).unwrap();
    let odd = r#"{"query": "tea", "hits": [{"content": "leaf", "label": 5}]}"#;
    std::fs::write(&path, format!("{groups}{odd}\n")).unwrap();
    let output = bench.command("out", 2, &["epochs=1"]).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    let found = validations(&bench.root.path().join("out"));
    assert!(found[0]["loss"].is_null() && found[0]["ndcg@10"].is_number(), "{found:?}\n{stderr}");
    let warning = "val_dataset: has labels outside min_label to max_label, so that validation gives \
                   no loss, only ranking metrics";
    assert_eq!(stderr.matches(warning).count(), 1, "{stderr}");
}

#[test]
fn validation_data_with_nothing_to_compare_are_pointed_out() {
    let bench = Bench::new(0.0);
    for (loss, label) in [("pairwise_ranknet", 1), ("listwise_ce", 0)] {
        let hit = |text| format!(r#"{{"content": "{text}", "label": {label}}}"#);
        let group = format!(r#"{{"query": "q", "hits": [{}, {}]}}"#, hit("tea"), hit("leaf"));
        std::fs::write(bench.root.path().join("flat.jsonl"), group).unwrap();
        let mut check = reranker(bench.root.path(), &["check", "--config", "t.yaml"]);
        check.args(["--device", "cpu", "--set", &format!("loss_type={loss}")]);
        for setting in ["train_dataset=groups.jsonl", "val_dataset=flat.jsonl"] {
            check.args(["--set", setting]);
        }
        let text = output_of(&mut check);
        let warning = "val_dataset: has no query with labels to compare, so that validation gives no \
                       loss, only ranking metrics";
        assert!(text.contains(warning), "{loss}: {text}");
    }
}

#[test]
fn training_stops_on_all_ranks_when_nothing_gets_better() {
    let bench = Bench::new(0.0);
    let settings = [
        "eval_steps=1",
        "metric_for_best=ndcg@10",
        "early_stopping_patience=2",
        "batch_size=3",
        "log_interval=100",
        // So small that no score changes.
        "lr=1e-30",
    ];
    let output = bench.command("out", 2, &settings).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("stopped early, after 3 of 10 steps"), "{stderr}");
    let run = bench.root.path().join("out");
    let found = validations(&run);
    assert_eq!(steps(&found), [1, 2, 3]);
    assert_eq!(found.iter().filter(|line| line["best"] == true).count(), 1);
    assert!(run.join("model/model.safetensors").exists() && run.join("best").exists());
    // The steps since the last line of metrics are not lost.
    let text = std::fs::read_to_string(run.join("runs/metrics.jsonl")).unwrap();
    assert!(text.lines().any(|line| line.contains("\"train\"") && line.contains("\"step\":3")));

    // A later run that keeps no best model leaves none of an earlier one.
    let output = bench.command("out", 1, &[]).arg("--overwrite").output().unwrap();
    assert!(output.status.success());
    assert!(!run.join("best").exists());
    let epochs = validations(&run);
    assert!(epochs.iter().all(|line| line.get("best").is_none()), "{epochs:?}");
    assert_eq!(epochs.len(), 2, "one after every epoch");
}

#[test]
fn a_figure_that_the_data_cannot_give_is_an_error_before_training() {
    let bench = Bench::new(0.0);
    let root = bench.root.path();
    std::fs::write(
        root.join("flat.jsonl"),
        r#"{"query": "q", "hits": [{"content": "c", "label": 0}, {"content": "d", "label": 0}]}"#,
    )
    .unwrap();
    for (settings, expected) in [
        (
            &["val_dataset=pairs.jsonl", "metric_for_best=map"][..],
            "map compares the hits of a query, but val_dataset holds single pairs; give grouped \
             records",
        ),
        (
            &["val_dataset=flat.jsonl", "metric_for_best=ndcg@10"],
            "ndcg@10 needs a document with a label above 0, and val_dataset has none",
        ),
        (
            &[
                "val_dataset=flat.jsonl",
                "train_dataset=groups.jsonl",
                "loss_type=listwise_ce",
                "metric_for_best=loss",
            ],
            "loss needs a query with labels to compare, and val_dataset has none",
        ),
        (
            &["max_label=1", "train_dataset=ones.jsonl", "metric_for_best=loss"],
            "loss applies to labels from min_label to max_label, but val_dataset has others; set \
             max_label, or use ndcg@10, mrr@10 or map",
        ),
    ] {
        std::fs::write(
            root.join("ones.jsonl"),
            "{\"query\": \"q\", \"content\": \"c\", \"label\": 1}\n",
        )
        .unwrap();
        let output = bench.command("out", 2, settings).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        let expected =
            format!("error: --set {}: metric_for_best: {expected}", settings.last().unwrap());
        assert_eq!((output.status.code(), stderr.trim_end()), (Some(2), &*expected));
        assert!(!root.join("out").exists());
    }
}
