//! A YAML document as a tree in which every value knows its line and column.
//!
//! Configuration errors are only useful with a position, so the tree keeps what a typed
//! deserializer throws away. It is built from the events of `saphyr-parser`: `serde_yaml` is
//! deprecated upstream, and none of its successors gives the position of keys, the line of both
//! halves of a duplicate, and the difference between `no` and `"no"` at once.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use saphyr_parser::{Event, Marker, Parser, ScalarStyle, Tag};

use crate::error::{Error, Result};

/// Nesting beyond this is not a configuration; the bound keeps a hostile file off the stack.
const MAX_DEPTH: usize = 32;
/// Aliases copy what they name, so a few lines can ask for billions of nodes; this stops them.
const MAX_NODES: usize = 100_000;
/// The tags of plain data; `!!python/name` and its like are not among them.
const CORE_TAGS: [&str; 7] = ["bool", "float", "int", "map", "null", "seq", "str"];

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The YAML file, or the command-line option as it was typed (`--set lr=2e-5`).
    pub source: Arc<Path>,
    /// One-based line.
    pub line: usize,
    /// One-based column, in characters.
    pub column: usize,
    /// The option's name (`--set`) when the value came from the command line.
    pub option: Option<&'static str>,
}

impl Place {
    /// The start of a YAML file.
    #[must_use]
    pub fn start_of(file: &Path) -> Self {
        Self { source: Arc::from(file), line: 1, column: 1, option: None }
    }

    /// The value of a command-line option, which is shown as `shown` and starts at `column`.
    #[must_use]
    pub fn in_option(option: &'static str, shown: &str, column: usize) -> Self {
        Self { source: Arc::from(Path::new(shown)), line: 1, column, option: Some(option) }
    }

    /// A configuration error at this place; an option is short enough to need no line and column.
    #[must_use]
    pub fn error(&self, message: impl Into<String>) -> Error {
        if self.option.is_some() {
            return Error::Usage(format!("{}: {}", self.source.display(), message.into()));
        }
        Error::Config {
            path: self.source.to_path_buf(),
            line: self.line,
            column: self.column,
            message: message.into(),
        }
    }
}

impl fmt::Display for Place {
    /// `training.yaml:7`, or the option's name, as a notice mentions it.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.option {
            Some(option) => out.write_str(option),
            None => write!(out, "{}:{}", self.source.display(), self.line),
        }
    }
}

/// One value of the document.
#[derive(Clone, Debug)]
pub struct Node {
    /// Where it starts.
    pub place: Place,
    /// What it is.
    pub value: Value,
    /// The text as typed, for the value of a command-line option: where text is wanted,
    /// `--set query_format={}` means the two braces and not an empty mapping.
    pub typed: Option<String>,
}

/// The kinds of YAML values.
#[derive(Clone, Debug)]
pub enum Value {
    /// A scalar; what it means depends on what its reader wants.
    Scalar {
        /// The text, unescaped.
        text: String,
        /// Written without quotes, so that `5`, `no` or `null` may be more than text.
        plain: bool,
    },
    /// A list.
    Sequence(Vec<Node>),
    /// A mapping, in the order written.
    Mapping(Mapping),
}

/// A mapping, in the order written, without duplicate keys.
pub type Mapping = Vec<Entry>;

/// One key of a mapping and its value.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The key's text.
    pub key: String,
    /// Where the key starts.
    pub place: Place,
    /// Its value.
    pub node: Node,
}

/// The entry of `mapping` under `key`.
#[must_use]
pub fn entry<'a>(mapping: &'a [Entry], key: &str) -> Option<&'a Entry> {
    mapping.iter().find(|entry| entry.key == key)
}

/// Reads the YAML file at `path`, whose top must be a mapping.
///
/// # Errors
/// The file cannot be read, is not UTF-8, is not YAML, or holds something else than a mapping.
pub fn read(path: &Path) -> Result<Mapping> {
    mapping(path, &read_text(path)?, "lines of the form `key: value`")
}

