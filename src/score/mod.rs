//! Scoring with a trained model: the library calls and what the `score` and `eval` commands share.
//!
//! ```no_run
//! # fn main() -> reranker::Result<()> {
//! use reranker::score::{CrossEncoder, ScoreOptions};
//!
//! let model = CrossEncoder::from_pretrained("output/quickstart/model")?;
//! let pairs = [("how do I boil an egg", "Eggs need seven minutes in simmering water.")];
//! let scores: Vec<f32> = model.compute_score(&pairs, &ScoreOptions::default())?;
//! # Ok(()) }
//! ```

mod batch;
mod crew;
mod file;
mod form;
mod job_dir;
mod pipeline;
mod store;
mod stream;

use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

pub use file::{Checked, FileJob, Progress};
pub use form::{GivenTexts, PairTexts};
pub use pipeline::score_pairs;
pub use store::{Due, Earlier, ScoreStore, Writer};
pub use stream::{Scored, score_stream};

use crate::comm::{Groups, Solo};
use crate::config::Precision;
use crate::data::Encode as _;
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::model::stage::TensorSpec;
use crate::model::weights::WeightFiles;
use crate::model::{ModelConfig, PackedBatch, Parameter, Pretrained};
use crate::shard::{FlatUnit, ParameterGroups};
use crate::text::{EncodedPair, PairTokenizer, TokenBatch, TokenPrompt};
use crate::torch_ext::runtime;
use batch::{BatchLimits, batches};
use crew::{Crew, Starter, Work};
use form::Form;

/// The head that a checkpoint lacks is drawn from this seed when scoring without training.
const UNTRAINED_HEAD_SEED: u64 = 666;

/// Pairs per forward pass, at most, when nothing else is asked for: so many that tokens decide.
pub const DEFAULT_BATCH_SIZE: usize = 512;

/// Tokens per forward pass on the CPU, whose caches should hold the rows, and on a GPU, which wants
/// enough rows to be busy.
const BATCH_TOKENS_CPU: usize = 4096;
const BATCH_TOKENS_GPU: usize = 16_384;

/// Characters of a pair that an error shows.
const SHOWN_CHARS: usize = 60;

/// How to score.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScoreOptions {
    /// Pairs per forward pass, at most: a batch ends before it has more than 4,096 tokens on the CPU
    /// or 16,384 on a GPU.
    pub batch_size: usize,
    /// The most tokens of a pair; `None` takes what the model was trained with.
    pub max_len: Option<usize>,
    /// Whether to map logits to `(0, 1)` with a sigmoid.
    pub normalize: bool,
}

impl Default for ScoreOptions {
    fn default() -> Self {
        Self { batch_size: DEFAULT_BATCH_SIZE, max_len: None, normalize: true }
    }
}

/// How to load a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoadOptions<'a> {
    /// Where it computes.
    pub device: Device,
    /// What it computes in: fp32 has the saved model's scores to the last digits; bf16 and fp16 take half
    /// the memory, and on GPUs a fraction of the time.
    pub precision: Precision,
    /// For a language model without a score head: the name of the [`TokenPrompt`] that asks it.
    pub prompt: Option<&'a str>,
    /// What stands around query and document, where it is not to be what the model says.
    pub texts: GivenTexts<'a>,
}

impl Default for LoadOptions<'_> {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            precision: Precision::Fp32,
            prompt: None,
            texts: GivenTexts::default(),
        }
    }
}

/// A model that reads query and document together and gives one score: an encoder with a head on
/// its first token, or a decoder ([`LlmDecoder`]).
#[derive(Debug)]
pub struct CrossEncoder {
    engine: Engine,
    config: ModelConfig,
    /// Started by the first work that is enough for it; `None` where threads cannot share work.
    crew: OnceCell<Option<Arc<Crew>>>,
    groups: Groups,
    tokenizer: Arc<PairTokenizer>,
    max_len: usize,
    positions: usize,
    precision: Precision,
    initialised: Vec<String>,
    assumed: Option<&'static TokenPrompt>,
    is_bare: bool,
}

