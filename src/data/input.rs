//! Pairs to score, read as they come.

use std::io::BufRead;
use std::path::PathBuf;

use super::lines::{Line, Lines, too_long};
use super::record::{parse_object, string_at, strip};
use crate::error::{Error, Result};

/// How a line holds a pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputFormat {
    /// `{"query": .., "content": ..}`; other keys are ignored.
    JsonLines,
    /// `query<TAB>content`.
    Tsv,
}

/// A pair to score.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputPair {
    /// One-based line.
    pub line: u32,
    /// Stripped.
    pub query: String,
    /// Stripped.
    pub content: String,
}

/// Pairs from any reader, one line at a time; blank lines are skipped. After an error it ends.
pub struct InputPairs<R> {
    lines: Lines<R>,
    name: PathBuf,
    format: InputFormat,
    failed: bool,
}

impl InputPairs<Box<dyn BufRead + Send>> {
    /// Pairs from a plain, gzip or zstd file.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be opened.
    pub fn open(path: impl Into<PathBuf>, format: InputFormat) -> Result<Self> {
        let name = path.into();
        Ok(Self { lines: Lines::open(&name)?.0, name, format, failed: false })
    }
}

impl<R: BufRead> InputPairs<R> {
    /// Pairs from a reader; `name` stands for it in errors, such as `<stdin>`.
    pub fn new(reader: R, name: impl Into<PathBuf>, format: InputFormat) -> Self {
        Self { lines: Lines::new(reader), name: name.into(), format, failed: false }
    }

    fn next_pair(&mut self) -> Result<Option<InputPair>> {
        loop {
            let before = self.lines.number();
            let line = self.lines.next().map_err(|source| Error::File {
                path: self.name.clone(),
                message: format!("cannot read on after line {before}: {source}"),
            })?;
            let parsed = match line {
                None => return Ok(None),
                Some(Line::Bytes(bytes)) if bytes.trim_ascii().is_empty() => continue,
                Some(Line::Bytes(bytes)) => match self.format {
                    InputFormat::JsonLines => json_pair(bytes),
                    InputFormat::Tsv => tsv_pair(bytes),
                },
                Some(Line::TooLong) => Err(too_long()),
            };
            let line = before + 1;
            return match parsed {
                Ok((query, content)) => Ok(Some(InputPair { line, query, content })),
                Err(message) => {
                    Err(Error::Data { path: self.name.clone(), line: line as usize, message })
                }
            };
        }
    }
}

impl<R: BufRead> Iterator for InputPairs<R> {
    type Item = Result<InputPair>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let pair = self.next_pair();
        self.failed = pair.is_err();
        pair.transpose()
    }
}

fn json_pair(line: &[u8]) -> Result<(String, String), String> {
    let pair = || {
        let object = parse_object(line)?;
        let text = |key| string_at(&object, key, "").map(|text| strip(text).to_owned());
        Ok((text("query")?, text("content")?))
    };
    pair().map_err(|error: super::record::RecordError| error.message).and_then(with_query)
}

fn tsv_pair(line: &[u8]) -> Result<(String, String), String> {
    let text = std::str::from_utf8(line).map_err(|error| {
        format!("not UTF-8 at byte {} of the line, expected UTF-8", error.valid_up_to() + 1)
    })?;
    let columns: Vec<&str> = text.split('\t').collect();
    let &[query, content] = columns.as_slice() else {
        let count = columns.len();
        let plural = if count == 1 { "" } else { "s" };
        return Err(format!("{count} column{plural}, expected a query, a tab and a document"));
    };
    with_query((strip(query).to_owned(), strip(content).to_owned()))
}

fn with_query(pair: (String, String)) -> Result<(String, String), String> {
    if pair.0.is_empty() { Err("the query is empty, expected text".to_owned()) } else { Ok(pair) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn both_formats_are_read_with_their_lines() {
        let json = "\u{feff}{\"query\": \" q \", \"content\": \"d\\t\", \"id\": 4}\r\n\n{\"query\":\"问\",\"content\":\"\"}";
        let tsv = "q\td\n  \n问\t\n";
        for (text, format) in [(json, InputFormat::JsonLines), (tsv, InputFormat::Tsv)] {
            let pairs = InputPairs::new(text.as_bytes(), "in", format);
            let pairs: Vec<_> = pairs.map(|pair| pair.unwrap()).collect();
            let pair = |line, query: &str, content: &str| InputPair {
                line,
                query: query.to_owned(),
                content: content.to_owned(),
            };
            assert_eq!(pairs, [pair(1, "q", "d"), pair(3, "问", "")], "{format:?}");
        }
    }

    #[test]
    fn bad_lines_are_named_and_end_the_stream() {
        let cases: [(&[u8], InputFormat, &str); 6] = [
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
            let mut pairs = InputPairs::new(input.as_slice(), "in", format);
            assert_eq!(pairs.next().unwrap().unwrap_err().to_string(), expected);
            assert!(pairs.next().is_none());
        }
    }
}
