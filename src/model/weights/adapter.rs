//! An adapter's tensors laid over those of its base model, merged as they are read.

use std::collections::BTreeMap;
use std::path::Path;

use tch::Tensor;

use super::WeightFiles;
use crate::error::{Error, Result};
use crate::model::lora::peft::{AdapterConfig, PREFIX, WEIGHTS_FILE};
use crate::model::lora::{adapter_names, module_of};
use crate::model::stage::{Parameter, TensorSpec};

impl WeightFiles {
    /// Lays the adapter in `dir` over these weights: a layer with an adapter then reads as
    /// `W + scaling * B A`, and what the adapter holds whole as it has it. `parameters` are the
    /// model's.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] with the file, where it is damaged or holds a tensor that
    /// the model has no place for.
    pub fn with_adapter(
        mut self,
        dir: &Path,
        config: &AdapterConfig,
        parameters: &[Parameter],
    ) -> Result<Self> {
        let path = dir.join(WEIGHTS_FILE);
        if !path.exists() {
            let message = format!("no {WEIGHTS_FILE} here");
            return Err(Error::File { path: dir.to_owned(), message });
        }
        let base = std::mem::take(&mut self.entries);
        self.add_file(&path)?;
        let adapter = std::mem::replace(&mut self.entries, base);
        let mut known: BTreeMap<String, TensorSpec> = BTreeMap::new();
        for parameter in parameters {
            for part in &parameter.parts {
                known.insert(part.name.clone(), part.clone());
                if parameter.linear {
                    let module = module_of(&part.name);
                    known.extend(adapter_names(module).map(|name| (name, part.clone())));
                }
            }
        }
        let unfit = |name: &str, what: String| Error::File {
            path: path.clone(),
            message: format!("tensor {name} {what}"),
        };
        let mut ranks: BTreeMap<String, [Option<i64>; 2]> = BTreeMap::new();
        for (name, entry) in adapter {
            let own = name.strip_prefix(PREFIX).unwrap_or(&name).to_owned();
            let Some(spec) = known.get(&own) else {
                let what = "is no adapter of a linear layer of this model and no part of it";
                return Err(unfit(&name, what.into()));
            };
            if own != spec.name {
                let module = module_of(&spec.name).to_owned();
                let side = usize::from(own != adapter_names(&module)[0]);
                // A is [r, in], B is [out, r].
                let shape = &entry.1.shape;
                if shape.len() != 2 || shape[1 - side] != spec.shape[1 - side] {
                    let what = format!("has shape {shape:?}, its layer {:?}", spec.shape);
                    return Err(unfit(&name, what));
                }
                ranks.entry(module).or_default()[side] = Some(shape[side]);
            }
            self.entries.insert(own, entry);
        }
        for (module, sides) in ranks {
            let [Some(r), Some(same)] = sides else {
                return Err(unfit(&module, "has only one of lora_A and lora_B".into()));
            };
            if r != same {
                return Err(unfit(&module, format!("has lora_A of rank {r}, lora_B of {same}")));
            }
            self.scalings.insert(module, (r, config.scaling(r)));
        }
        Ok(self)
    }

    /// Adds to the weight of `spec`, fp32, what an adapter laid over it makes of it.
    pub(super) fn merge(&self, spec: &TensorSpec, weight: Tensor) -> Result<Tensor> {
        let module = module_of(&spec.name);
        let adapted = spec.name.ends_with(".weight").then(|| self.scalings.get(module)).flatten();
        let Some(&(r, scaling)) = adapted else { return Ok(weight) };
        let [a, b] = adapter_names(module);
        let read = |name: String, shape: [i64; 2]| -> Result<Tensor> {
            let (file, place, kind) = self
                .find(&TensorSpec::new(name, &shape))?
                .expect("a tensor without an initial value is there or an error");
            self.read_place(file, place, kind)
        };
        let a = read(a, [r, spec.shape[1]])?;
        let b = read(b, [spec.shape[0], r])?;
        Ok(weight.f_add(&b.f_matmul(&a)?.f_mul_scalar(scaling)?)?)
    }
}