/// A decoder that reads query and document together, and scores at the last token: by a head, or by
/// the logit of a token.
pub type LlmDecoder = CrossEncoder;

impl CrossEncoder {
    /// Loads a Hugging Face model, or an adapter of peft with the model that it is for, a directory or
    /// a hub id ([`crate::hub::resolve`]), on the CPU.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no such model;
    /// [`Error::File`] or [`Error::Io`] that names what is missing or wrong in the directory.
    pub fn from_pretrained(dir: impl AsRef<Path>) -> Result<Self> {
        Self::on_device(dir, Device::Cpu)
    }

    /// Loads a Hugging Face model, or an adapter of peft with the model that it is for, a directory or
    /// a hub id ([`crate::hub::resolve`]), on `device`.
    ///
    /// # Errors
    /// As [`CrossEncoder::from_pretrained`]; [`Error::Torch`] when the device has no room.
    pub fn on_device(dir: impl AsRef<Path>, device: Device) -> Result<Self> {
        Self::with_prompt(dir, device, None)
    }

    /// As [`CrossEncoder::on_device`], for a language model without a score head that is asked by
    /// the [`TokenPrompt`] called `prompt`.
    ///
    /// # Errors
    /// As [`CrossEncoder::on_device`]; [`Error::Usage`] for a prompt that is not known or not needed.
    pub fn with_prompt(
        dir: impl AsRef<Path>,
        device: Device,
        prompt: Option<&str>,
    ) -> Result<Self> {
        Self::settle(&dir);
        Self::load(dir, LoadOptions { device, prompt, ..LoadOptions::default() })
    }

    /// Loads a Hugging Face model, or an adapter of peft with the model that it is for, a directory or
    /// a hub id ([`crate::hub::resolve`]), as `options` say, and as it is in the cache where that holds it
    /// in full: [`CrossEncoder::settle`], called before, completes it.
    ///
    /// # Errors
    /// As [`CrossEncoder::with_prompt`].
    pub fn load(dir: impl AsRef<Path>, options: LoadOptions<'_>) -> Result<Self> {
        let LoadOptions { device, precision, .. } = options;
        let Opened { config, weights, form, initialised } = Opened::new(dir.as_ref(), options)?;
        let Form { tokenizer, max_len, assumed, is_bare } = form;
        let tokenizer = Arc::new(tokenizer);
        let rates = ParameterGroups { lr: 0.0, weight_decay: 0.0, special: Vec::new() };
        let kind = runtime::kind_of(precision);
        let options = EngineOptions { kind, trains: false, ..EngineOptions::whole(device) };
        let engine = Engine::load(&config, &weights, UNTRAINED_HEAD_SEED, &rates, options)?;
        let positions = config.max_positions();
        let max_len = max_len.unwrap_or(positions).min(positions);
        let groups = Groups::flat(Box::new(Solo));
        let crew = OnceCell::new();
        Ok(Self {
            engine,
            config,
            crew,
            groups,
            tokenizer,
            max_len,
            positions,
            precision,
            initialised,
            assumed,
            is_bare,
        })
    }

    /// Asks the hub for what scoring reads beside a model that another program has fetched
    /// ([`crate::hub::settle`]). Where processes share a cache, one does, and the others wait.
    pub fn settle(dir: impl AsRef<Path>) {
        if let Some(name) = dir.as_ref().to_str() {
            Pretrained::settle(name);
        }
    }

    /// Checks all that can be wrong with a model, the options and `max_len` without reading its weights;
    /// returns what [`CrossEncoder::initialised`] would.
    ///
    /// # Errors
    /// As [`CrossEncoder::with_prompt`]; [`Error::Usage`] for a `max_len` that the model cannot take.
    pub fn examine(
        dir: impl AsRef<Path>,
        options: LoadOptions<'_>,
        max_len: Option<usize>,
    ) -> Result<Vec<String>> {
        let Opened { config, form, initialised, .. } = Opened::new(dir.as_ref(), options)?;
        if let Some(max_len) = max_len {
            check_max_len(max_len, &form.tokenizer, config.max_positions())?;
        }
        Ok(initialised)
    }

