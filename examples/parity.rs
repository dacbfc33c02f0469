//! Compares what a device computes with what the CPU computes in fp32, on the golden models: logits,
//! gradients, and the losses of 20 steps, in fp32, bf16 and fp16. `scripts/gpu-check.sh` runs it.
//!
//! ```text
//! cargo run --release --example parity -- cuda tests/golden/bert_tiny tests/golden/bert_odd
//! ```
//!
//! Prints a line for each comparison, `ok` or `FAIL` first; exits with 1 when one fails.

use std::path::Path;
use std::process::ExitCode;

use reranker::comm::{Groups, Solo};
use reranker::config::{self, LossKind};
use reranker::engine::{Engine, EngineOptions, StepOptions, TrainBatch};
use reranker::model::weights::WeightFiles;
use reranker::model::{ModelConfig, PackedBatch};
use reranker::shard::ParameterGroups;
use reranker::torch_ext::runtime;
use reranker::{Error, Result};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

const STEPS: usize = 20;
const BATCH: usize = 4;

/// A precision, with how far logits, gradients and losses may be from fp32 on the CPU: for the low
/// ones twice what they are off there, which is their rounding in models with weights this large.
struct Precision {
    name: &'static str,
    kind: Kind,
    tolerances: [f64; 3],
}

const PRECISIONS: [Precision; 3] = [
    Precision { name: "fp32", kind: Kind::Float, tolerances: [1e-4; 3] },
    Precision { name: "bf16", kind: Kind::BFloat16, tolerances: [5e-2, 1e-1, 1e-1] },
    Precision { name: "fp16", kind: Kind::Half, tolerances: [1e-2, 6e-2, 1e-2] },
];

/// A golden model and its inputs.
struct Golden {
    config: ModelConfig,
    weights: WeightFiles,
    pairs: Vec<Pair>,
}

struct Pair {
    input_ids: Vec<i64>,
    type_ids: Vec<i64>,
    label: f32,
}

/// What one device computed.
struct Trace {
    logits: Vec<f64>,
    gradients: Vec<f64>,
    losses: Vec<f64>,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (device, dirs) = match arguments.split_first() {
        Some((name, dirs)) if name == "cpu" && !dirs.is_empty() => (config::Device::Cpu, dirs),
        Some((name, dirs)) if name == "cuda" && !dirs.is_empty() => (config::Device::Cuda, dirs),
        _ => {
            eprintln!("usage: parity cpu|cuda GOLDEN_DIR...");
            return ExitCode::from(2);
        }
    };
    match compare_all(device, dirs) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Whether all comparisons passed.
fn compare_all(device: config::Device, dirs: &[String]) -> Result<bool> {
    let device = runtime::device(Some(device), 0)?;
    let mut all_passed = true;
    for dir in dirs {
        let dir = Path::new(dir);
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let golden = Golden::load(dir)?;
        let reference = golden.trace(Device::Cpu, Kind::Float)?;
        for Precision { name: precision, kind, tolerances } in PRECISIONS {
            let trace = golden.trace(device, kind)?;
            let differences = trace.differences(&reference);
            for ((what, difference), tolerance) in
                ["logits", "gradients", "losses"].iter().zip(differences).zip(tolerances)
            {
                let passed = difference <= tolerance;
                all_passed &= passed;
                println!(
                    "{:4}  {what} {precision} {name}  differ by {difference:.1e}, at most \
                     {tolerance:.0e}",
                    if passed { "ok" } else { "FAIL" }
                );
            }
        }
    }
    Ok(all_passed)
}

impl Golden {
    fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("golden.json");
        let broken = |message: String| Error::File { path: path.clone(), message };
        let text = std::fs::read_to_string(&path).map_err(|error| broken(error.to_string()))?;
        let info: Value = serde_json::from_str(&text).map_err(|error| broken(error.to_string()))?;
        let tensors = Tensor::read_safetensors(dir.join("golden.safetensors"))?;
        let integers = |name: String| -> Result<Vec<i64>> {
            let found = tensors.iter().find(|(other, _)| *other == name);
            let (_, tensor) = found.ok_or_else(|| broken(format!("no tensor {name}")))?;
            Ok(Vec::try_from(tensor.f_to_kind(Kind::Int64)?.f_view(-1)?)?)
        };
        let labels = info["labels"].as_array().ok_or_else(|| broken("no labels".into()))?;
        let pair = |(index, label): (usize, &Value)| {
            Ok(Pair {
                input_ids: integers(format!("input_ids.{index}"))?,
                type_ids: integers(format!("token_type_ids.{index}"))?,
                label: label.as_f64().unwrap_or_default() as f32,
            })
        };
        Ok(Self {
            config: ModelConfig::from_dir(dir)?.without_dropout(),
            weights: WeightFiles::open(dir)?,
            pairs: labels.iter().enumerate().map(pair).collect::<Result<_>>()?,
        })
    }

