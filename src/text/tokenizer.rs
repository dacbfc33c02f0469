//! A query and a document to the token ids a model reads.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;

use serde_json::Value;
use tokenizers::{Encoding, Token, Tokenizer, TruncationDirection};

use super::prompt::TokenPrompt;
use super::vocab;
use crate::config::TextFormat;
use crate::data::Encode;
use crate::error::{Error, Result};

/// What was cut off to meet `max_len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Truncation {
    /// Nothing.
    None,
    /// The end of the document, or its beginning where the tokenizer's `truncation_side` is `left`.
    Document,
    /// All of the document and as much of the query.
    Query,
}

/// The input for one pair: at most `max_len` tokens, special tokens included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EncodedPair {
    /// Token ids.
    pub input_ids: Vec<u32>,
    /// Segment ids, as many; all 0 where the tokenizer tells no segments apart.
    pub type_ids: Vec<u8>,
    /// What was cut off.
    pub truncated: Truncation,
    /// The length it would have had without truncation.
    pub full_len: usize,
}

/// The texts around query and document in a decoder's input:
/// `tok(query_format(query)) + tok(seq) + tok(document_format(document)) + tok(special_token)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecoderTemplate {
    /// Around the query.
    pub query_format: TextFormat,
    /// Between the query and the document; may be empty.
    pub seq: String,
    /// Around the document.
    pub document_format: TextFormat,
    /// At the end, where the score is read; may be empty.
    pub special_token: String,
}

/// The token of a template that an input can end in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// Its id.
    pub id: u32,
    /// How the vocabulary writes it.
    pub text: String,
    /// Whether it stands behind the document, so that every input ends in it; otherwise those with an
    /// empty document do.
    pub behind_document: bool,
}

/// A part of the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Piece {
    Fixed { id: u32, type_id: u8 },
    Query { type_id: u8 },
    Document { type_id: u8 },
}

impl Piece {
    fn type_id(self) -> u8 {
        match self {
            Self::Fixed { type_id, .. } | Self::Query { type_id } | Self::Document { type_id } => {
                type_id
            }
        }
    }
}

/// A tokenizer together with the form of its pairs: an encoder's own pair template, or a
/// [`DecoderTemplate`].
///
/// Both are a row of fixed tokens with places for the query and the document. It can be shared
/// between threads, and starts none of its own.
#[derive(Debug)]
pub struct PairTokenizer {
    tokenizer: Tokenizer,
    pieces: Vec<Piece>,
    query_format: Option<TextFormat>,
    document_format: Option<TextFormat>,
    /// What stands between query and document where both are tokenized as one text, which then
    /// takes the document's place.
    joint: Option<&'static str>,
    /// Which side of a text that is too long is cut off.
    cut: TruncationDirection,
}

impl PairTokenizer {
    /// The tokenizer of an encoder's model directory (`tokenizer.json`, or a BERT `vocab.txt`),
    /// with the pair template it brings along. `model` is the model's `config.json`, which for an adapter
    /// lies in another directory: it tells the tokenizer's class where nothing else does.
    ///
    /// # Errors
    /// [`Error::File`] or [`Error::Io`] when there is none, or it cannot be used.
    pub fn from_dir(dir: &Path, model: &Value) -> Result<Self> {
        let (tokenizer, cut) = load(dir, model)?;
        let mut pieces = pair_template(&tokenizer)
            .map_err(|message| Error::File { path: dir.to_owned(), message })?;
        if !vocab::gives_type_ids(dir)? {
            for piece in &mut pieces {
                let (Piece::Fixed { type_id, .. }
                | Piece::Query { type_id }
                | Piece::Document { type_id }) = piece;
                *type_id = 0;
            }
        }
        Ok(Self { tokenizer, pieces, query_format: None, document_format: None, joint: None, cut })
    }

    /// The same with texts around every query and document.
    #[must_use]
    pub fn with_formats(mut self, query: TextFormat, document: TextFormat) -> Self {
        self.query_format = Some(query);
        self.document_format = Some(document);
        self
    }

