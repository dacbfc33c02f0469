//! A Hugging Face model directory that transformers, sentence-transformers and
//! text-embeddings-inference load; or, of a model with adapters, an adapter directory that peft
//! loads.

use std::ops::Range;
use std::path::Path;
use std::thread::JoinHandle;

use serde_json::{Map, Value, json};
use tch::Tensor;

use super::growing::tell_saving;
use super::sidecar::Sidecar;
use super::training::fail_point;
use super::weight_writer::{WeightForm, WeightWriter};
use crate::atomic::{StagedDir, write_synced};
use crate::comm::{Groups, Reduction, reduce_values, wait_together};
use crate::config::ModelKind;
use crate::error::{Error, Result};
use crate::model::lora::peft;
use crate::model::stage::TensorSpec;
use crate::model::{Activation, ModelConfig, Trunk};
use crate::shard::FlatUnit;
use crate::text::{SETTINGS_FILE, TOKENIZER_FILES, pad_token_id, settings_with_class};
use crate::torch_ext::storage;

/// Weight files are split above this many bytes, as transformers does.
pub const MAX_SHARD_BYTES: usize = 5_000_000_000;

/// What to save.
#[derive(Debug, Clone, Copy)]
pub struct SavedModel<'a> {
    /// The parameters.
    pub units: &'a [FlatUnit],
    /// The model's configuration.
    pub config: &'a ModelConfig,
    /// The directory whose tokenizer the model uses.
    pub base: &'a Path,
    /// What goes into `reranker.json`.
    pub sidecar: &'a Sidecar,
    /// Weight files are split above this many bytes ([`MAX_SHARD_BYTES`]).
    pub max_shard_bytes: usize,
}

/// What a model directory needs beside weights, kept for later: the base model's own files may be
/// gone by then.
#[derive(Debug)]
pub struct ModelFiles {
    /// `config.json`, or that of an adapter, and the tokenizer's files, by name.
    files: Vec<(String, Vec<u8>)>,
    sidecar: Option<Sidecar>,
    /// How its weight files are called and split.
    pub form: WeightForm,
}

impl ModelFiles {
    /// The files of a model of `config` with the tokenizer in `base`; of its adapters alone, where it
    /// has any. Weight files are split above `max_shard_bytes`.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that cannot be read.
    pub fn read(
        config: &ModelConfig,
        base: &Path,
        sidecar: Option<Sidecar>,
        max_shard_bytes: usize,
    ) -> Result<Self> {
        let bytes = |json: &Value| {
            (serde_json::to_string_pretty(json).unwrap_or_default() + "\n").into_bytes()
        };
        let (name, json, form) = if let (Some(lora), Some(sidecar)) = (&config.lora, &sidecar) {
            let json = lora.adapter_config(&sidecar.base_model, sidecar.base_revision.as_deref());
            (peft::CONFIG_FILE, json, WeightForm::adapter())
        } else {
            ("config.json", saved_config(config, base)?, WeightForm::model(max_shard_bytes))
        };
        let mut files = vec![(name.to_owned(), bytes(&json))];
        for name in TOKENIZER_FILES {
            let from = base.join(name);
            if from.exists() {
                let bytes = std::fs::read(&from).map_err(|source| Error::Io {
                    path: from,
                    action: "read",
                    source,
                })?;
                files.push((name.to_owned(), bytes));
            }
        }
        // The base model's config.json, which may be all that tells the class, is not beside an adapter.
        if name == peft::CONFIG_FILE
            && let Some(settings) = settings_with_class(base, &config.raw)?
        {
            files.retain(|(name, _)| name != SETTINGS_FILE);
            files.push((SETTINGS_FILE.to_owned(), bytes(&settings)));
        }
        Ok(Self { files, sidecar, form })
    }
}

/// Writes everything of a model directory but weights into `dir`, with other `metrics` than those of its
/// sidecar where they are given.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn write_model_files(dir: &Path, model: &ModelFiles, metrics: Option<&Value>) -> Result<()> {
    for (name, bytes) in &model.files {
        write_synced(&dir.join(name), bytes)?;
    }
    let Some(sidecar) = &model.sidecar else { return Ok(()) };
    let metrics = metrics.unwrap_or(&sidecar.metrics).clone();
    Sidecar { metrics, ..sidecar.clone() }.write(dir)
}

