//! What a model reads: the texts around a pair, or the prompt of a language model.

use std::path::Path;

use serde_json::Value;

use crate::checkpoint::Sidecar;
use crate::config::ModelKind;
use crate::error::{Error, Result};
use crate::model::config::ScoreHead;
use crate::model::weights::WeightFiles;
use crate::model::{ModelConfig, Trunk};
use crate::text::{DecoderTemplate, PairTokenizer, TextFormat, TokenPrompt, model_max_length};

/// What sentence-transformers saves beside a model.
const SENTENCE_TRANSFORMERS: &str = "config_sentence_transformers.json";

/// The texts around query and document, as a configuration or `reranker.json` gives them.
#[derive(Debug, Clone, Copy)]
pub struct PairTexts<'a> {
    /// The query goes where `{}` stands.
    pub query_format: &'a str,
    /// The document goes where `{}` stands.
    pub document_format: &'a str,
    /// Between query and document; decoders only.
    pub seq: &'a str,
    /// After the document; decoders only.
    pub special_token: &'a str,
}

impl Default for PairTexts<'_> {
    /// Query and document as they are.
    fn default() -> Self {
        Self { query_format: "{}", document_format: "{}", seq: "", special_token: "" }
    }
}

impl PairTexts<'_> {
    /// The tokenizer in `dir`, of a model of `config`, with these texts.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] about the tokenizer, [`Error::Usage`] about a format.
    pub fn tokenizer(&self, dir: &Path, config: &ModelConfig) -> Result<PairTokenizer> {
        let query_format = TextFormat::parse(self.query_format, "query_format")?;
        let document_format = TextFormat::parse(self.document_format, "document_format")?;
        match config.kind() {
            ModelKind::BertEncoder => Ok(PairTokenizer::from_dir(dir, &config.raw)?
                .with_formats(query_format, document_format)),
            ModelKind::LlmDecoder => {
                let (seq, special_token) = (self.seq.to_owned(), self.special_token.to_owned());
                let template =
                    DecoderTemplate { query_format, seq, document_format, special_token };
                PairTokenizer::from_dir_for_decoder(dir, &config.raw, &template)
            }
        }
    }
}

/// The texts around query and document that are asked for in place of the model's own; `None` leaves
/// those.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GivenTexts<'a> {
    /// The query goes where `{}` stands.
    pub query_format: Option<&'a str>,
    /// The document goes where `{}` stands.
    pub document_format: Option<&'a str>,
    /// Between query and document; decoders only.
    pub seq: Option<&'a str>,
    /// After the document; decoders only.
    pub special_token: Option<&'a str>,
}

impl<'a> GivenTexts<'a> {
    /// The model's own texts where nothing else is asked for.
    fn over(self, own: PairTexts<'a>) -> PairTexts<'a> {
        PairTexts {
            query_format: self.query_format.unwrap_or(own.query_format),
            document_format: self.document_format.unwrap_or(own.document_format),
            seq: self.seq.unwrap_or(own.seq),
            special_token: self.special_token.unwrap_or(own.special_token),
        }
    }

    /// The option of the first text that is asked for.
    fn first(self) -> Option<&'static str> {
        let formats =
            [("--query-format", self.query_format), ("--document-format", self.document_format)];
        let asked = formats.into_iter().find_map(|(option, text)| text.map(|_| option));
        asked.or_else(|| self.first_for_decoders())
    }

    /// The same of those that an encoder has no place for.
    fn first_for_decoders(self) -> Option<&'static str> {
        let texts = [("--seq", self.seq), ("--special-token", self.special_token)];
        texts.into_iter().find_map(|(option, text)| text.map(|_| option))
    }
}

/// How a model directory is to be scored with.
pub(super) struct Form {
    pub(super) tokenizer: PairTokenizer,
    /// The most tokens of a pair when nothing else is asked for.
    pub(super) max_len: Option<usize>,
    /// The prompt that was found by the model's type alone.
    pub(super) assumed: Option<&'static TokenPrompt>,
    /// A decoder of which nothing says what stands around a pair.
    pub(super) is_bare: bool,
}