    /// The tokenizer of a decoder's model directory with the form of its input.
    ///
    /// # Errors
    /// As [`PairTokenizer::from_dir`]; also when `seq` or `special_token` cannot be tokenized.
    pub fn from_dir_for_decoder(
        dir: &Path,
        model: &Value,
        template: &DecoderTemplate,
    ) -> Result<Self> {
        let (tokenizer, cut) = load(dir, model)?;
        let fixed = |text: &str| -> Result<Vec<Piece>> {
            let ids = ids(&tokenizer, text)?;
            Ok(ids.into_iter().map(|id| Piece::Fixed { id, type_id: 0 }).collect())
        };
        let mut pieces = vec![Piece::Query { type_id: 0 }];
        pieces.extend(fixed(&template.seq)?);
        pieces.push(Piece::Document { type_id: 0 });
        pieces.extend(fixed(&template.special_token)?);
        Ok(Self {
            tokenizer,
            pieces,
            query_format: Some(template.query_format.clone()),
            document_format: Some(template.document_format.clone()),
            joint: None,
            cut,
        })
    }

    /// The tokenizer of a language model that is asked by `prompt`, with the ids of its positive and
    /// negative answers.
    ///
    /// # Errors
    /// As [`PairTokenizer::from_dir`]; [`Error::File`] when the vocabulary lacks a token of the prompt.
    pub fn from_dir_for_prompt(
        dir: &Path,
        model: &Value,
        prompt: &TokenPrompt,
    ) -> Result<(Self, u32, Option<u32>)> {
        let (tokenizer, cut) = load(dir, model)?;
        let id = |token: &str| {
            tokenizer.token_to_id(token).ok_or_else(|| Error::File {
                path: dir.to_owned(),
                message: format!(
                    "the vocabulary has no token {token:?}, which the prompt {} needs",
                    prompt.name
                ),
            })
        };
        let fixed = |texts: &[&str]| -> Result<Vec<Piece>> {
            let mut all = Vec::new();
            for text in texts {
                all.extend(ids(&tokenizer, text)?);
            }
            Ok(all.into_iter().map(|id| Piece::Fixed { id, type_id: 0 }).collect())
        };
        let mut pieces = Vec::new();
        if let Some(first) = prompt.first_token {
            pieces.push(Piece::Fixed { id: id(first)?, type_id: 0 });
        }
        pieces.extend(fixed(prompt.before)?);
        if !prompt.joint {
            pieces.push(Piece::Query { type_id: 0 });
            pieces.extend(fixed(&[prompt.between])?);
        }
        pieces.push(Piece::Document { type_id: 0 });
        pieces.extend(fixed(prompt.after)?);
        let format = |text| TextFormat::parse(text, "prompt").map(Some);
        let (positive, negative) = (id(prompt.positive)?, prompt.negative.map(id).transpose()?);
        let (query_format, document_format) = (format(prompt.query)?, format(prompt.document)?);
        let joint = prompt.joint.then_some(prompt.between);
        let this = Self { tokenizer, pieces, query_format, document_format, joint, cut };
        Ok((this, positive, negative))
    }

    /// The input for a pair; query and document are stripped first.
    ///
    /// # Errors
    /// [`Error::Training`] when the tokenizer refuses a text.
    pub fn encode_pair(&self, query: &str, document: &str, max_len: usize) -> Result<EncodedPair> {
        if let (Some(between), Some(first), Some(second)) =
            (self.joint, &self.query_format, &self.document_format)
        {
            let text = [&first.apply(query.trim()), between, &second.apply(document.trim())];
            return Ok(self.join(&[], &ids(&self.tokenizer, &text.concat())?, max_len));
        }
        let query = self.query_ids(query)?;
        let document = self.document_ids(document)?;
        Ok(self.join(&query, &document, max_len))
    }

    /// The tokens of a query, formatted and without special tokens.
    ///
    /// # Errors
    /// [`Error::Training`] when the tokenizer refuses it.
    pub fn query_ids(&self, query: &str) -> Result<Vec<u32>> {
        self.text_ids(query, self.query_format.as_ref())
    }

    /// The tokens of a document, formatted and without special tokens.
    ///
    /// # Errors
    /// [`Error::Training`] when the tokenizer refuses it.
    pub fn document_ids(&self, document: &str) -> Result<Vec<u32>> {
        self.text_ids(document, self.document_format.as_ref())
    }

    fn text_ids(&self, text: &str, format: Option<&TextFormat>) -> Result<Vec<u32>> {
        let text = text.trim();
        match format {
            Some(format) => ids(&self.tokenizer, &format.apply(text)),
            None => ids(&self.tokenizer, text),
        }
    }

