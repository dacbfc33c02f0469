//! Ranks as threads of one process that train a tiny model together, over any backend.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use reranker::comm::{Communicator, Gloo, Groups, Nccl, Solo};
use reranker::config::{LoraPlan, LossKind, TargetModules};
use reranker::engine::{Engine, EngineOptions, MemoryForecast, StepOptions};
use reranker::model::weights::WeightFiles;
use reranker::model::{Lora, ModelConfig, lora};
use reranker::optim::Schedule;
use reranker::shard::{HeldBytes, Offload, ParameterGroups, Sharding, Share};
use reranker::torch_ext::nccl;
use rr_launch::contract::WorkerEnv;
use tch::{Device, Kind};

use super::{Golden, floats, relative, worst};

pub const STEPS: usize = 20;

pub const NOTHING: Sharding = Sharding { states: false, gradients: false, parameters: false };
pub const ZERO1: Sharding = Sharding { states: true, gradients: false, parameters: false };
pub const ZERO2: Sharding = Sharding { states: true, gradients: true, parameters: false };
pub const ZERO3: Sharding = Sharding { states: true, gradients: true, parameters: true };
pub const STRATEGIES: [(&str, Sharding); 4] =
    [("ddp", NOTHING), ("zero1", ZERO1), ("zero2", ZERO2), ("zero3", ZERO3)];

/// One cell of the table.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    pub sharding: Sharding,
    pub ranks: usize,
    /// Ranks of a machine, for hybrid sharding.
    pub block: Option<usize>,
    pub accumulation: usize,
    pub max_grad_norm: Option<f64>,
    pub recompute: bool,
    pub kind: Kind,
    pub offload: Offload,
    pub reduce_fp32: bool,
    /// With adapters, in place of training all weights.
    pub lora: bool,
}

impl Case {
    pub fn reference(accumulation: usize, max_grad_norm: Option<f64>) -> Self {
        Self {
            sharding: NOTHING,
            ranks: 1,
            block: None,
            accumulation,
            max_grad_norm,
            recompute: false,
            kind: Kind::Float,
            offload: Offload::default(),
            reduce_fp32: false,
            lora: false,
        }
    }
}

/// What a rank has to show after training.
pub struct Outcome {
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
    pub parameters: BTreeMap<String, Vec<f64>>,
    /// Held between steps, and the most during them.
    pub held: HeldBytes,
    pub peak: HeldBytes,
    /// What was predicted before.
    pub forecast: MemoryForecast,
    /// Elements of all units and of the largest, padding included.
    pub elements: usize,
    pub largest: usize,
}

/// Trains on the ranks of `case` over Gloo; returns every rank's outcome.
pub fn train(case: Case) -> Vec<Outcome> {
    train_over(case, None)
}

/// As [`train`], over the NCCL in the library at a path where one is given.
pub fn train_over(case: Case, library: Option<&Path>) -> Vec<Outcome> {
    on_ranks(case, library, move |groups| Trainer::new(case, groups).finish(groups))
}

