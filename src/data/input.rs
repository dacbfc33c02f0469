//! Pairs to score, read as they come.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use super::RecordForm;
use super::lines::{Line, Lines, too_long, utf8};
use super::record::{
    RecordError, form, is_absent, is_object, list_at, parse_object, string_at, strip, wrong_type,
};
use crate::error::{Error, Result};

/// Lines and bytes after which a chunk ends: enough to sort by length and to fill a GPU, few enough
/// to stream and to share out over ranks.
const CHUNK_LINES: usize = 512;
const CHUNK_BYTES: usize = 1 << 20;

/// How a line holds its pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputFormat {
    /// `{"query": .., "content": ..}`, or a record of several documents: `"hits"` of objects with
    /// `"content"`, or lists of texts `"pos"` and `"neg"`. Other keys, labels too, are ignored.
    JsonLines,
    /// `query<TAB>content`.
    Tsv,
}

/// A pair to score.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct InputPair {
    /// Stripped, never empty.
    pub query: String,
    /// Stripped.
    pub content: String,
}

/// Consecutive lines of an input, not yet parsed. Where chunks begin depends on the input alone.
#[derive(Debug)]
pub struct InputChunk {
    /// Number of the chunk, from 0.
    pub number: u64,
    name: Arc<Path>,
    format: InputFormat,
    /// One-based numbers of lines that are not blank, with their bytes; none where a line is too
    /// long to be read.
    lines: Vec<(u32, Option<Box<[u8]>>)>,
}

impl InputChunk {
    /// Adds its lines to a checksum.
    pub fn digest(&self, crc: &mut crc32fast::Hasher) {
        for (line, bytes) in &self.lines {
            let bytes = bytes.as_deref().unwrap_or_default();
            crc.update(&line.to_le_bytes());
            crc.update(&(bytes.len() as u64).to_le_bytes());
            crc.update(bytes);
        }
    }

    /// The pairs, in order: one for each document of each line.
    ///
    /// # Errors
    /// [`Error::Data`] with the first line that cannot be used.
    pub fn pairs(&self) -> Result<Vec<InputPair>> {
        let mut pairs = Vec::with_capacity(self.lines.len());
        for (line, bytes) in &self.lines {
            let parsed = match (bytes, self.format) {
                (None, _) => Err(too_long()),
                (Some(bytes), InputFormat::JsonLines) => json_pairs(bytes),
                (Some(bytes), InputFormat::Tsv) => tsv_pair(bytes).map(|pair| vec![pair]),
            };
            pairs.extend(parsed.map_err(|message| Error::Data {
                path: self.name.to_path_buf(),
                line: *line as usize,
                message,
            })?);
        }
        Ok(pairs)
    }
}

/// The chunks of any reader; blank lines are skipped. After an error it ends.
pub struct InputChunks<R> {
    lines: Lines<R>,
    name: Arc<Path>,
    format: InputFormat,
    number: u64,
    ended: bool,
}

impl InputChunks<Box<dyn BufRead + Send>> {
    /// Chunks of a plain, gzip or zstd file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened.
    pub fn open(path: &Path, format: InputFormat) -> Result<Self> {
        Ok(Self::over(Lines::open(path)?.0, path.into(), format))
    }

    /// Chunks of any plain, gzip or zstd input; `name` stands for it in errors, such as `<stdin>`.
    ///
    /// # Errors
    /// [`Error::Io`] when its first bytes cannot be read.
    pub fn from_reader(
        reader: impl Read + Send + 'static,
        name: impl Into<PathBuf>,
        format: InputFormat,
    ) -> Result<Self> {
        let name = name.into();
        match Lines::from_reader(reader) {
            Ok(lines) => Ok(Self::over(lines, name, format)),
            Err(source) => Err(Error::Io { path: name, action: "read", source }),
        }
    }
}

impl<R: BufRead> InputChunks<R> {
    /// Chunks of a reader; `name` stands for it in errors, such as `<stdin>`.
    pub fn new(reader: R, name: impl Into<PathBuf>, format: InputFormat) -> Self {
        Self::over(Lines::new(reader), name.into(), format)
    }

    fn over(lines: Lines<R>, name: PathBuf, format: InputFormat) -> Self {
        Self { lines, name: name.into(), format, number: 0, ended: false }
    }