/// Reads the JSON file at `path`, whose top must be an object. JSON is YAML too, but for tabs
/// between values and for what only YAML allows.
///
/// # Errors
/// The file cannot be read, is not UTF-8, is not JSON, or holds something else than an object.
pub fn read_json(path: &Path) -> Result<Mapping> {
    let text = read_text(path)?;
    if let Err(error) = serde_json::from_str::<serde::de::IgnoredAny>(&text) {
        let place =
            Place { line: error.line(), column: error.column().max(1), ..Place::start_of(path) };
        let message = error.to_string();
        let what = message.split(" at line ").next().unwrap_or_default();
        return Err(place.error(format!("not valid JSON: {what}")));
    }
    mapping(path, &text.replace('\t', " "), "an object")
}

/// The file's text, without a byte order mark.
fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|source| Error::Io {
        path: path.to_path_buf(),
        action: "read",
        source,
    })?;
    let text = std::str::from_utf8(&bytes).map_err(|error| {
        let before = String::from_utf8_lossy(&bytes[..error.valid_up_to()]);
        let line = before.matches('\n').count() + 1;
        let column = before.chars().rev().take_while(|&c| c != '\n').count() + 1;
        Place { line, column, ..Place::start_of(path) }
            .error(format!("byte 0x{:02x} is not UTF-8 text", bytes[error.valid_up_to()]))
    })?;
    Ok(text.strip_prefix('\u{feff}').unwrap_or(text).to_owned())
}

/// The document in `text`, the content of the file at `path`.
fn mapping(path: &Path, text: &str, expected: &str) -> Result<Mapping> {
    match parse(text, &Place::start_of(path))? {
        None => Err(Error::File {
            path: path.to_path_buf(),
            message: format!("is empty; expected {expected}"),
        }),
        Some(Node { value: Value::Mapping(mapping), .. }) => Ok(mapping),
        Some(node) => {
            Err(node.place.error(format!("expected {expected}, found {}", node.describe())))
        }
    }
}

/// Parses one YAML document; `None` when it has no content. `start` is where `text` begins.
///
/// # Errors
/// The text is not YAML, repeats a key, holds more than one document, or nests too deep.
pub fn parse(text: &str, start: &Place) -> Result<Option<Node>> {
    let mut builder = Builder { start, open: Vec::new(), anchors: HashMap::new(), nodes: 0 };
    let mut parser = Parser::new_from_str(text);
    let mut root: Option<Node> = None;
    while let Some(event) = parser.next_event() {
        let (event, span) = event.map_err(|error| {
            let place = builder.place(error.marker());
            let line = text.lines().nth(error.marker().line().saturating_sub(1)).unwrap_or("");
            let indentation = &line[..line.len() - line.trim_start().len()];
            match indentation.find('\t') {
                Some(tab) => Place { column: tab + 1, ..place }
                    .error("a tab in the indentation; YAML wants spaces"),
                None => place.error(format!("not valid YAML: {}", error.info())),
            }
        })?;
        if root.is_some() && matches!(event, Event::DocumentStart(_)) {
            let place = builder.place(&span.start);
            return Err(place.error("a second YAML document starts here; expected one"));
        }
        if let Some(node) = builder.event(event, &span.start)? {
            root = Some(node);
        }
    }
    // A file of comments parses as one empty plain scalar or as no document at all.
    Ok(root.filter(
        |node| !matches!(&node.value, Value::Scalar { text, plain: true } if text.is_empty()),
    ))
}

/// A collection that is still being filled.
struct Open {
    node: Node,
    anchor: usize,
    /// The key that waits for its value, in a mapping.
    key: Option<(String, Place)>,
}