/// Runs `job` on the ranks of `case`; returns what each made of it.
pub fn on_ranks<T: Send + 'static>(
    case: Case,
    library: Option<&Path>,
    job: impl Fn(&Groups) -> T + Clone + Send + 'static,
) -> Vec<T> {
    let library = library.map(|path| nccl::Nccl::load(path).unwrap());
    // Ranks are threads: more threads below them would only wait for each other.
    tch::set_num_threads(1);
    if case.ranks == 1 {
        return vec![job(&Groups::flat(Box::new(Solo)))];
    }
    let port = free_port();
    let rank_thread = move |rank: usize| {
        let world = connect(port, rank, case.ranks, library.as_ref());
        let groups = match case.block {
            Some(block) => Groups::hybrid(world, block).unwrap(),
            None => Groups::flat(world),
        };
        let outcome = job(&groups);
        groups.world.barrier().unwrap();
        outcome
    };
    let threads: Vec<_> = (0..case.ranks)
        .map(|rank| {
            let run = rank_thread.clone();
            std::thread::spawn(move || run(rank))
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

/// A port of loopback that nobody listens on.
pub fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// One rank's end of a Gloo group whose rank 0 listens on `port`.
pub fn gloo(port: u16, rank: usize, world_size: usize, timeout: Duration) -> Gloo {
    Gloo::join(&environment(("127.0.0.1", port), rank, world_size), timeout).unwrap()
}

/// What a launcher tells one of the ranks of a machine that meet at `place`.
pub fn environment((host, port): (&str, u16), rank: usize, world_size: usize) -> WorkerEnv {
    WorkerEnv {
        rank,
        local_rank: rank,
        world_size,
        local_world_size: world_size,
        group_rank: 0,
        master_addr: host.into(),
        master_port: port,
        run_id: None,
        restart_count: 0,
        progress: false,
    }
}

/// One rank's end of a world whose rank 0 listens on `port`.
pub fn connect(
    port: u16,
    rank: usize,
    world_size: usize,
    library: Option<&Arc<nccl::Nccl>>,
) -> Box<dyn Communicator> {
    let timeout = Duration::from_secs(60);
    let gloo = gloo(port, rank, world_size, timeout);
    match library {
        Some(library) => {
            Box::new(Nccl::join(gloo, Arc::clone(library), Device::Cpu, timeout).unwrap())
        }
        None => Box::new(gloo),
    }
}

/// One rank that trains.
pub struct Trainer {
    case: Case,
    golden: Golden,
    config: ModelConfig,
    options: EngineOptions,
    pub engine: Engine,
    pub losses: Vec<f64>,
    pub norms: Vec<f64>,
}

impl Trainer {
    pub fn new(case: Case, groups: &Groups) -> Self {
        let golden = Golden::load("bert_odd");
        let mut config = ModelConfig::from_dir(&golden.dir).unwrap().without_dropout();
        config.lora = case.lora.then(|| adapters(&config));
        let weights = WeightFiles::open(&golden.dir).unwrap();
        let rates = ParameterGroups {
            lr: 1e-3,
            weight_decay: 0.01,
            special: vec![(vec!["classifier".into(), "layer.1.attention.self.key".into()], 3e-3)],
        };
        let options = EngineOptions {
            trains: true,
            device: Device::Cpu,
            kind: case.kind,
            share: Share {
                sharding: case.sharding,
                rank: groups.shard().rank(),
                world_size: groups.shard().world_size(),
            },
            recompute: case.recompute,
            offload: case.offload,
            reduce_fp32: case.reduce_fp32,
        };
        let mut engine = Engine::load(&config, &weights, 1, &rates, options).unwrap();
        engine.prepare_training().unwrap();
        Self { case, golden, config, options, engine, losses: vec![], norms: vec![] }
    }

    /// Takes the steps from `start` up to `end`.
    pub fn steps(&mut self, start: usize, end: usize, groups: &Groups) {
        let Self { case, golden, engine, .. } = self;
        let comm = groups.world.as_ref();
        let schedule = Schedule::new(STEPS, 0.1, 0.0);
        for step in start..end {
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
                stop: false,
            };
            let batches = micro.iter().map(|pairs| Ok(golden.batch(&share_of(pairs, comm))));
            let report = engine.train_step(batches, options, groups).unwrap();
            self.losses.push(report.loss);
            self.norms.push(report.grad_norm);
        }
    }

    /// The fp32 parameters by name.
    pub fn parameters(&self, groups: &Groups) -> BTreeMap<String, Vec<f64>> {
        let mut parameters = BTreeMap::new();
        for unit in self.engine.units() {
            let whole = floats(&unit.whole_fp32(groups.shard()).unwrap());
            for (spec, range) in unit.layout().places.iter().flat_map(|place| &place.parts) {
                parameters.insert(spec.name.clone(), whole[range.clone()].to_vec());
            }
        }
        parameters
    }

    /// Takes all steps.
    pub fn finish(mut self, groups: &Groups) -> Outcome {
        self.steps(0, STEPS, groups);
        let parameters = self.parameters(groups);
        let Self { config, options, engine, losses, norms, .. } = self;
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
}

/// Adapters in the upper layer, beside two of three stacked projections and a product by itself,
/// with norms trained whole: stages with nothing to learn, with a little, and with all.
fn adapters(config: &ModelConfig) -> Lora {
    let targets = [".*layer.1.*query", ".*layer.1.*value", ".*layer.1.output.dense"].join("|");
    let plan = LoraPlan {
        r: 3,
        alpha: 5.0,
        dropout: 0.0,
        target_modules: Some(TargetModules::Text(targets)),
        modules_to_save: vec!["layer.1.output.LayerNorm".into()],
    };
    lora::resolve(&plan, config).unwrap()
}

/// Two to five pairs, so that four ranks sometimes have none.
pub fn global_batch(number: usize, pairs: usize) -> Vec<usize> {
    (0..2 + number % 4).map(|i| (number * 5 + i * 3) % pairs).collect()
}

/// Uneven: the first rank takes what does not divide.
pub fn share_of(pairs: &[usize], comm: &dyn Communicator) -> Vec<usize> {
    let (rank, ranks) = (comm.rank(), comm.world_size());
    pairs.iter().copied().enumerate().filter(|(i, _)| i % ranks == rank).map(|(_, p)| p).collect()
}

pub fn assert_close(case: Case, outcome: &Outcome, reference: &Outcome, tolerance: f64) {
    let difference = worst(&outcome.losses, &reference.losses);
    assert!(difference <= tolerance, "{case:?}: losses differ by {difference}");
    let difference = worst(&outcome.norms, &reference.norms);
    assert!(difference <= 10.0 * tolerance, "{case:?}: gradient norms differ by {difference}");
    for (name, values) in &outcome.parameters {
        // The exact gradient of a key bias is 0: AdamW follows rounding noise there.
        if name.ends_with("key.bias") {
            continue;
        }
        let difference = relative(values, &reference.parameters[name]);
        assert!(difference <= tolerance, "{case:?}: {name} differs by {difference}");
    }
}