    fn next_chunk(&mut self) -> Result<Option<InputChunk>> {
        let (mut lines, mut bytes) = (Vec::new(), 0);
        while lines.len() < CHUNK_LINES && bytes < CHUNK_BYTES {
            let before = self.lines.number();
            let line = self.lines.next().map_err(|source| Error::File {
                path: self.name.to_path_buf(),
                message: format!("cannot read on after line {before}: {source}"),
            })?;
            match line {
                None => break,
                Some(Line::Bytes(text)) if text.trim_ascii().is_empty() => {}
                Some(Line::Bytes(text)) => {
                    bytes += text.len();
                    lines.push((before + 1, Some(text.into())));
                }
                Some(Line::TooLong) => lines.push((before + 1, None)),
            }
        }
        let (number, name) = (self.number, Arc::clone(&self.name));
        self.number += 1;
        let chunk = InputChunk { number, name, format: self.format, lines };
        Ok((!chunk.lines.is_empty()).then_some(chunk))
    }
}

impl<R: BufRead> Iterator for InputChunks<R> {
    type Item = Result<InputChunk>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let chunk = self.next_chunk();
        self.ended = !matches!(chunk, Ok(Some(_)));
        chunk.transpose()
    }
}

fn json_pairs(line: &[u8]) -> Result<Vec<InputPair>, String> {
    let object = parse_object(line).map_err(|error| error.message)?;
    let parts = || Ok((string_at(&object, "query", "")?, documents(&object)?));
    let (query, documents) = parts().map_err(|error: RecordError| error.message)?;
    if documents.is_empty() {
        return Err("no documents in the record, expected at least one".to_owned());
    }
    documents.into_iter().map(|content| pair(query, content)).collect()
}

/// The documents of a record of any form, in order: those that training reads of it. Of a pos/neg record the
/// positives come first.
fn documents(object: &Map<String, Value>) -> Result<Vec<&str>, RecordError> {
    match form(object) {
        None | Some(RecordForm::Pointwise) => Ok(vec![string_at(object, "content", "")?]),
        Some(RecordForm::Grouped) => hits(object),
        Some(RecordForm::PosNeg) => positives_and_negatives(object),
    }
}

fn hits(object: &Map<String, Value>) -> Result<Vec<&str>, RecordError> {
    let hits = list_at(object, "hits")?.iter().enumerate();
    hits.map(|(i, record)| match record {
        Value::Object(hit) if is_object(record) => {
            string_at(hit, "content", &format!("hits[{i}]."))
        }
        other => wrong_type(&format!("hits[{i}]"), other, "an object"),
    })
    .collect()
}

fn positives_and_negatives(object: &Map<String, Value>) -> Result<Vec<&str>, RecordError> {
    let mut documents = Vec::new();
    for key in ["pos", "neg"] {
        if object.get(key).is_some_and(is_absent) {
            continue;
        }
        for (i, text) in list_at(object, key)?.iter().enumerate() {
            documents.push(match text {
                Value::String(text) => text.as_str(),
                other => return wrong_type(&format!("{key}[{i}]"), other, "a string"),
            });
        }
    }
    Ok(documents)
}

fn tsv_pair(line: &[u8]) -> Result<InputPair, String> {
    let columns: Vec<&str> = utf8(line)?.split('\t').collect();
    let &[query, content] = columns.as_slice() else {
        let count = columns.len();
        let plural = if count == 1 { "" } else { "s" };
        return Err(format!("{count} column{plural}, expected a query, a tab and a document"));
    };
    pair(query, content)
}

