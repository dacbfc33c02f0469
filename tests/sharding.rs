//! Every way of dividing the work takes the steps of one rank that holds everything.
//!
//! Ranks are threads of this process, each with a Gloo group of its own over loopback.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::time::Duration;

use common::{Golden, floats, relative};
use reranker::comm::{Communicator, Gloo, Groups, Solo};
use reranker::config::LossKind;
use reranker::engine::{Engine, EngineOptions, MemoryForecast, StepOptions};
use reranker::model::ModelConfig;
use reranker::model::weights::WeightFiles;
use reranker::optim::Schedule;
use reranker::shard::{HeldBytes, ParameterGroups, Sharding, Share};
use rr_launch::contract::WorkerEnv;
use tch::{Device, Kind};

const STEPS: usize = 20;

const NOTHING: Sharding = Sharding { states: false, gradients: false, parameters: false };
const ZERO1: Sharding = Sharding { states: true, gradients: false, parameters: false };
const ZERO2: Sharding = Sharding { states: true, gradients: true, parameters: false };
const ZERO3: Sharding = Sharding { states: true, gradients: true, parameters: true };
const STRATEGIES: [(&str, Sharding); 4] =
    [("ddp", NOTHING), ("zero1", ZERO1), ("zero2", ZERO2), ("zero3", ZERO3)];

/// One cell of the table.
#[derive(Debug, Clone, Copy)]
struct Case {
    sharding: Sharding,
    ranks: usize,
    /// Ranks of a machine, for hybrid sharding.
    block: Option<usize>,
    accumulation: usize,
    max_grad_norm: Option<f64>,
    recompute: bool,
    kind: Kind,
}

impl Case {
    fn reference(accumulation: usize, max_grad_norm: Option<f64>) -> Self {
        Self {
            sharding: NOTHING,
            ranks: 1,
            block: None,
            accumulation,
            max_grad_norm,
            recompute: false,
            kind: Kind::Float,
        }
    }
}

/// What a rank has to show after training.
struct Outcome {
    losses: Vec<f64>,
    norms: Vec<f64>,
    parameters: BTreeMap<String, Vec<f64>>,
    /// Held between steps, and the most during them.
    held: HeldBytes,
    peak: HeldBytes,
    /// What was predicted before.
    forecast: MemoryForecast,
    /// Elements of all units and of the largest, padding included.
    elements: usize,
    largest: usize,
}

/// Trains on the ranks of `case`; returns every rank's outcome.
fn train(case: Case) -> Vec<Outcome> {
    // Ranks are threads: more threads below them would only wait for each other.
    tch::set_num_threads(1);
    if case.ranks == 1 {
        return vec![train_rank(case, &Groups::flat(Box::new(Solo)))];
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let rank_thread = move |rank: usize| {
        let env = WorkerEnv {
            rank,
            local_rank: rank,
            world_size: case.ranks,
            local_world_size: case.ranks,
            group_rank: 0,
            master_addr: "127.0.0.1".into(),
            master_port: port,
            run_id: None,
            restart_count: 0,
            progress: false,
        };
        let world: Box<dyn Communicator> =
            Box::new(Gloo::join(&env, Duration::from_secs(60)).unwrap());
        let groups = match case.block {
            Some(block) => Groups::hybrid(world, block).unwrap(),
            None => Groups::flat(world),
        };
        let outcome = train_rank(case, &groups);
        groups.world.barrier().unwrap();
        outcome
    };
    let threads: Vec<_> =
        (0..case.ranks).map(|rank| std::thread::spawn(move || rank_thread(rank))).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn train_rank(case: Case, groups: &Groups) -> Outcome {
    let comm = groups.world.as_ref();
    let golden = Golden::load("bert_odd");
    let config = ModelConfig::from_dir(&golden.dir).unwrap().without_dropout();
    let weights = WeightFiles::open(&golden.dir).unwrap();
    let rates = ParameterGroups {
        lr: 1e-3,
        weight_decay: 0.01,
        special: vec![(vec!["classifier".into(), "layer.1.attention.self.key".into()], 3e-3)],
    };
    let options = EngineOptions {
        device: Device::Cpu,
        kind: case.kind,
        share: Share {
            sharding: case.sharding,
            rank: groups.shard().rank(),
            world_size: groups.shard().world_size(),
        },
        recompute: case.recompute,
    };
    let mut engine = Engine::load(&config, &weights, 1, &rates, options).unwrap();
    engine.prepare_training().unwrap();
    let schedule = Schedule::new(STEPS, 0.1, 0.0);
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        let micro: Vec<Vec<usize>> = (0..case.accumulation)
            .map(|m| global_batch(step * case.accumulation + m, golden.pairs()))
            .collect();
        let weight = micro.iter().map(Vec::len).sum::<usize>() as f64;
        let options = StepOptions {
            loss: LossKind::PointwiseBce,
            weight,
            step,
            lr_factor: schedule.factor(step),
            max_grad_norm: case.max_grad_norm,
            seed: 1,
        };
        let batches = micro.iter().map(|pairs| Ok(golden.batch(&share_of(pairs, comm))));
        let report = engine.train_step(batches, options, groups).unwrap();
        losses.push(report.loss);
        norms.push(report.grad_norm);
    }
    let mut parameters = BTreeMap::new();
    for unit in engine.units() {
        let whole = floats(&unit.whole_fp32(groups.shard()).unwrap());
        for (spec, range) in unit.layout().places.iter().flat_map(|place| &place.parts) {
            parameters.insert(spec.name.clone(), whole[range.clone()].to_vec());
        }
    }
    let lengths = engine.units().iter().map(|unit| unit.layout().length);
    Outcome {
        losses,
        norms,
        parameters,
        forecast: MemoryForecast::new(&config, &options, 100),
        held: engine.held_bytes(),
        peak: engine.peak_held_bytes(),
        elements: lengths.clone().sum(),
        largest: lengths.max().unwrap(),
    }
}

/// Two to five pairs, so that four ranks sometimes have none.
fn global_batch(number: usize, pairs: usize) -> Vec<usize> {
    (0..2 + number % 4).map(|i| (number * 5 + i * 3) % pairs).collect()
}

/// Uneven: the first rank takes what does not divide.
fn share_of(pairs: &[usize], comm: &dyn Communicator) -> Vec<usize> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    pairs.iter().copied().enumerate().filter(|(i, _)| i % ranks == rank).map(|(_, p)| p).collect()
}

