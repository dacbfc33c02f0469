//! Records as they are written, one at a time, whatever their form.

use std::fmt;
use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::DatasetKind;
use super::lines::{Line, Lines, too_long};
use super::record::{LabelRule, Record, is_absent, parse_object, parse_record};
use crate::config::LabelRange;
use crate::error::{Error, Result};

/// The forms of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RecordForm {
    /// `{"query", "content", "label"}`.
    Pointwise,
    /// `{"query", "hits": [{"content", "label"}]}`.
    Grouped,
    /// `{"query", "pos", "neg"}` with `"pos_scores"` and `"neg_scores"` where there are any.
    PosNeg,
}

impl fmt::Display for RecordForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pointwise => "pointwise",
            Self::Grouped => "grouped",
            Self::PosNeg => "pos/neg",
        })
    }
}

/// A record of any form.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceRecord {
    /// One-based line.
    pub line: u32,
    /// How it was written.
    pub form: RecordForm,
    /// Stripped, never empty.
    pub query: String,
    /// Stripped documents with their labels as they are written, at least one; of a pos/neg record
    /// the positives first.
    pub documents: Vec<(Box<str>, f64)>,
    /// How many of a pos/neg record's documents are positives; 0 for other forms.
    pub positives: usize,
    /// Keys that are no part of the form, such as `"id"` or `"hits[3].id"`.
    pub other_keys: Vec<String>,
}

/// Reads records one line at a time; blank lines are skipped. After an error it ends.
pub struct SourceRecords {
    lines: Lines<Box<dyn BufRead + Send>>,
    path: PathBuf,
    rule: LabelRule,
    failed: bool,
}

impl SourceRecords {
    /// Records of a plain, gzip or zstd file. `label_key` is the key of the labels, `range` those of
    /// positives and negatives without scores.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened.
    pub fn open(path: &Path, label_key: &str, range: LabelRange) -> Result<Self> {
        Ok(Self::new(Lines::open(path)?.0, path, label_key, range))
    }

    /// Records of any input, plain or compressed; `name` stands for it in errors.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read.
    pub fn from_reader(
        reader: impl Read + Send + 'static,
        name: &Path,
        label_key: &str,
        range: LabelRange,
    ) -> Result<Self> {
        let io = |source| Error::Io { path: name.to_owned(), action: "read", source };
        Ok(Self::new(Lines::from_reader(reader).map_err(io)?, name, label_key, range))
    }

    fn new(
        lines: Lines<Box<dyn BufRead + Send>>,
        path: &Path,
        label_key: &str,
        LabelRange { min, max }: LabelRange,
    ) -> Self {
        // Labels of grouped data are kept as they are.
        let rule =
            LabelRule { key: Some(label_key.to_owned()), kind: DatasetKind::Grouped, min, max };
        Self { lines, path: path.to_owned(), rule, failed: false }
    }

    /// What it reads, for errors.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn next_record(&mut self) -> Result<Option<SourceRecord>> {
        loop {
            let before = self.lines.number();
            let line = self.lines.next().map_err(|source| Error::File {
                path: self.path.clone(),
                message: format!("cannot read on after line {before}: {source}"),
            })?;
            let number = before + 1;
            let parsed = match line {
                None => return Ok(None),
                Some(Line::Bytes(bytes)) if bytes.trim_ascii().is_empty() => continue,
                Some(Line::Bytes(bytes)) => parse_object(bytes)
                    .and_then(|object| Ok((parse_record(&object, &self.rule)?, object)))
                    .map_err(|error| error.message),
                Some(Line::TooLong) => Err(too_long()),
            };
            return match parsed {
                Ok((record, object)) => Ok(Some(source(number, record, &object, &self.rule))),
                Err(message) => {
                    Err(Error::Data { path: self.path.clone(), line: number as usize, message })
                }
            };
        }
    }
}

impl Iterator for SourceRecords {
    type Item = Result<SourceRecord>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let record = self.next_record();
        self.failed = record.is_err();
        record.transpose()
    }
}

fn source(
    line: u32,
    record: Record,
    object: &Map<String, Value>,
    rule: &LabelRule,
) -> SourceRecord {
    let label_key = rule.key.as_deref().unwrap_or_default();
    let form = record.form;
    let known: &[&str] = match form {
        RecordForm::Pointwise => &["query", "content", label_key],
        RecordForm::Grouped => &["query", "hits"],
        RecordForm::PosNeg => &["query", "pos", "neg", "pos_scores", "neg_scores"],
    };
    let others = |object: &Map<String, Value>, known: &[&str], place: &str| -> Vec<String> {
        let others = object.keys().filter(|key| !known.contains(&key.as_str()));
        others.map(|key| format!("{place}{key}")).collect()
    };
    // Tables write the keys of all forms into every record.
    let absent = ["content", "hits", "pos", "neg", "pos_scores", "neg_scores", label_key];
    let mut other_keys = others(object, known, "");
    other_keys.retain(|key| !(absent.contains(&key.as_str()) && is_absent(&object[key])));
    let list = |key| object.get(key).and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    if form == RecordForm::Grouped {
        for (i, hit) in list("hits").iter().enumerate() {
            let hit = hit.as_object().into_iter();
            other_keys.extend(
                hit.flat_map(|hit| others(hit, &["content", label_key], &format!("hits[{i}]."))),
            );
        }
    }
    let positives = if form == RecordForm::PosNeg { list("pos").len() } else { 0 };
    let Record { query, documents, .. } = record;
    SourceRecord { line, form, query, documents, positives, other_keys }
}
