//! Lines to records with their texts as they will be kept, in background threads.

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hasher as _};
use std::io::BufRead;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use super::lines::{Line, Lines, too_long};
use super::record::{LabelRule, Record, RecordError, form, parse_object, parse_record};
use super::report::DropReason;
use super::store::Form;
use super::{DatasetKind, RecordForm, estimated_tokens};
use crate::error::{Error, Result};

/// Turns texts into tokens while a file is loaded.
pub trait Encode: fmt::Debug + Send + Sync {
    /// The tokens of a query, formatted and without special tokens.
    ///
    /// # Errors
    /// When the text cannot be tokenized.
    fn query(&self, text: &str) -> Result<Vec<u32>>;

    /// The tokens of a document, formatted and without special tokens.
    ///
    /// # Errors
    /// When the text cannot be tokenized.
    fn document(&self, text: &str) -> Result<Vec<u32>>;

    /// The largest id that it can give.
    fn max_id(&self) -> u32;

    /// Another one wherever a text could come out as other tokens.
    fn fingerprint(&self) -> u64;
}

/// How the texts of a data set are kept.
#[derive(Debug, Clone)]
pub(super) struct Encoder {
    /// Texts stay texts without it.
    tokenizer: Option<Arc<dyn Encode>>,
    /// The forms of queries and of documents.
    pub(super) forms: [Form; 2],
}

impl Encoder {
    /// Keeps texts as they are.
    pub(super) fn texts() -> Self {
        Self { tokenizer: None, forms: [Form::Text; 2] }
    }

    /// Keeps tokens; documents stay texts where they change before each use.
    pub(super) fn tokens(tokenizer: Arc<dyn Encode>, document_texts: bool) -> Self {
        let tokens = Form::of_tokens(tokenizer.max_id());
        let forms = [tokens, if document_texts { Form::Text } else { tokens }];
        Self { tokenizer: Some(tokenizer), forms }
    }

    /// Whether it has more to do than to copy.
    pub(super) fn tokenizes(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// Appends a query as it is kept.
    fn put_query(&self, text: &str, out: &mut Vec<u8>) -> Result<()> {
        match (&self.tokenizer, self.forms) {
            (Some(tokenizer), [form, _]) => form.put_tokens(&tokenizer.query(text)?, out),
            (None, _) => out.extend_from_slice(text.as_bytes()),
        }
        Ok(())
    }

    /// Appends a document as it is kept.
    fn put_document(&self, text: &str, out: &mut Vec<u8>) -> Result<()> {
        match (&self.tokenizer, self.forms) {
            (_, [_, Form::Text]) | (None, _) => out.extend_from_slice(text.as_bytes()),
            (Some(tokenizer), [_, form]) => form.put_tokens(&tokenizer.document(text)?, out),
        }
        Ok(())
    }
}

/// Stands for a query: equal for equal texts, and for no others as far as 96 bits of hash can tell
/// them apart (one chance in 10¹⁵ at ten million queries).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct QueryKey([u32; 3]);

impl QueryKey {
    pub(crate) fn of(text: &str) -> Self {
        let hash = |salt: u8| {
            let mut hasher = DefaultHasher::new();
            hasher.write_u8(salt);
            hasher.write(text.as_bytes());
            hasher.finish()
        };
        let (a, b) = (hash(0), hash(1));
        Self([a as u32, (a >> 32) as u32, b as u32])
    }