/// Writes the model directory `target` on rank 0, whole or not at all, replacing one that is there.
/// Every rank calls it: divided parameters are collected a stage at a time, so that no rank holds
/// the whole model. Returns the most bytes of parameters that this rank held meanwhile, its own
/// part and what was collected.
///
/// # Errors
/// [`Error::Io`] or [`Error::File`] with the file that could not be written, on rank 0 alone and
/// after all has been collected; [`Error::Comm`] from the communicator.
pub fn save_model(model: SavedModel<'_>, target: &Path, groups: &Groups) -> Result<usize> {
    let world = groups.world.as_ref();
    if world.rank() != 0 {
        let most_held = collect(model.units, groups, |_, _| ())?;
        wait_together(world, || true, || ())?;
        return Ok(most_held);
    }
    let mut building = Building::begin(model, target);
    let most_held = collect(model.units, groups, |unit, whole| {
        // A disk that fails keeps no other rank waiting: collecting goes on.
        if let Ok(begun) = &mut building
            && let Err(error) = begun.add(unit, whole)
        {
            building = Err(error);
        }
    })?;
    let ending = building.map(|building| std::thread::spawn(|| building.end()));
    let is_done = || ending.as_ref().is_ok_and(JoinHandle::is_finished) || ending.is_err();
    wait_together(world, is_done, tell_saving)?;
    let broken = |_| Error::Training("the thread that saves the model panicked".into());
    ending?.join().map_err(broken)??;
    Ok(most_held)
}

/// A model directory under construction.
struct Building {
    staged: StagedDir,
    files: ModelFiles,
    writer: WeightWriter,
}

/// The tensors of a unit, with their places in its buffer.
fn parts(unit: &FlatUnit) -> Vec<(TensorSpec, Range<usize>)> {
    unit.layout().places.iter().flat_map(|place| place.parts.clone()).collect()
}

impl Building {
    fn begin(model: SavedModel<'_>, target: &Path) -> Result<Self> {
        let staged = StagedDir::new(target)?;
        let sidecar = Some(model.sidecar.clone());
        let files = ModelFiles::read(model.config, model.base, sidecar, model.max_shard_bytes)?;
        let specs = model.units.iter().flat_map(parts).map(|(spec, _)| spec).collect();
        let writer = WeightWriter::new(staged.path(), specs, files.form)?;
        Ok(Self { staged, files, writer })
    }

    /// Adds what is no weight, and moves the directory to its place.
    fn end(self) -> Result<()> {
        let Self { staged, files, .. } = self;
        write_model_files(staged.path(), &files, None)?;
        fail_point("before_model_moves");
        staged.publish()?;
        fail_point("after_model_moves");
        Ok(())
    }

    /// Writes the next unit, whose parameters are `whole`.
    fn add(&mut self, unit: &FlatUnit, whole: &Tensor) -> Result<()> {
        for (spec, range) in parts(unit) {
            let values = whole.f_narrow(0, range.start as i64, range.len() as i64)?;
            self.writer.write(&spec, &values)?;
            tell_saving();
        }
        Ok(())
    }
}

/// Collects one stage's parameters after the other, in fp32, and lends each to `take` before the
/// next, at which all ranks meet. Returns the most bytes of parameters that this rank held meanwhile.
fn collect(
    units: &[FlatUnit],
    groups: &Groups,
    mut take: impl FnMut(&FlatUnit, &Tensor),
) -> Result<usize> {
    let mut most_held = 0;
    for unit in units {
        let whole = unit.whole_fp32(groups.shard())?;
        let own: usize = units.iter().map(|unit| unit.held_bytes().parameters).sum();
        // Whole parameters in fp32 are lent as they are.
        let values = unit.values();
        let lent = storage::held_bytes(values) > 0 && values.data_ptr() == whole.data_ptr();
        let collected = if lent { 0 } else { storage::held_bytes(&whole) };
        most_held = most_held.max(own + collected);
        take(unit, &whole);
        // Rank 0 may need longer for all of them than a rank waits for another.
        reduce_values(groups.world.as_ref(), &mut [0.0], Reduction::Max)?;
    }
    Ok(most_held)
}