    /// The most tokens of a pair that the model takes when nothing else is asked for.
    #[must_use]
    pub fn max_len(&self) -> usize {
        self.max_len
    }

    /// Parameters that the directory lacks and that hold random values: the head of a model that
    /// was never trained to rerank.
    #[must_use]
    pub fn initialised(&self) -> &[String] {
        &self.initialised
    }

    /// The prompt of a language model, where nothing but its `model_type` asked for it.
    #[must_use]
    pub fn assumed_prompt(&self) -> Option<&'static TokenPrompt> {
        self.assumed
    }

    /// Whether it is a decoder of which nothing says what stands around a pair: query and document are
    /// put together as they are, which is hardly what it was trained with.
    #[must_use]
    pub fn is_bare(&self) -> bool {
        self.is_bare
    }

    /// One score per `(query, document)` pair, in the order of the input: a sigmoid in `(0, 1)`
    /// when `options.normalize`, else the logit. Pairs are sorted by length inside, so that a
    /// batch holds texts of like size; a pair's score does not depend on its neighbours.
    ///
    /// # Errors
    /// [`Error::Usage`] for options that cannot work; [`Error::Torch`] when a batch does not fit;
    /// [`Error::Training`] for a score that is not finite.
    pub fn compute_score<Q: AsRef<str>, D: AsRef<str>>(
        &self,
        pairs: &[(Q, D)],
        options: &ScoreOptions,
    ) -> Result<Vec<f32>> {
        let max_len = self.checked_max_len(options.max_len)?;
        let encoded = pairs
            .iter()
            .map(|(q, d)| self.tokenizer.encode_pair(q.as_ref(), d.as_ref(), max_len))
            .collect::<Result<Vec<_>>>()?;
        let logits = self.finish(self.starter(options.batch_size)?.start(encoded))?;
        Ok(if options.normalize { logits.into_iter().map(sigmoid).collect() } else { logits })
    }

    /// What scores depend on besides the pair and `max_len`: weights, configuration, tokenizer and
    /// the texts around a pair. Equal for equal models, wherever they lie.
    ///
    /// # Errors
    /// [`Error::Training`] when the tokenizer refuses a text.
    pub fn identity(&self) -> Result<Value> {
        let weights = self.engine.units().iter().map(FlatUnit::fingerprint);
        // Holds the template's tokens, and those of a prompt.
        let sample = self.tokenizer.encode_pair("a query", "a document", self.positions)?;
        let mut identity = json!({
            "weights": format!("{:016x}", weights.fold(0, i64::wrapping_add)),
            "config": format!("{:08x}", crc32fast::hash(self.config.raw.to_string().as_bytes())),
            "tokenizer": format!("{:016x}", self.tokenizer.fingerprint()),
            "sample": sample.input_ids,
        });
        if self.precision != Precision::Fp32 {
            identity["precision"] = json!(self.precision);
        }
        Ok(identity)
    }

    /// The tokenizer, shared with background threads.
    pub(crate) fn tokenizer(&self) -> Arc<PairTokenizer> {
        Arc::clone(&self.tokenizer)
    }

    /// `max_len` as asked for, or the model's own.
    pub(crate) fn checked_max_len(&self, asked: Option<usize>) -> Result<usize> {
        let max_len = asked.unwrap_or(self.max_len);
        check_max_len(max_len, &self.tokenizer, self.positions)?;
        Ok(max_len)
    }

    /// What begins to score pairs, for any thread to use.
    ///
    /// # Errors
    /// [`Error::Usage`] for a batch of no `pairs`; as [`Crew::new`].
    fn starter(&self, pairs: usize) -> Result<Starter> {
        if pairs == 0 {
            return Err(Error::Usage("the batch size is 0, expected at least 1".into()));
        }
        let tokens = match self.engine.device() {
            Device::Cpu => BATCH_TOKENS_CPU,
            _ => BATCH_TOKENS_GPU,
        };
        if self.crew.get().is_none() {
            let crew = self.make_crew()?;
            self.crew.get_or_init(|| crew);
        }
        let crew = self.crew.get().cloned().flatten();
        Ok(Starter::new(crew, BatchLimits { pairs, tokens }))
    }

    /// The threads that score batches side by side: on the CPU, where libtorch may use several.
    fn make_crew(&self) -> Result<Option<Arc<Crew>>> {
        let threads = tch::get_num_threads();
        if threads < 2 || self.engine.device() != Device::Cpu {
            return Ok(None);
        }
        let readers = (0..threads).map(|_| self.engine.reader(&self.config));
        Ok(Some(Arc::new(Crew::new(readers.collect::<Result<_>>()?)?)))
    }

    /// Logits of the pairs of `work`, in their order; all are finite.
    fn finish(&self, work: Work) -> Result<Vec<f32>> {
        let (pairs, logits) = match work {
            Work::Under(flight) => flight.wait()?,
            Work::Ahead(pairs, limits) => {
                let logits = self.score_encoded(&pairs, limits)?;
                (pairs, logits)
            }
        };
        match logits.iter().position(|logit| !logit.is_finite()) {
            Some(at) => Err(self.not_finite(logits[at], &pairs[at])),
            None => Ok(logits),
        }
    }

    /// Logits of tokenized pairs, in their order.
    fn score_encoded(&self, pairs: &[EncodedPair], limits: BatchLimits) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; pairs.len()];
        for batch in batches(pairs, limits) {
            let scores = score_tokens(&self.engine, &batch.tokens, &self.groups)?;
            for (place, score) in batch.places.into_iter().zip(scores) {
                logits[place] = score;
            }
        }
        Ok(logits)
    }

    /// JSON has no NaN, and a ranking no place for it: better no scores than such.
    fn not_finite(&self, logit: f32, pair: &EncodedPair) -> Error {
        let text: String =
            self.tokenizer.decode(&pair.input_ids).chars().take(SHOWN_CHARS).collect();
        let tokens = pair.input_ids.len();
        Error::Training(format!(
            "the model's score is {logit} for the {tokens} tokens that begin with {text:?}, expected a \
             finite number; look for such numbers in its weights, or score in a wider precision"
        ))
    }
}