/// Turns the parser's events into nodes, without recursion.
struct Builder<'a> {
    start: &'a Place,
    open: Vec<Open>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl Builder<'_> {
    /// The place of a parser mark, shifted by where the text begins on its first line.
    fn place(&self, mark: &Marker) -> Place {
        let first_line = mark.line() <= 1;
        let shift = if first_line { self.start.column - 1 } else { 0 };
        Place {
            line: self.start.line + mark.line().max(1) - 1,
            column: mark.col() + 1 + shift,
            ..self.start.clone()
        }
    }

    /// Takes one event; returns the root node once it is complete.
    fn event(&mut self, event: Event<'_>, mark: &Marker) -> Result<Option<Node>> {
        let place = self.place(mark);
        match event {
            Event::Scalar(text, style, anchor, tag) => {
                let forced_text = check_tag(tag.as_deref(), &place)?;
                let plain = style == ScalarStyle::Plain && !forced_text;
                let value = Value::Scalar { text: text.into_owned(), plain };
                self.close(Node { place, value, typed: None }, anchor)
            }
            Event::SequenceStart(anchor, tag) => {
                check_tag(tag.as_deref(), &place)?;
                self.open(Node { place, value: Value::Sequence(Vec::new()), typed: None }, anchor)
            }
            Event::MappingStart(anchor, tag) => {
                check_tag(tag.as_deref(), &place)?;
                self.open(Node { place, value: Value::Mapping(Vec::new()), typed: None }, anchor)
            }
            Event::SequenceEnd | Event::MappingEnd => match self.open.pop() {
                Some(open) => self.close(open.node, open.anchor),
                None => Ok(None),
            },
            Event::Alias(anchor) => {
                let Some(node) = self.anchors.get(&anchor).cloned() else {
                    return Err(place.error("an alias to a value that is not complete yet"));
                };
                self.nodes += node.count();
                self.close(Node { place, ..node }, 0)
            }
            _ => Ok(None),
        }
    }

    fn open(&mut self, node: Node, anchor: usize) -> Result<Option<Node>> {
        if self.open.len() >= MAX_DEPTH {
            return Err(node.place.error(format!("nested deeper than {MAX_DEPTH} levels")));
        }
        self.open.push(Open { node, anchor, key: None });
        Ok(None)
    }

    /// Puts a complete node where it belongs: into the innermost open collection, or out.
    fn close(&mut self, node: Node, anchor: usize) -> Result<Option<Node>> {
        self.nodes += 1;
        if self.nodes > MAX_NODES {
            return Err(node.place.error(format!("more than {MAX_NODES} values")));
        }
        if anchor != 0 {
            self.anchors.insert(anchor, node.clone());
        }
        let Some(parent) = self.open.last_mut() else { return Ok(Some(node)) };
        match &mut parent.node.value {
            Value::Sequence(items) => items.push(node),
            Value::Mapping(entries) => match parent.key.take() {
                Some((key, place)) => entries.push(Entry { key, place, node }),
                None => parent.key = Some(checked_key(entries, node)?),
            },
            Value::Scalar { .. } => {}
        }
        Ok(None)
    }
}

/// A key must be text, and new to its mapping.
fn checked_key(entries: &[Entry], node: Node) -> Result<(String, Place)> {
    let Value::Scalar { text, .. } = node.value else {
        return Err(node.place.error(format!("expected a key, found {}", node.describe())));
    };
    match entry(entries, &text) {
        Some(first) => Err(node.place.error(format!(
            "{text}: given twice, first on line {}; keep one of them",
            first.place.line
        ))),
        None => Ok((text, node.place)),
    }
}

/// Only YAML's own tags are accepted; true when the tag makes its value text (`!!str 5`).
fn check_tag(tag: Option<&Tag>, place: &Place) -> Result<bool> {
    match tag {
        None => Ok(false),
        Some(tag) if tag.is_yaml_core_schema() && CORE_TAGS.contains(&tag.suffix.as_str()) => {
            Ok(tag.suffix == "str")
        }
        Some(tag) => {
            let core = tag.is_yaml_core_schema();
            let name = if core { format!("!!{}", tag.suffix) } else { tag.to_string() };
            Err(place.error(format!("the tag {name} has no meaning here; remove it")))
        }
    }
}

impl Node {
    fn count(&self) -> usize {
        match &self.value {
            Value::Scalar { .. } => 1,
            Value::Sequence(items) => 1 + items.iter().map(Self::count).sum::<usize>(),
            Value::Mapping(entries) => 1 + entries.iter().map(|e| e.node.count()).sum::<usize>(),
        }
    }
}
