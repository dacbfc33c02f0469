//! Conversion between the forms of records: pointwise, grouped, pos/neg; and of adapters to models.
//!
//! One record at a time, in the order of the input. Texts are stripped, as training strips them;
//! labels stay the numbers that they are. What the target form cannot hold is refused.

mod merge;
mod output;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt::{self, Write as _};
use std::path::PathBuf;

use serde_json::Value;

use crate::config::LabelRange;
use crate::data::{QueryKey, RecordForm, SourceRecord, SourceRecords};
use crate::error::{Error, Result};

pub use merge::merge;
pub use output::{Compression, Output};

/// How to convert.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvertOptions {
    /// The form of the output.
    pub to: RecordForm,
    /// The key of labels, in the input and in the output.
    pub label_key: String,
    /// The labels of positives (`max`) and negatives (`min`) without scores.
    pub labels: LabelRange,
    /// The least label of a positive, for pos/neg output; without it a label has to be one of the
    /// two in `labels`.
    pub positive_from: Option<f64>,
    /// Gather pointwise records by query in memory, rather than need them together in the input.
    pub gather: bool,
    /// Leave out what the target cannot hold, and count it.
    pub lossy: bool,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertReport {
    /// The form of the output.
    pub to: RecordForm,
    /// Records read.
    pub read: usize,
    /// Records written.
    pub written: usize,
    /// Documents in them, as many as were read.
    pub documents: usize,
    /// Keys left out, because `lossy` was set.
    pub keys_left_out: usize,
    /// Groups that can no longer be told from others of the same query, for the same reason.
    pub groups_merged: usize,
}

impl fmt::Display for ConvertReport {
    /// One line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { to, read, written, documents, keys_left_out, groups_merged } = self;
        write!(f, "read {read} records, wrote {written} {to} records with {documents} documents")?;
        if *keys_left_out > 0 {
            write!(f, "; left out {keys_left_out} keys that they have no place for")?;
        }
        if *groups_merged > 0 {
            write!(f, "; {groups_merged} groups share a query with an earlier one")?;
        }
        Ok(())
    }
}

/// Converts all records of `input`; `sink` takes the lines of the output, without line ends.
///
/// # Errors
/// [`Error::Data`] at the first record that is bad, or that the target form cannot hold;
/// [`Error::File`] when there are no records; what the sink reports.
pub fn convert(
    input: SourceRecords,
    options: &ConvertOptions,
    sink: &mut dyn FnMut(&str) -> Result<()>,
) -> Result<ConvertReport> {
    let path = input.path().to_owned();
    let report = ConvertReport {
        to: options.to,
        read: 0,
        written: 0,
        documents: 0,
        keys_left_out: 0,
        groups_merged: 0,
    };
    let groups = Groups::default();
    let mut converter = Converter { path: path.clone(), options, sink, groups, report };
    for record in input {
        converter.take(record?)?;
    }
    for group in std::mem::take(&mut converter.groups.open) {
        converter.emit(&group)?;
    }
    if converter.report.read == 0 {
        let message = "holds no records, expected one JSON object a line".to_owned();
        return Err(Error::File { path, message });
    }
    Ok(converter.report)
}

struct Converter<'a> {
    path: PathBuf,
    options: &'a ConvertOptions,
    sink: &'a mut dyn FnMut(&str) -> Result<()>,
    groups: Groups,
    report: ConvertReport,
}

/// Queries that were seen, and groups that may still grow.
#[derive(Default)]
struct Groups {
    /// By query: the line where it first stood, and its place in `open` if it is there.
    seen: HashMap<QueryKey, (u32, usize)>,
    /// The group of the query that is being read; all of them when gathering in memory.
    open: Vec<SourceRecord>,
}