    /// Puts tokenized parts together in at most `max_len` tokens. The document is cut, at its end unless
    /// the tokenizer says otherwise; only a query that alone is too long is cut too, and then stands
    /// without a document.
    #[must_use]
    pub fn join(&self, query: &[u32], document: &[u32], max_len: usize) -> EncodedPair {
        let room = max_len.saturating_sub(self.fixed_tokens());
        let kept = |ids: &'_ [u32], room: usize| match self.cut {
            TruncationDirection::Right => 0..ids.len().min(room),
            TruncationDirection::Left => ids.len().saturating_sub(room)..ids.len(),
        };
        let kept_query = &query[kept(query, room)];
        let kept_document = &document[kept(document, room - kept_query.len())];
        let truncated = if kept_query.len() < query.len() {
            Truncation::Query
        } else if kept_document.len() < document.len() {
            Truncation::Document
        } else {
            Truncation::None
        };
        let full_len = self.fixed_tokens() + query.len() + document.len();
        let mut input_ids = Vec::with_capacity(full_len.min(max_len));
        let mut type_ids = Vec::with_capacity(full_len.min(max_len));
        for &piece in &self.pieces {
            match piece {
                Piece::Fixed { id, .. } => input_ids.push(id),
                Piece::Query { .. } => input_ids.extend_from_slice(kept_query),
                Piece::Document { .. } => input_ids.extend_from_slice(kept_document),
            }
            type_ids.resize(input_ids.len(), piece.type_id());
        }
        EncodedPair { input_ids, type_ids, truncated, full_len }
    }

    /// The tokens of the template itself, which every pair holds.
    #[must_use]
    pub fn fixed_tokens(&self) -> usize {
        self.pieces.iter().filter(|piece| matches!(piece, Piece::Fixed { .. })).count()
    }

    /// Whether `max_len` leaves room for text.
    ///
    /// # Errors
    /// [`Error::Usage`] when it does not.
    pub fn check_max_len(&self, max_len: usize) -> Result<()> {
        let fixed = self.fixed_tokens();
        if max_len >= fixed + 2 {
            return Ok(());
        }
        Err(Error::Usage(format!(
            "max_len {max_len} leaves no room for text: the template takes {fixed} tokens, \
             expected at least {}",
            fixed + 2
        )))
    }

    /// The template's own token that an input can end in; `None` where a text always ends it.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        let is_document = |piece: &Piece| matches!(piece, Piece::Document { .. });
        let behind_document = !self.pieces.last().is_some_and(is_document);
        // A document may be empty.
        match self.pieces.iter().rev().find(|piece| !is_document(piece)) {
            Some(&Piece::Fixed { id, .. }) => {
                let text = self.tokenizer.id_to_token(id).unwrap_or_default();
                Some(Ending { id, text, behind_document })
            }
            _ => None,
        }
    }

    /// A text that tokenizes to `ids`, for people to read: what the tokenizer drops is lost.
    #[must_use]
    pub fn decode(&self, ids: &[u32]) -> String {
        self.tokenizer.decode(ids, true).unwrap_or_default()
    }

    /// The largest segment id it can give; the model's segment table must be larger.
    #[must_use]
    pub fn max_type_id(&self) -> u8 {
        self.pieces.iter().map(|&piece| piece.type_id()).max().unwrap_or(0)
    }

    /// The largest token id it can give; the model's vocabulary must be larger.
    #[must_use]
    pub fn max_token_id(&self) -> u32 {
        self.tokenizer.get_vocab(true).into_values().max().unwrap_or(0)
    }
}

impl Encode for PairTokenizer {
    fn query(&self, text: &str) -> Result<Vec<u32>> {
        self.query_ids(text)
    }

    fn document(&self, text: &str) -> Result<Vec<u32>> {
        self.document_ids(text)
    }

    fn max_id(&self) -> u32 {
        self.max_token_id()
    }

    fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        // The template is not part of what is kept, so it does not matter here.
        self.tokenizer.to_string(false).unwrap_or_default().hash(&mut hasher);
        (&self.query_format, &self.document_format).hash(&mut hasher);
        if self.cut == TruncationDirection::Left {
            self.cut.as_ref().hash(&mut hasher);
        }
        hasher.finish()
    }
}