fn pair(query: &str, content: &str) -> Result<InputPair, String> {
    let (query, content) = (strip(query).to_owned(), strip(content).to_owned());
    if query.is_empty() {
        return Err("the query is empty, expected text".to_owned());
    }
    Ok(InputPair { query, content })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    fn pairs_of(bytes: &[u8], format: InputFormat) -> Result<Vec<(String, String)>> {
        let mut all = Vec::new();
        for chunk in InputChunks::new(bytes, "in", format) {
            all.extend(chunk?.pairs()?.into_iter().map(|pair| (pair.query, pair.content)));
        }
        Ok(all)
    }

    fn owned(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|&(query, content)| (query.to_owned(), content.to_owned())).collect()
    }

    #[test]
    fn both_formats_are_read() {
        let json = "\u{feff}{\"query\": \" q \", \"content\": \"d\\t\", \"id\": 4}\r\n\n{\"query\":\"问\",\"content\":\"\"}";
        let tsv = "q\td\n  \n问\t\n";
        for (text, format) in [(json, InputFormat::JsonLines), (tsv, InputFormat::Tsv)] {
            let expected = owned(&[("q", "d"), ("问", "")]);
            assert_eq!(pairs_of(text.as_bytes(), format).unwrap(), expected, "{format:?}");
        }
    }

    #[test]
    fn any_reader_may_be_compressed() {
        let text = b"q\td\n".as_slice();
        let gzip = flate2::bufread::GzEncoder::new(text, flate2::Compression::default());
        let chunks = InputChunks::from_reader(gzip, "in", InputFormat::Tsv).unwrap();
        let pairs: Vec<_> = chunks.flat_map(|chunk| chunk.unwrap().pairs().unwrap()).collect();
        assert_eq!((pairs[0].query.as_str(), pairs[0].content.as_str()), ("q", "d"));
    }

    #[test]
    fn records_of_several_documents_give_a_pair_for_each() {
        let lines = r#"{"query": "a", "hits": [{"content": "1", "label": 2}, {"content": "2"}]}
                       {"query": "b", "neg": ["4"], "pos": [" 3"]}
                       {"query": "c", "content": "5", "pos": ["no"]}
                       {"query": "d", "content": null, "hits": null, "neg": ["6"]}
                       {"query": "e", "hits": [{"content": "7"}], "pos": ["no"], "neg": ["no"]}"#;
        let expected = [("a", "1"), ("a", "2"), ("b", "3"), ("b", "4"), ("c", "5"), ("d", "6")];
        let expected = owned(&[&expected[..], &[("e", "7")]].concat());
        assert_eq!(pairs_of(lines.as_bytes(), InputFormat::JsonLines).unwrap(), expected);
    }

    #[test]
    fn chunks_are_numbered_and_hold_a_bounded_number_of_lines_and_bytes() {
        let short = "q\td\n\n".repeat(2 * CHUNK_LINES + 1);
        let long = format!("q\t{}\n", "d".repeat(CHUNK_BYTES)).repeat(2);
        for (text, expected) in [
            (short, vec![CHUNK_LINES, CHUNK_LINES, 1]),
            (long, vec![1, 1]),
            (String::new(), vec![]),
        ] {
            let chunks = InputChunks::new(text.as_bytes(), "in", InputFormat::Tsv);
            let chunks: Vec<_> = chunks.map(|chunk| chunk.unwrap()).collect();
            assert!(chunks.iter().map(|chunk| chunk.number).eq(0..expected.len() as u64));
            let sizes: Vec<_> = chunks.iter().map(|chunk| chunk.pairs().unwrap().len()).collect();
            assert_eq!(sizes, expected);
        }
    }

    #[test]
    fn bad_lines_are_named() {
        let cases: [(&[u8], InputFormat, &str); 11] = [
            (
                b"{\"query\":\"q\"}",
                InputFormat::JsonLines,
                "in:2: no \"content\" (keys found: \"query\"), expected a string there",
            ),
            (
                b"{\"query\":\" \",\"content\":\"d\"}",
                InputFormat::JsonLines,
                "in:2: the query is empty, expected text",
            ),
            (
                b"{\"query\":\"q\",\"hits\":[]}",
                InputFormat::JsonLines,
                "in:2: no documents in the record, expected at least one",
            ),
            (
                b"{\"query\":\"q\",\"hits\":[{}]}",
                InputFormat::JsonLines,
                "in:2: no \"hits[0].content\" (no keys found), expected a string there",
            ),
            (
                b"{\"query\":\"q\",\"hits\":[3]}",
                InputFormat::JsonLines,
                "in:2: \"hits[0]\" is a number, expected an object",
            ),
            (
                b"{\"query\":\"q\",\"hits\":[NaN]}",
                InputFormat::JsonLines,
                "in:2: \"hits[0]\" is not a number, expected an object",
            ),
            (
                b"{\"query\":\"q\",\"pos\":[null]}",
                InputFormat::JsonLines,
                "in:2: \"pos[0]\" is null, expected a string",
            ),
            (
                b"one column",
                InputFormat::Tsv,
                "in:2: 1 column, expected a query, a tab and a document",
            ),
            (
                b"a\tb\tc",
                InputFormat::Tsv,
                "in:2: 3 columns, expected a query, a tab and a document",
            ),
            (b"\td", InputFormat::Tsv, "in:2: the query is empty, expected text"),
            (
                b"ab\xff\tc",
                InputFormat::Tsv,
                "in:2: not UTF-8 at byte 3 of the line, expected UTF-8",
            ),
        ];
        for (bytes, format, expected) in cases {
            let input = [b"\n", bytes, b"\nq\td\n"].concat();
            assert_eq!(pairs_of(&input, format).unwrap_err().to_string(), expected);
        }
    }
}