/// A model of which all but the weights has been read.
struct Opened {
    config: ModelConfig,
    weights: WeightFiles,
    form: Form,
    initialised: Vec<String>,
}

impl Opened {
    fn new(dir: &Path, options: LoadOptions<'_>) -> Result<Self> {
        let name = dir.to_str().ok_or_else(|| {
            Error::Usage(format!("the model's path {} is not UTF-8, expected UTF-8", dir.display()))
        })?;
        let Pretrained { dir, mut config, weights, .. } = Pretrained::open(name)?;
        let LoadOptions { prompt, texts, .. } = options;
        let form = Form::of_dir(&dir, &mut config, &weights, prompt, texts)?;
        let initialised = check_model(&dir, &config, &weights, &form.tokenizer)?;
        Ok(Self { config, weights, form, initialised })
    }
}

/// Refuses a `max_len` that leaves no room for a text, or is beyond the model's positions.
fn check_max_len(max_len: usize, tokenizer: &PairTokenizer, positions: usize) -> Result<()> {
    tokenizer.check_max_len(max_len)?;
    if max_len <= positions {
        return Ok(());
    }
    let message = format!("max_len {max_len} is more than the model's {positions} positions");
    Err(Error::Usage(message))
}

/// Checks that the weights and the tokenizer fit the configuration; returns the names of
/// parameters that will be initialised.
///
/// # Errors
/// [`Error::File`] that names the tensor or the tokenizer.
pub fn check_model(
    dir: &Path,
    config: &ModelConfig,
    weights: &WeightFiles,
    tokenizer: &PairTokenizer,
) -> Result<Vec<String>> {
    let parameters: Vec<_> =
        crate::model::stages(config).iter().flat_map(|stage| stage.parameters()).collect();
    let initialised = weights
        .check(parameters.iter().flat_map(|p| &p.parts))
        .map_err(|error| several_labels(dir, config, weights, &parameters).unwrap_or(error))?;
    let vocabulary = config.vocab_size();
    if tokenizer.max_token_id() as usize >= vocabulary {
        return Err(Error::File {
            path: dir.join("tokenizer.json"),
            message: format!(
                "token id {} does not fit the model's vocabulary of {vocabulary}",
                tokenizer.max_token_id()
            ),
        });
    }
    if let Some(segments) = config.segments()
        && tokenizer.max_type_id() as usize >= segments
    {
        return Err(Error::File {
            path: dir.join("tokenizer.json"),
            message: format!(
                "its pair template uses segment {}, but config.json has type_vocab_size {segments}",
                tokenizer.max_type_id()
            ),
        });
    }
    Ok(initialised)
}