    /// The packed batch of `pairs`.
    fn batch(&self, pairs: &[usize], device: Device) -> Result<TrainBatch> {
        let (mut ids, mut types, mut positions, mut cu) = (vec![], vec![], vec![], vec![0_i64]);
        let mut labels = Vec::with_capacity(pairs.len());
        for pair in pairs.iter().map(|&index| &self.pairs[index]) {
            positions.extend(0..pair.input_ids.len() as i64);
            ids.extend(&pair.input_ids);
            types.extend(&pair.type_ids);
            cu.push(ids.len() as i64);
            labels.push(pair.label);
        }
        Ok(TrainBatch {
            packed: PackedBatch::new(&ids, &positions, &types, &cu, device)?,
            labels: Tensor::f_from_slice(&labels)?.f_to_device(device)?,
            cu_groups: vec![],
            origins: pairs.iter().map(|pair| format!("golden pair {pair}")).collect(),
        })
    }

    fn trace(&self, device: Device, kind: Kind) -> Result<Trace> {
        let groups = Groups::flat(Box::new(Solo));
        let rates = ParameterGroups { lr: 1e-3, weight_decay: 0.01, special: vec![] };
        let options = EngineOptions { kind, ..EngineOptions::whole(device) };
        let mut engine = Engine::load(&self.config, &self.weights, 1, &rates, options)?;
        engine.prepare_training()?;
        let all: Vec<usize> = (0..self.pairs.len()).collect();
        let logits = host(&engine.score(&self.batch(&all, device)?.packed, &groups)?)?;
        let gradients = self.gradients(&mut engine, &all, &groups)?;
        let mut losses = Vec::with_capacity(STEPS);
        for step in 0..STEPS {
            let pairs: Vec<usize> =
                (0..BATCH).map(|i| (step * 5 + i * 3) % self.pairs.len()).collect();
            let batches = [self.batch(&pairs, device)].into_iter();
            let report = engine.train_step(batches, step_options(step, BATCH), &groups)?;
            losses.push(report.loss);
        }
        Ok(Trace { logits, gradients, losses })
    }

    /// The gradients of one batch, without the factor of the loss scale. An overflow in fp16 makes
    /// the scale smaller and changes nothing else.
    fn gradients(&self, engine: &mut Engine, pairs: &[usize], groups: &Groups) -> Result<Vec<f64>> {
        let options = step_options(0, pairs.len());
        loop {
            let batches = [self.batch(pairs, engine.device())].into_iter();
            let report = engine.gradients(batches, options, groups)?;
            if report.grad_norm.is_finite() {
                break;
            }
            engine.update(&report, options, groups)?;
        }
        let scale = engine.loss_scale().map_or(1.0, reranker::optim::LossScale::scale);
        let mut all = Vec::new();
        for unit in engine.units() {
            all.extend(host(&unit.grads()?)?.into_iter().map(|value| value / scale));
            unit.clear_gradients()?;
        }
        Ok(all)
    }
}

fn step_options(step: usize, pairs: usize) -> StepOptions {
    StepOptions {
        loss: LossKind::PointwiseBce,
        weight: pairs as f64,
        step,
        lr_factor: 1.0,
        max_grad_norm: Some(0.5),
        seed: 1,
        stop: false,
    }
}

fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let tensor = tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    Ok(Vec::try_from(tensor.f_contiguous()?.f_view(-1)?)?)
}

impl Trace {
    /// The largest difference of logits and losses (relative above 1), and the norm of the
    /// gradients' difference over their norm.
    fn differences(&self, reference: &Self) -> [f64; 3] {
        let worst = |ours: &[f64], theirs: &[f64]| {
            let differences =
                ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / b.abs().max(1.0));
            differences.fold(0.0, f64::max)
        };
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        let gradients = self.gradients.iter().zip(&reference.gradients);
        let off = norm(&mut gradients.map(|(a, b)| a - b));
        [
            worst(&self.logits, &reference.logits),
            off / norm(&mut reference.gradients.iter().copied()),
            worst(&self.losses, &reference.losses),
        ]
    }
}