/// The base model's `config.json` as a one-label sequence classifier in fp32. transformers finds a
/// decoder's last token by its padding token, so that one is taken from the tokenizer in `base` where
/// the configuration has none.
fn saved_config(config: &ModelConfig, base: &Path) -> Result<Value> {
    let mut raw: Map<String, Value> = config.raw.as_object().cloned().unwrap_or_default();
    // Left over from the base model; wrong for what is saved here.
    for stale in ["_name_or_path", "torch_dtype", "num_labels", "auto_map"] {
        raw.remove(stale);
    }
    // What sentence-transformers makes of a logit. Its own rule for one label is the sigmoid, which is
    // what `score` gives; a base model of its may say that the logit itself is the score.
    for activation in ["sentence_transformers", "sbert_ce_default_activation_function"] {
        raw.remove(activation);
    }
    raw.extend(activation_computed(config));
    raw.insert("architectures".into(), json!([config.architecture()]));
    raw.insert("dtype".into(), json!("float32"));
    raw.insert("id2label".into(), json!({"0": "LABEL_0"}));
    raw.insert("label2id".into(), json!({"LABEL_0": 0}));
    // Files that say -1 mean none; transformers would look for a token of that id.
    let given = raw.get("pad_token_id");
    let has_padding = given.and_then(Value::as_i64).is_some_and(|id| id >= 0);
    if config.kind() == ModelKind::LlmDecoder && !has_padding {
        match (pad_token_id(base, &config.raw)?, given) {
            (None, None) => {}
            (id, _) => {
                raw.insert("pad_token_id".into(), json!(id));
            }
        }
    }
    Ok(Value::Object(raw))
}

/// What the first Gemma files call gelu, while they mean the approximation that is computed. Releases of
/// transformers differ in which they take it for, and in which of the two keys they look at.
fn activation_computed(config: &ModelConfig) -> Vec<(String, Value)> {
    let is_approximate = match &config.trunk {
        Trunk::Decoder(decoder) => decoder.activation == Activation::GeluTanh,
        Trunk::Encoder(_) | Trunk::ModernBert(_) => false,
    };
    if !is_approximate || config.raw["hidden_act"] != "gelu" {
        return Vec::new();
    }
    let newer = config.raw.get("hidden_activation").map(|_| "hidden_activation");
    let keys = ["hidden_act"].into_iter().chain(newer);
    keys.map(|key| (key.to_owned(), json!("gelu_pytorch_tanh"))).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    #[test]
    fn a_saved_gemma_names_the_activation_that_was_computed() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let saved = |family: &str, given: &Value| {
            let text = std::fs::read_to_string(golden.join(family).join("config.json")).unwrap();
            let mut file: Map<String, Value> = serde_json::from_str(&text).unwrap();
            file.extend(given.as_object().unwrap().clone());
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("config.json"), json!(file).to_string()).unwrap();
            let config = ModelConfig::from_dir(dir.path()).unwrap();
            let saved = saved_config(&config, dir.path()).unwrap();
            ["hidden_act", "hidden_activation"].map(|key| saved[key].clone())
        };
        let tanh = json!("gelu_pytorch_tanh");
        let old = json!({"hidden_act": "gelu"});
        assert_eq!(saved("gemma_tiny", &old), [tanh.clone(), Value::Null]);
        let null = json!({"hidden_act": "gelu", "hidden_activation": null});
        assert_eq!(saved("gemma_tiny", &null), [tanh.clone(), tanh]);
        // Elsewhere gelu is the exact one, and a name that says what it means stays.
        let silu = json!({"hidden_act": "silu"});
        assert_eq!(saved("gemma_tiny", &silu), [json!("silu"), Value::Null]);
        assert_eq!(saved("qwen2_tiny", &old), [json!("gelu"), Value::Null]);
    }

    /// What is saved of a decoder whose configuration and tokenizer give these.
    fn saved_padding(id: &Value, token: &Value) -> Option<Value> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qwen2_tiny");
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(golden.join("tokenizer.json"), dir.path().join("tokenizer.json")).unwrap();
        let edited =
            [("config.json", "pad_token_id", id), ("tokenizer_config.json", "pad_token", token)];
        for (name, key, value) in edited {
            let text = std::fs::read_to_string(golden.join(name)).unwrap();
            let mut file: Map<String, Value> = serde_json::from_str(&text).unwrap();
            file.remove(key);
            if !value.is_null() {
                file.insert(key.into(), value.clone());
            }
            std::fs::write(dir.path().join(name), json!(file).to_string()).unwrap();
        }
        let config = ModelConfig::from_dir(dir.path()).unwrap();
        saved_config(&config, dir.path()).unwrap().get("pad_token_id").cloned()
    }

    #[test]
    fn a_saved_decoder_has_the_padding_token_that_there_is() {
        let nothing = Value::Null;
        assert_eq!(saved_padding(&json!(3), &json!("[PAD]")), Some(json!(3)));
        assert_eq!(saved_padding(&nothing, &json!("[PAD]")), Some(json!(0)));
        assert_eq!(saved_padding(&nothing, &nothing), None);
        // No token has this id, and a batch would be read at its padding.
        assert_eq!(saved_padding(&json!(-1), &json!("[PAD]")), Some(json!(0)));
        assert_eq!(saved_padding(&json!(-1), &nothing), Some(nothing));
    }
}