    /// One of `count` parts that keys fall into evenly.
    pub(super) fn part(self, count: usize) -> usize {
        self.0[2] as usize % count
    }
}

/// A query or a document on its way into the data set.
pub(super) struct Piece {
    /// Where it stands in the texts of its batch.
    pub(super) place: Range<usize>,
    /// Its estimated tokens.
    pub(super) estimate: u32,
}

/// A record as it will be kept.
pub(super) struct EncodedRecord {
    pub(super) key: QueryKey,
    pub(super) query: Piece,
    pub(super) documents: Vec<(Piece, f32)>,
    /// One `"content"` rather than a list.
    pub(super) is_single: bool,
    /// Its documents come with labels that were not written but taken from the label range.
    pub(super) implied_labels: bool,
    pub(super) empty_documents: usize,
    pub(super) repeated_documents: usize,
}

/// Why a line gave no record.
pub(super) enum LineError {
    /// It is bad, and is counted or ends the load.
    Bad(RecordError),
    /// Its text cannot be encoded.
    Failed(Error),
}

/// Lines that go to a worker together.
pub(super) struct LineBatch {
    bytes: Vec<u8>,
    /// Their one-based numbers and places in `bytes`; no place for a line that was too long.
    lines: Vec<(u32, Option<Range<usize>>)>,
    /// `None` until a record has shown what the file holds.
    rule: Option<Arc<LabelRule>>,
}

/// What a worker makes of a [`LineBatch`].
pub(super) struct RecordBatch {
    /// All texts of the batch, in the forms in which they are kept.
    pub(super) texts: Vec<u8>,
    /// Line numbers with records.
    pub(super) records: Vec<(u32, Result<EncodedRecord, LineError>)>,
    /// How the records are used; `None` until a record has shown it.
    pub(super) kind: Option<DatasetKind>,
}

/// Reads lines in batches; the first usable record decides how labels are read, if nothing else
/// does.
pub(super) struct LineBatches<R> {
    pub(super) lines: Lines<R>,
    pub(super) path: PathBuf,
    /// The rule for a file whose first record is of this form.
    pub(super) rule_for: Box<dyn Fn(RecordForm) -> LabelRule + Send>,
    pub(super) rule: Option<Arc<LabelRule>>,
}

/// Enough for a worker to be busy for some milliseconds.
const BATCH_BYTES: usize = 1 << 16;

impl<R: BufRead> Iterator for LineBatches<R> {
    type Item = Result<LineBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut batch = LineBatch { bytes: Vec::new(), lines: Vec::new(), rule: None };
        while batch.bytes.len() < BATCH_BYTES {
            let number = self.lines.number();
            match self.lines.next() {
                Err(source) => {
                    let message = format!("cannot read on after line {number}: {source}");
                    // What was read before it has its say first.
                    if batch.lines.is_empty() {
                        return Some(Err(Error::File { path: self.path.clone(), message }));
                    }
                    break;
                }
                Ok(None) => break,
                Ok(Some(Line::TooLong)) => batch.lines.push((number + 1, None)),
                Ok(Some(Line::Bytes(bytes))) if bytes.trim_ascii().is_empty() => {}
                Ok(Some(Line::Bytes(bytes))) => {
                    if self.rule.is_none() {
                        let form = parse_object(bytes).ok().as_ref().and_then(form);
                        self.rule = form.map(|form| Arc::new((self.rule_for)(form)));
                    }
                    let start = batch.bytes.len();
                    batch.bytes.extend_from_slice(bytes);
                    batch.lines.push((number + 1, Some(start..batch.bytes.len())));
                }
            }
        }
        batch.rule.clone_from(&self.rule);
        (!batch.lines.is_empty()).then_some(Ok(batch))
    }
}

impl LineBatch {
    /// Parses and encodes all lines. After a text that cannot be encoded it ends.
    pub(super) fn encode(self, encoder: &Encoder, fallback: &LabelRule) -> RecordBatch {
        // A file that has shown no kind yet has no documents: the error is the same for either.
        let rule = self.rule.as_deref().unwrap_or(fallback);
        let mut out = RecordBatch {
            texts: Vec::with_capacity(self.bytes.len()),
            records: Vec::with_capacity(self.lines.len()),
            kind: self.rule.as_ref().map(|rule| rule.kind),
        };
        let mut last_query: Option<(String, Range<usize>)> = None;
        for (number, place) in self.lines {
            let parsed = match place {
                Some(place) => {
                    parse_object(&self.bytes[place]).and_then(|object| parse_record(&object, rule))
                }
                None => Err(RecordError { reason: DropReason::LineTooLong, message: too_long() }),
            };
            let outcome = match parsed {
                Ok(record) => encode(record, encoder, &mut out.texts, &mut last_query)
                    .map_err(LineError::Failed),
                Err(error) => Err(LineError::Bad(error)),
            };
            let failed = matches!(outcome, Err(LineError::Failed(_)));
            out.records.push((number, outcome));
            if failed {
                break;
            }
        }
        out
    }
}

fn encode(
    record: Record,
    encoder: &Encoder,
    texts: &mut Vec<u8>,
    last_query: &mut Option<(String, Range<usize>)>,
) -> Result<EncodedRecord> {
    let Record { query, documents, form, implied_labels } = record;
    let key = QueryKey::of(&query);
    let query_estimate = estimated_tokens(&query) as u32;
    // Pointwise records of a query often stand together.
    let place = match last_query {
        Some((text, place)) if *text == query => place.clone(),
        _ => {
            let start = texts.len();
            encoder.put_query(&query, texts)?;
            start..texts.len()
        }
    };
    *last_query = Some((query, place.clone()));
    let empty_documents = documents.iter().filter(|(text, _)| text.is_empty()).count();
    let repeated_documents = repeated(&documents);
    let encode_document = |(text, label): (Box<str>, f64)| {
        let start = texts.len();
        encoder.put_document(&text, texts)?;
        let estimate = estimated_tokens(&text) as u32;
        Ok((Piece { place: start..texts.len(), estimate }, label as f32))
    };
    let documents = documents.into_iter().map(encode_document).collect::<Result<_>>()?;
    Ok(EncodedRecord {
        key,
        query: Piece { place, estimate: query_estimate },
        documents,
        is_single: form == RecordForm::Pointwise,
        implied_labels,
        empty_documents,
        repeated_documents,
    })
}

/// How many documents of a record stand in it before, with another label.
fn repeated(documents: &[(Box<str>, f64)]) -> usize {
    let mut labels = HashMap::new();
    let mut count = 0;
    for (text, label) in documents.iter().filter(|_| documents.len() > 1) {
        count += usize::from(labels.insert(text, label).is_some_and(|before| before != label));
    }
    count
}
