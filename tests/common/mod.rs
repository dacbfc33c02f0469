//! Helpers shared by the integration tests: golden files and engines over them.
#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, missing_docs)]

pub mod ranks;
pub mod training;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use reranker::comm::{Groups, Solo};
use reranker::config::LossKind;
use reranker::engine::{Engine, EngineOptions, StepOptions, TrainBatch};
use reranker::model::weights::WeightFiles;
use reranker::model::{ModelConfig, PackedBatch};
use reranker::shard::ParameterGroups;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

pub fn golden_dir(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case)
}

/// One golden case: a model directory of transformers with what transformers computed.
pub struct Golden {
    pub dir: PathBuf,
    pub info: Value,
    pub tensors: BTreeMap<String, Tensor>,
}

impl Golden {
    pub fn load(case: &str) -> Self {
        let dir = golden_dir(case);
        let info = std::fs::read_to_string(dir.join("golden.json")).unwrap();
        let tensors = Tensor::read_safetensors(dir.join("golden.safetensors")).unwrap();
        Self {
            info: serde_json::from_str(&info).unwrap(),
            tensors: tensors.into_iter().collect(),
            dir,
        }
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("golden file lacks {name}"))
    }

    pub fn floats(&self, name: &str) -> Vec<f64> {
        floats(self.tensor(name))
    }

    pub fn pairs(&self) -> usize {
        self.info["pairs"].as_array().unwrap().len()
    }

    /// The packed batch of these pairs, from the token ids in the golden file.
    pub fn batch(&self, pairs: &[usize]) -> TrainBatch {
        let (mut ids, mut types, mut positions, mut cu) = (vec![], vec![], vec![], vec![0_i64]);
        let mut labels = Vec::new();
        for &pair in pairs {
            let input: Vec<i64> = ints(self.tensor(&format!("input_ids.{pair}")));
            positions.extend(0..input.len() as i64);
            cu.push(cu[cu.len() - 1] + input.len() as i64);
            ids.extend(input);
            // Tokenizers without segments give none.
            match self.tensors.get(&format!("token_type_ids.{pair}")) {
                Some(segments) => types.extend(ints(segments)),
                None => types.resize(ids.len(), 0),
            }
            labels.push(self.info["labels"][pair].as_f64().unwrap() as f32);
        }
        TrainBatch {
            packed: PackedBatch::new(&ids, &positions, &types, &cu, Device::Cpu).unwrap(),
            labels: Tensor::from_slice(&labels),
            cu_groups: vec![],
            origins: pairs.iter().map(|pair| format!("golden pair {pair}")).collect(),
        }
    }

    /// The model without dropout, in fp32, with room for training.
    pub fn engine(&self, lr: f64) -> Engine {
        self.engine_of(lr, Kind::Float)
    }

    /// The same in another precision.
    pub fn engine_of(&self, lr: f64, kind: Kind) -> Engine {
        let config = ModelConfig::from_dir(&self.dir).unwrap().without_dropout();
        let weights = WeightFiles::open(&self.dir).unwrap();
        let groups = ParameterGroups { lr, weight_decay: 0.01, special: vec![] };
        let options = EngineOptions { kind, ..EngineOptions::whole(Device::Cpu) };
        let mut engine = Engine::load(&config, &weights, 1, &groups, options).unwrap();
        engine.prepare_training().unwrap();
        engine
    }
}

/// The groups of a world of one.
pub fn solo() -> Groups {
    Groups::flat(Box::new(Solo))
}

pub fn options(loss: LossKind, weight: f64) -> StepOptions {
    let (lr_factor, max_grad_norm) = (1.0, None);
    StepOptions { loss, weight, step: 0, lr_factor, max_grad_norm, seed: 1, stop: false }
}

pub fn floats(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

fn ints(tensor: &Tensor) -> Vec<i64> {
    Vec::<i64>::try_from(tensor.to_kind(Kind::Int64).contiguous().view(-1)).unwrap()
}

/// Every checkpoint tensor of the engine, cut out of `flat(unit)`.
pub fn named(engine: &Engine, grads: bool) -> BTreeMap<String, Vec<f64>> {
    let mut all = BTreeMap::new();
    for unit in engine.units() {
        let flat =
            floats(&if grads { unit.grads().unwrap() } else { unit.values().shallow_clone() });
        for place in &unit.layout().places {
            for (spec, range) in &place.parts {
                all.insert(spec.name.clone(), flat[range.clone()].to_vec());
            }
        }
    }
    all
}

/// The largest difference, absolute below 1 and relative above.
pub fn worst(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "lengths differ");
    ours.iter().zip(theirs).map(|(a, b)| (a - b).abs() / b.abs().max(1.0)).fold(0.0, f64::max)
}

/// The norm of the difference over the norm of the reference.
pub fn relative(ours: &[f64], theirs: &[f64]) -> f64 {
    assert_eq!(ours.len(), theirs.len(), "lengths differ");
    let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let difference = norm(&mut ours.iter().zip(theirs).map(|(a, b)| a - b));
    difference / norm(&mut theirs.iter().copied()).max(1e-30)
}