fn assert_close(case: Case, outcome: &Outcome, reference: &Outcome, tolerance: f64) {
    let worst = common::worst(&outcome.losses, &reference.losses);
    assert!(worst <= tolerance, "{case:?}: losses differ by {worst}");
    let worst = common::worst(&outcome.norms, &reference.norms);
    assert!(worst <= 10.0 * tolerance, "{case:?}: gradient norms differ by {worst}");
    for (name, values) in &outcome.parameters {
        // The exact gradient of a key bias is 0: AdamW follows rounding noise there.
        if name.ends_with("key.bias") {
            continue;
        }
        let difference = relative(values, &reference.parameters[name]);
        assert!(difference <= tolerance, "{case:?}: {name} differs by {difference}");
    }
}

#[test]
fn every_strategy_takes_the_steps_of_one_rank() {
    for accumulation in [1, 2] {
        for max_grad_norm in [None, Some(0.5)] {
            let base = Case::reference(accumulation, max_grad_norm);
            let reference = &train(base)[0];
            for (_, sharding) in STRATEGIES {
                for ranks in 1..=4 {
                    for recompute in [false, true] {
                        let case = Case { sharding, ranks, recompute, ..base };
                        for outcome in &train(case) {
                            assert_close(case, outcome, reference, 1e-5);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn hybrid_sharding_takes_the_steps_of_one_rank() {
    for accumulation in [1, 2] {
        for max_grad_norm in [None, Some(0.5)] {
            let base = Case::reference(accumulation, max_grad_norm);
            let reference = &train(base)[0];
            for sharding in [ZERO2, ZERO3] {
                for (ranks, block) in [(2, 1), (4, 2), (4, 1)] {
                    let case = Case { sharding, ranks, block: Some(block), ..base };
                    for outcome in &train(case) {
                        assert_close(case, outcome, reference, 1e-5);
                    }
                }
            }
        }
    }
}

#[test]
fn the_same_run_twice_is_bit_identical() {
    for (name, sharding) in STRATEGIES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let base = Case::reference(2, Some(0.5));
            let case = Case { sharding, ranks: 3, kind, recompute: true, ..base };
            let (first, second) = (train(case), train(case));
            for (a, b) in first.iter().zip(&second) {
                assert_eq!(a.parameters, b.parameters, "{name} {kind:?}");
                assert_eq!(a.losses, b.losses, "{name} {kind:?}");
            }
        }
    }
}

#[test]
fn low_precision_stays_near_fp32() {
    let base = Case::reference(2, Some(0.5));
    let reference = &train(base)[0];
    // bf16 keeps 8 bits, fp16 keeps 11.
    for (kind, tolerance) in [(Kind::BFloat16, 3e-2), (Kind::Half, 5e-3)] {
        for (_, sharding) in STRATEGIES {
            for ranks in [1, 2] {
                let case = Case { sharding, ranks, kind, ..base };
                for outcome in &train(case) {
                    assert_close(case, outcome, reference, tolerance);
                }
            }
        }
    }
}

/// The formulas of the ZeRO paper (section 3), in bytes per element: parameters and gradients in
/// the computing precision, states in fp32, each over the number of ranks where it is divided.
#[test]
fn held_bytes_equal_the_formulas() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let width = kind.elt_size_in_bytes();
        // Moments, and master weights beside low-precision parameters.
        let state_width = if kind == Kind::Float { 8 } else { 12 };
        for (name, sharding) in STRATEGIES {
            for ranks in [1, 2, 4] {
                let case = Case { sharding, ranks, kind, ..Case::reference(2, None) };
                for outcome in &train(case) {
                    let part = |divided: bool| if divided { ranks } else { 1 };
                    let Outcome { elements, largest, held, peak, forecast, .. } = outcome;
                    assert_eq!(forecast.held, *held, "{name}: the forecast");
                    // Divided low-precision parameters are kept as the fp32 master weights alone,
                    // which the states count.
                    let parameters = match (sharding.parameters, kind) {
                        (true, Kind::BFloat16) => 0,
                        _ => elements * width / part(sharding.parameters),
                    };
                    let expected = HeldBytes {
                        parameters,
                        gradients: elements * width / part(sharding.gradients),
                        states: elements * state_width / part(sharding.states),
                    };
                    assert_eq!(*held, expected, "{name}, {ranks} ranks, {kind:?}, between steps");
                    // While a stage computes: its parameters and those gathered ahead, its
                    // gradients and those being reduced.
                    let two_stages = 2 * largest * width;
                    assert!(
                        peak.parameters <= expected.parameters + two_stages,
                        "{name}: {peak:?}"
                    );
                    assert!(peak.gradients <= expected.gradients + two_stages, "{name}: {peak:?}");
                    assert_eq!(peak.states, expected.states, "{name}");
                }
            }
        }
    }
}
