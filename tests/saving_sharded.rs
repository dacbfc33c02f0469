//! Saving a model whose parameters are divided: no rank ever holds all of it.
//!
//! Ranks are threads of this process, each with a Gloo group of its own over loopback.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use common::Golden;
use reranker::checkpoint::{SavedModel, Sidecar, save_model};
use reranker::comm::{Communicator, Gloo, Groups, Solo};
use reranker::config::{Plan, Sources};
use reranker::engine::{Engine, EngineOptions};
use reranker::model::ModelConfig;
use reranker::model::weights::WeightFiles;
use reranker::shard::{ParameterGroups, Sharding, Share};
use rr_launch::contract::WorkerEnv;
use tch::{Device, Kind, Tensor};

const ZERO3: Sharding = Sharding { states: true, gradients: true, parameters: true };

/// Bytes above which weight files are split.
const MAX_SHARD_BYTES: usize = 20_000;

fn sidecar(dir: &Path) -> Sidecar {
    let training = dir.join("training.yaml");
    let yaml = "model_name_or_path: m\nmodel_type: bert_encoder\ntrain_dataset: t.jsonl\n";
    std::fs::write(&training, yaml).unwrap();
    let plan = Plan::load(&Sources { training, ..Sources::default() }).unwrap();
    Sidecar::of_run(&plan, None, serde_json::Value::Null)
}

/// What one rank reports of saving.
#[derive(Debug)]
struct Saved {
    most_held: usize,
    /// fp32 bytes of all parameters and of the largest stage, padding included.
    whole: usize,
    largest: usize,
}

/// Loads and saves the model of `golden` as a rank of `groups`.
fn save(golden: &Golden, kind: Kind, groups: &Groups, sidecar: &Sidecar, target: &Path) -> Saved {
    let config = ModelConfig::from_dir(&golden.dir).unwrap();
    let weights = WeightFiles::open(&golden.dir).unwrap();
    let rates = ParameterGroups { lr: 1e-3, weight_decay: 0.01, special: vec![] };
    let (rank, world_size) = (groups.shard().rank(), groups.shard().world_size());
    let options = EngineOptions {
        kind,
        share: Share { sharding: ZERO3, rank, world_size },
        ..EngineOptions::whole(Device::Cpu)
    };
    let engine = Engine::load(&config, &weights, 1, &rates, options).unwrap();
    let model = SavedModel {
        units: engine.units(),
        config: &config,
        base: &golden.dir,
        sidecar,
        max_shard_bytes: MAX_SHARD_BYTES,
    };
    let most_held = save_model(model, target, groups).unwrap();
    groups.world.barrier().unwrap();
    let lengths = engine.units().iter().map(|unit| unit.layout().length * 4);
    Saved { most_held, whole: lengths.clone().sum(), largest: lengths.max().unwrap() }
}

/// Saves with `ranks` threads into `target`; what each of them reports.
fn save_with(ranks: usize, kind: Kind, target: &Path, sidecar: &Sidecar) -> Vec<Saved> {
    tch::set_num_threads(1);
    if ranks == 1 {
        let golden = Golden::load("bert_odd");
        let groups = Groups::flat(Box::new(Solo));
        return vec![save(&golden, kind, &groups, sidecar, target)];
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let rank_thread = |rank: usize| {
        let env = WorkerEnv {
            rank,
            local_rank: rank,
            world_size: ranks,
            local_world_size: ranks,
            group_rank: 0,
            master_addr: "127.0.0.1".into(),
            master_port: port,
            run_id: None,
            restart_count: 0,
            progress: false,
        };
        let world: Box<dyn Communicator> =
            Box::new(Gloo::join(&env, Duration::from_secs(60)).unwrap());
        save(&Golden::load("bert_odd"), kind, &Groups::flat(world), sidecar, target)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..ranks).map(|rank| scope.spawn(move || rank_thread(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Every tensor of a directory of shards, by name, and how large the largest shard is.
fn tensors_in(dir: &Path) -> (Vec<(String, Tensor)>, usize) {
    let (mut all, mut largest, mut files) = (Vec::new(), 0, 0);
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let tensors = Tensor::read_safetensors(&path).unwrap();
            if tensors.len() > 1 {
                largest = largest.max(tensors.iter().map(|(_, t)| t.numel() * 4).sum());
            }
            all.extend(tensors);
            files += 1;
        }
    }
    assert!(files > 2, "{} holds {files} weight files", dir.display());
    all.sort_by(|a, b| a.0.cmp(&b.0));
    (all, largest)
}

#[test]
fn no_rank_holds_the_whole_model() {
    let dir = tempfile::tempdir().unwrap();
    let sidecar = sidecar(dir.path());
    for kind in [Kind::Float, Kind::BFloat16] {
        let reference = dir.path().join(format!("{kind:?}-1"));
        save_with(1, kind, &reference, &sidecar);
        let (reference, _) = tensors_in(&reference);
        for ranks in [2, 3, 4] {
            let target = dir.path().join(format!("{kind:?}-{ranks}"));
            for saved in save_with(ranks, kind, &target, &sidecar) {
                let Saved { most_held, whole, largest } = saved;
                // Low-precision parameters are kept as master weights, which are states.
                let own = if kind == Kind::Float { whole.div_ceil(ranks) } else { 0 };
                assert_eq!(most_held, own + largest, "{kind:?}, {ranks} ranks: {saved:?}");
                assert!(most_held < whole, "{kind:?}, {ranks} ranks: {saved:?}");
            }
            let (tensors, largest_shard) = tensors_in(&target);
            assert!(largest_shard <= MAX_SHARD_BYTES, "a shard of {largest_shard} bytes");
            assert_eq!(tensors.len(), reference.len());
            for ((name, value), (expected_name, expected)) in tensors.iter().zip(&reference) {
                assert_eq!(name, expected_name);
                assert!(value == expected, "{kind:?}, {ranks} ranks: {name}");
            }
        }
    }
}