impl Converter<'_> {
    fn take(&mut self, record: SourceRecord) -> Result<()> {
        self.report.read += 1;
        self.report.documents += record.documents.len();
        if let Some(key) = record.other_keys.first() {
            self.lossy(record.line, || {
                let to = self.options.to;
                format!("{key:?} has no place in {to} records; pass --lossy to leave such keys out")
            })?;
            self.report.keys_left_out += record.other_keys.len();
        }
        let gathers = self.options.to != RecordForm::Pointwise;
        match (record.form, gathers) {
            (RecordForm::Pointwise, true) => self.gather(record),
            (RecordForm::Pointwise, false) => self.emit(&record),
            (RecordForm::Grouped | RecordForm::PosNeg, false) => self.take_apart(&record),
            (RecordForm::Grouped | RecordForm::PosNeg, true) => {
                if !self.options.gather {
                    self.close()?;
                    return self.emit(&record);
                }
                // It keeps its place among the groups that wait, and does not grow.
                self.groups.open.push(record);
                Ok(())
            }
        }
    }

    /// An error at `line` unless losses are accepted.
    fn lossy(&self, line: u32, message: impl FnOnce() -> String) -> Result<()> {
        if self.options.lossy { Ok(()) } else { Err(self.error(line, message())) }
    }

    fn error(&self, line: u32, message: String) -> Error {
        Error::Data { path: self.path.clone(), line: line as usize, message }
    }

    /// A group to single records. Two groups of one query would come back as one.
    fn take_apart(&mut self, record: &SourceRecord) -> Result<()> {
        match self.groups.seen.entry(QueryKey::of(&record.query)) {
            Entry::Vacant(entry) => {
                entry.insert((record.line, 0));
            }
            Entry::Occupied(entry) => {
                let first = entry.get().0;
                self.lossy(record.line, || {
                    format!(
                        "a second group of the query in line {first}: pointwise records of the two \
                         could not be told apart; pass --lossy to accept that"
                    )
                })?;
                self.report.groups_merged += 1;
            }
        }
        self.emit(record)
    }

    /// A single record into the group of its query.
    fn gather(&mut self, record: SourceRecord) -> Result<()> {
        let next = if self.options.gather { self.groups.open.len() } else { 0 };
        match self.groups.seen.entry(QueryKey::of(&record.query)) {
            Entry::Vacant(entry) => {
                entry.insert((record.line, next));
                if !self.options.gather {
                    self.close()?;
                }
                self.groups.open.push(record);
            }
            Entry::Occupied(entry) => {
                let &(first, place) = entry.get();
                let open = self.groups.open.get_mut(place).filter(|group| group.line == first);
                let Some(group) = open else {
                    let message = format!(
                        "the query of line {first} comes again after others; sort the records by \
                         query, or pass --gather to gather them in memory"
                    );
                    return Err(self.error(record.line, message));
                };
                group.documents.extend(record.documents);
            }
        }
        Ok(())
    }

    /// Writes the group that was being read.
    fn close(&mut self) -> Result<()> {
        match self.groups.open.pop() {
            Some(group) => self.emit(&group),
            None => Ok(()),
        }
    }

    fn emit(&mut self, record: &SourceRecord) -> Result<()> {
        match self.options.to {
            RecordForm::Pointwise => {
                for document in &record.documents {
                    let body = self.labelled(document);
                    self.write(&format!("{{\"query\":{},{body}}}", json(&record.query)))?;
                }
                Ok(())
            }
            RecordForm::Grouped => {
                let hits: Vec<_> = record
                    .documents
                    .iter()
                    .map(|document| format!("{{{}}}", self.labelled(document)))
                    .collect();
                let (query, hits) = (json(&record.query), hits.join(","));
                self.write(&format!("{{\"query\":{query},\"hits\":[{hits}]}}"))
            }
            RecordForm::PosNeg => {
                let line = self.lists(record)?;
                self.write(&line)
            }
        }
    }

    fn write(&mut self, line: &str) -> Result<()> {
        self.report.written += 1;
        (self.sink)(line)
    }

    /// `"content":…,"label":…`.
    fn labelled(&self, (content, label): &(Box<str>, f64)) -> String {
        let key = json(&self.options.label_key);
        format!("\"content\":{},{key}:{}", json(content), number(*label))
    }

    /// A pos/neg record; with scores where the labels are not what they would be without.
    fn lists(&self, record: &SourceRecord) -> Result<String> {
        let LabelRange { min, max } = self.options.labels;
        let (mut pos, mut neg) = (Vec::new(), Vec::new());
        for (i, document) in record.documents.iter().enumerate() {
            let label = document.1;
            let positive = match self.options.positive_from {
                Some(least) => label >= least,
                None if record.form == RecordForm::PosNeg => i < record.positives,
                None if label == max || label == min => label == max,
                None => {
                    let message = format!(
                        "the label {label} is neither {max} (--max-label) nor {min} (--min-label); \
                         say from which label on a document is positive: --positive-from"
                    );
                    return Err(self.error(record.line, message));
                }
            };
            if positive { &mut pos } else { &mut neg }.push(document);
        }
        let texts = |documents: &[&(Box<str>, f64)]| {
            let texts: Vec<_> = documents.iter().map(|(text, _)| json(text)).collect();
            texts.join(",")
        };
        let mut line = format!(
            "{{\"query\":{},\"pos\":[{}],\"neg\":[{}]",
            json(&record.query),
            texts(&pos),
            texts(&neg)
        );
        for (key, documents, implied) in [("pos", &pos, max), ("neg", &neg, min)] {
            if documents.iter().any(|(_, label)| *label != implied) {
                let scores: Vec<_> = documents.iter().map(|(_, label)| number(*label)).collect();
                let _ = write!(line, ",\"{key}_scores\":[{}]", scores.join(","));
            }
        }
        Ok(line + "}")
    }
}

fn json(text: &str) -> String {
    Value::from(text).to_string()
}

/// A label as JSON: whole numbers without a point, others with the fewest digits that give the same
/// number again.
fn number(label: f64) -> String {
    // Every whole number up to here is itself in 64 bits.
    const WHOLE: f64 = 9_007_199_254_740_992.0;
    if label.fract() == 0.0 && label.abs() < WHOLE {
        return (label as i64).to_string();
    }
    Value::from(label).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back_as_they_were() {
        let labels = [0.0, 1.0, -3.0, 0.1, 0.300_000_000_000_000_04, 1e-7, 2.5e30, 1e15, -0.5];
        for label in labels {
            let text = number(label);
            let back: Value = serde_json::from_str(&text).unwrap_or_default();
            assert_eq!(back.as_f64(), Some(label), "{text}");
        }
        assert_eq!([number(2.0), number(-0.0), number(0.25)], ["2", "0", "0.25"]);
    }
}