impl Form {
    /// Decides it from `dir`: by `reranker.json` where there is one, by the prompt of a language
    /// model without a score head, else by what transformers and sentence-transformers say. A prompt also
    /// sets the head of `config`.
    ///
    /// # Errors
    /// [`Error::Usage`] for a prompt or a text that is not known or not needed; [`Error::File`] for a
    /// language model of which no prompt is known.
    pub(super) fn of_dir(
        dir: &Path,
        config: &mut ModelConfig,
        weights: &WeightFiles,
        prompt: Option<&str>,
        given: GivenTexts<'_>,
    ) -> Result<Self> {
        let sidecar = Sidecar::from_dir(dir)?;
        let kept = sidecar.as_ref().and_then(|sidecar| sidecar.prompt.as_deref());
        let asked = prompt.or(kept).map(named).transpose()?;
        if !is_language_model(config, weights) {
            if let Some(prompt) = asked {
                return Err(Error::Usage(format!(
                    "--prompt {} is for a language model without score.weight, but {} is no such \
                     model",
                    prompt.name,
                    dir.display()
                )));
            }
            return Self::of_texts(dir, config, sidecar.as_ref(), given);
        }
        let known = TokenPrompt::of_model_type(&config.model_type);
        let prompt = asked.or(known).ok_or_else(|| Error::File {
            path: dir.to_owned(),
            message: format!(
                "a language model without score.weight; to score by the logit of a token, pass \
                 --prompt {}; to give it a head, train it",
                TokenPrompt::names().join(" or --prompt ")
            ),
        })?;
        if let Some(option) = given.first() {
            return Err(Error::Usage(format!(
                "{option} does not go with {}, a language model without score.weight that is asked by \
                 the prompt {}",
                dir.display(),
                prompt.name
            )));
        }
        let (tokenizer, positive, negative) =
            PairTokenizer::from_dir_for_prompt(dir, &config.raw, prompt)?;
        if let Trunk::Decoder(decoder) = &mut config.trunk {
            decoder.head = ScoreHead::TokenLogit {
                positive: positive.into(),
                negative: negative.map(i64::from),
            };
        }
        let assumed = asked.is_none().then_some(prompt);
        let max_len = sidecar.map_or(prompt.max_len, |sidecar| sidecar.max_len);
        Ok(Self { tokenizer, max_len: Some(max_len), assumed, is_bare: false })
    }

    /// The form of a model with a head.
    fn of_texts(
        dir: &Path,
        config: &ModelConfig,
        sidecar: Option<&Sidecar>,
        given: GivenTexts<'_>,
    ) -> Result<Self> {
        let kind = config.kind();
        if let (ModelKind::BertEncoder, Some(option)) = (kind, given.first_for_decoders()) {
            return Err(Error::Usage(format!(
                "{option} is for decoders, but {} is an encoder",
                dir.display()
            )));
        }
        let default_prompt = if sidecar.is_none() { default_prompt(dir)? } else { None };
        let own = match sidecar {
            Some(sidecar) => PairTexts {
                query_format: &sidecar.query_format,
                document_format: &sidecar.document_format,
                seq: &sidecar.seq,
                special_token: &sidecar.special_token,
            },
            None => PairTexts {
                query_format: default_prompt.as_deref().unwrap_or("{}"),
                ..PairTexts::default()
            },
        };
        let tokenizer = given.over(own).tokenizer(dir, config)?;
        let max_len = match sidecar {
            Some(sidecar) => Some(sidecar.max_len),
            None => model_max_length(dir)?,
        };
        let says_nothing = sidecar.is_none() && given.first().is_none();
        let is_bare = says_nothing && kind == ModelKind::LlmDecoder;
        Ok(Self { tokenizer, max_len, assumed: None, is_bare })
    }
}

/// What sentence-transformers puts before every query of the cross-encoder in `dir`, as a format.
fn default_prompt(dir: &Path) -> Result<Option<String>> {
    let path = dir.join(SENTENCE_TRANSFORMERS);
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::Io { path, action: "read", source }),
    };
    let wrong = |message: String| Error::File { path: path.clone(), message };
    let config: Value =
        serde_json::from_str(&text).map_err(|error| wrong(format!("not valid JSON: {error}")))?;
    // What is saved of an embedding model says nothing of a cross-encoder that is made of it.
    let name = config["default_prompt_name"].as_str();
    let Some(name) = name.filter(|_| config["model_type"] == "CrossEncoder") else {
        return Ok(None);
    };
    match &config["prompts"][name] {
        Value::String(prompt) => Ok(Some(prompt.replace('{', "{{").replace('}', "}}") + "{}")),
        _ => Err(wrong(format!("its default_prompt_name {name:?} is none of its prompts"))),
    }
}

fn named(name: &str) -> Result<&'static TokenPrompt> {
    TokenPrompt::named(name).ok_or_else(|| {
        let known = TokenPrompt::names().join(" or ");
        Error::Usage(format!("--prompt {name:?} is not known, expected {known}"))
    })
}

/// A decoder that was saved with its language model's head and no other.
fn is_language_model(config: &ModelConfig, weights: &WeightFiles) -> bool {
    let architectures = config.raw.get("architectures").and_then(Value::as_array);
    let causal = architectures.is_some_and(|all| {
        all.iter().filter_map(Value::as_str).any(|name| name.ends_with("ForCausalLM"))
    });
    config.kind() == ModelKind::LlmDecoder && causal && !weights.contains("score.weight")
}