/// What is wrong with a model for several classes, whose head gives a number for each.
fn several_labels(
    dir: &Path,
    config: &ModelConfig,
    weights: &WeightFiles,
    parameters: &[Parameter],
) -> Option<Error> {
    let names =
        config.raw.get("id2label").and_then(Value::as_object).map(|names| names.len() as i64);
    let count = config.raw.get("num_labels").and_then(Value::as_i64);
    // Two are not written down: they are what transformers takes where nothing is said.
    let labels = Some(names.or(count).unwrap_or(2)).filter(|&labels| labels > 1)?;
    let heads = ["classifier.weight", "classifier.out_proj.weight", "score.weight"];
    let mut parts = parameters.iter().flat_map(|parameter| &parameter.parts);
    let head = parts.find(|part| heads.contains(&part.name.as_str()))?;
    let shape: Vec<i64> =
        std::iter::once(labels).chain(head.shape.iter().skip(1).copied()).collect();
    weights.check(std::iter::once(&TensorSpec::new(head.name.as_str(), &shape))).ok()?;
    Some(Error::File {
        path: dir.join("config.json"),
        message: format!(
            "a classifier with {labels} labels, whose {} gives a number for each; expected a model with \
             one, or, to be trained, one without a head, as the model that it was made of",
            head.name
        ),
    })
}

/// Logits of a packed batch, on the host; every rank calls it as often ([`Engine::score`]).
///
/// # Errors
/// [`Error::Torch`] when the batch does not fit, [`Error::Comm`] from the communicator.
pub fn score_tokens(engine: &Engine, tokens: &TokenBatch, groups: &Groups) -> Result<Vec<f32>> {
    host_scores(&engine.score(&pack(tokens, engine.device())?, groups)?, tokens.len())
}

/// The `count` scores of a batch, on the host.
fn host_scores(scores: &Tensor, count: usize) -> Result<Vec<f32>> {
    let mut host = vec![0.0; count];
    scores.f_to_kind(Kind::Float)?.f_contiguous()?.f_copy_data(&mut host, count)?;
    Ok(host)
}

/// A tokenized batch on the device.
///
/// # Errors
/// [`Error::Torch`] when the device has no room.
pub fn pack(tokens: &TokenBatch, device: Device) -> Result<PackedBatch> {
    let cu_seqlens: Vec<i64> = tokens.cu_seqlens.iter().copied().map(i64::from).collect();
    PackedBatch::new(&tokens.input_ids, &tokens.position_ids, &tokens.type_ids, &cu_seqlens, device)
}

/// The logistic function.
#[must_use]
pub fn sigmoid(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}