/// The id of the padding token that `tokenizer_config.json` in `dir` names, where it names one. `model` is
/// the model's `config.json`.
///
/// # Errors
/// [`Error::File`] or [`Error::Io`] when the tokenizer cannot be read.
pub fn pad_token_id(dir: &Path, model: &Value) -> Result<Option<u32>> {
    let Ok(text) = std::fs::read_to_string(dir.join("tokenizer_config.json")) else {
        return Ok(None);
    };
    let config: Value = serde_json::from_str(&text).unwrap_or_default();
    // Older files give the token with its properties.
    let token = config["pad_token"].as_str().or_else(|| config["pad_token"]["content"].as_str());
    token.map_or(Ok(None), |token| Ok(load(dir, model)?.0.token_to_id(token)))
}

fn ids(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    match tokenizer.encode_fast(text, false) {
        Ok(encoding) => Ok(encoding.get_ids().to_vec()),
        Err(error) => {
            let start: String = text.chars().take(40).collect();
            Err(Error::Training(format!("the tokenizer refuses \"{start}\": {error}")))
        }
    }
}

/// Reads `tokenizer.json`, with what `tokenizer_config.json` changes, or makes a tokenizer from a BERT
/// `vocab.txt`; truncation and padding that the file asks for are switched off. Also says which side of
/// a text is to be cut.
fn load(dir: &Path, model: &Value) -> Result<(Tokenizer, TruncationDirection)> {
    let file = dir.join("tokenizer.json");
    let mut tokenizer = if file.is_file() {
        let bytes = std::fs::read(&file).map_err(|source| Error::Io {
            path: file.clone(),
            action: "read",
            source,
        })?;
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| Error::File {
            path: file,
            message: format!("not a tokenizer: {error}"),
        })?;
        vocab::apply_settings(dir, model, &mut tokenizer)?;
        tokenizer
    } else if dir.join("vocab.txt").is_file() {
        vocab::bert_tokenizer(dir, model)?
    } else {
        let message = "no tokenizer: expected tokenizer.json (or vocab.txt, for BERT) beside the \
                       model; save_pretrained of transformers' AutoTokenizer writes it";
        return Err(Error::File { path: dir.to_owned(), message: message.to_owned() });
    };
    let own = tokenizer.get_truncation().map(|truncation| truncation.direction);
    let cut = vocab::truncation_side(dir)?.or(own).unwrap_or_default();
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| Error::File {
        path: dir.to_owned(),
        message: format!("cannot switch off the tokenizer's truncation: {error}"),
    })?;
    Ok((tokenizer, cut))
}

/// Learns the pair template from the tokenizer's post-processor, whatever its kind: it is given
/// one marker token as the query and one as the document, and what it puts around them is fixed.
fn pair_template(tokenizer: &Tokenizer) -> Result<Vec<Piece>, String> {
    const QUERY: u32 = u32::MAX - 1;
    const DOCUMENT: u32 = u32::MAX;
    let marker = |id, type_id| {
        Encoding::from_tokens(vec![Token::new(id, "marker".to_owned(), (0, 0))], type_id)
    };
    let encoding = tokenizer
        .post_process(marker(QUERY, 0), Some(marker(DOCUMENT, 1)), true)
        .map_err(|error| format!("the tokenizer has no template for pairs: {error}"))?;
    let pieces: Vec<Piece> = encoding
        .get_ids()
        .iter()
        .zip(encoding.get_type_ids())
        .map(|(&id, &type_id)| {
            let type_id = type_id as u8;
            match id {
                QUERY => Piece::Query { type_id },
                DOCUMENT => Piece::Document { type_id },
                id => Piece::Fixed { id, type_id },
            }
        })
        .collect();
    let count = |wanted: fn(&Piece) -> bool| pieces.iter().filter(|piece| wanted(piece)).count();
    let queries = count(|piece| matches!(piece, Piece::Query { .. }));
    let documents = count(|piece| matches!(piece, Piece::Document { .. }));
    if (queries, documents) != (1, 1) {
        return Err(format!(
            "the tokenizer's pair template holds {queries} queries and {documents} documents, \
             expected one of each"
        ));
    }
    Ok(pieces)
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
pub(super) mod tests;
