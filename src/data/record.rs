//! One line of JSON to one record, or one line of text that says why not.

use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::report::DropReason;
use super::{DatasetKind, RecordForm};

/// Why a record cannot be used.
#[derive(Debug, PartialEq)]
pub(crate) struct RecordError {
    /// The class it is counted under when bad records are skipped.
    pub(crate) reason: DropReason,
    /// What is wrong and what was expected.
    pub(crate) message: String,
}

type RecordResult<T> = Result<T, RecordError>;

fn bad<T>(reason: DropReason, message: impl Into<String>) -> RecordResult<T> {
    Err(RecordError { reason, message: message.into() })
}

/// Stripped texts with their labels.
pub(crate) type Documents = Vec<(Box<str>, f64)>;

/// A record's query with its labelled documents; labels are final.
#[derive(Debug, PartialEq)]
pub(crate) struct Record {
    /// Stripped, never empty.
    pub(crate) query: String,
    /// Stripped contents with labels, at least one; 32 bits can hold the labels.
    pub(crate) documents: Documents,
    /// How it was written.
    pub(crate) form: RecordForm,
    /// Labels come from the label range, because positives or negatives have no scores.
    pub(crate) implied_labels: bool,
}

/// How labels are found and what they become.
#[derive(Debug, Clone)]
pub(crate) struct LabelRule {
    /// `None` where labels are not read, and all are 0.
    pub(crate) key: Option<String>,
    /// Pointwise labels are mapped onto `[0, 1]`, grouped ones are kept.
    pub(crate) kind: DatasetKind,
    pub(crate) min: f64,
    pub(crate) max: f64,
}

impl LabelRule {
    /// A finished label from the number at `place`.
    fn apply(&self, raw: f64, place: &str) -> RecordResult<f64> {
        let Self { min, max, .. } = *self;
        if self.kind == DatasetKind::Grouped {
            if (raw as f32).is_finite() {
                return Ok(raw);
            }
            let message = format!("{place} is {raw:e}, expected a number that 32 bits can hold");
            return bad(DropReason::LabelNotFinite, message);
        }
        if !(min..=max).contains(&raw) {
            let message =
                format!("{place} is {raw}, expected {min} to {max} (min_label, max_label)");
            return bad(DropReason::LabelOutOfRange, message);
        }
        Ok((raw - min) / (max - min))
    }
}

/// The JSON object on a line.
pub(crate) fn parse_object(line: &[u8]) -> RecordResult<Map<String, Value>> {
    let text = match std::str::from_utf8(line) {
        Ok(text) => text,
        Err(error) => {
            let at = error.valid_up_to() + 1;
            let message = if line.starts_with(&[0xff, 0xfe]) || line.starts_with(&[0xfe, 0xff]) {
                "begins with a UTF-16 byte order mark, expected UTF-8".to_owned()
            } else {
                format!("not UTF-8 at byte {at} of the line, expected UTF-8")
            };
            return bad(DropReason::NotUtf8, message);
        }
    };
    match serde_json::from_str(text) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => not_an_object(&other),
        Err(error) => match with_words(text) {
            None => broken_json(&error),
            Some(words) => match serde_json::from_str(&words.marked) {
                Ok(Value::Object(object)) if !is_mark(&object) => Ok(object),
                Ok(other) => not_an_object(&other),
                // The columns of the line itself.
                Err(_) => match serde_json::from_str::<IgnoredAny>(&words.padded) {
                    Ok(IgnoredAny) => broken_json(&error),
                    Err(error) => broken_json(&error),
                },
            },
        },
    }
}

fn not_an_object<T>(found: &Value) -> RecordResult<T> {
    let message = format!("{}, expected one JSON object a line", type_name(found));
    bad(DropReason::WrongType, message)
}

fn broken_json<T>(error: &serde_json::Error) -> RecordResult<T> {
    let column = error.column();
    let full = error.to_string();
    let what = full.split(" at line ").next().unwrap_or(&full);
    let message = format!("broken JSON at column {column}: {what}; expected one object a line");
    bad(DropReason::BrokenJson, message)
}

/// The key of the object that stands for a word: no text that anybody writes.
const WORD: &str = "\0word";
/// The key of the object that stands for a text with half a surrogate pair.
const HALF_PAIR: &str = "\0half";

/// A line with what Python and pandas write and JSON lacks: words for numbers that are none, and texts
/// that hold half a surrogate pair, as a text that was cut within an emoji. Where nobody looks they do no
/// harm, so they are not refused before a key that is read holds one.
struct Words {
    /// With an object in place of each, which [`word`] and [`is_mark`] know.
    marked: String,
    /// With a number or a text of the same length, so that columns stay.
    padded: String,
}

/// `None` where the line has nothing of the kind.
fn with_words(line: &str) -> Option<Words> {
    let mut words = Words { marked: String::new(), padded: String::new() };
    let (mut copied, mut at) = (0, 0);
    let bytes = line.as_bytes();
    while at < bytes.len() {
        let names = ["NaN", "Infinity", "-NaN", "-Infinity"];
        let (end, replaced) = if bytes[at] == b'"' {
            let (end, halves) = scan_text(bytes, at);
            (end, (!halves.is_empty()).then(|| without_halves(line, at..end, &halves)))
        } else if let Some(name) =
            names.iter().find(|name| bytes[at..].starts_with(name.as_bytes()))
        {
            let mark = json!({WORD: format!("{name} at column {}", at + 1)});
            (at + name.len(), Some((mark.to_string(), format!("{:1$}", 0, name.len()))))
        } else {
            (at + 1, None)
        };
        if let Some((marked, padded)) = replaced {
            for (out, text) in [(&mut words.marked, marked), (&mut words.padded, padded)] {
                out.push_str(&line[copied..at]);
                out.push_str(&text);
            }
            copied = end;
        }
        at = end;
    }
    words.marked.push_str(&line[copied..]);
    words.padded.push_str(&line[copied..]);
    (copied > 0).then_some(words)
}

/// The end of the text in quotes that begins at `start`, and the escapes in it that give half a
/// surrogate pair.
fn scan_text(bytes: &[u8], start: usize) -> (usize, Vec<usize>) {
    let (mut at, mut halves) = (start + 1, Vec::new());
    while at < bytes.len() && bytes[at] != b'"' {
        at += match (utf16_unit(bytes, at), utf16_unit(bytes, at + 6)) {
            (Some(0xd800..=0xdbff), Some(0xdc00..=0xdfff)) => 12,
            (Some(0xd800..=0xdfff), _) => {
                halves.push(at);
                6
            }
            _ if bytes[at] == b'\\' => 2,
            _ => 1,
        };
    }
    ((at + 1).min(bytes.len()), halves)
}

/// What the escape `\uXXXX` at `at` stands for, where there is one.
fn utf16_unit(bytes: &[u8], at: usize) -> Option<u16> {
    let digits = bytes.get(at..at + 6)?.strip_prefix(br"\u")?;
    u16::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// What takes the place of a text with half a pair: a mark, unless it is a key, and a text.
fn without_halves(line: &str, place: std::ops::Range<usize>, halves: &[usize]) -> (String, String) {
    let mut text = line[place.clone()].to_owned();
    for &half in halves {
        let at = half - place.start;
        text.replace_range(at..at + 6, r"\ufffd");
    }
    let is_key = line[place.end..].trim_start().starts_with(':');
    let marked = if is_key { text.clone() } else { json!({HALF_PAIR: true}).to_string() };
    (marked, text)
}

/// The word that an object stands for, with its column.
fn word(object: &Map<String, Value>) -> Option<&str> {
    object.get(WORD)?.as_str()
}

/// Whether an object was none in the line.
fn is_mark(object: &Map<String, Value>) -> bool {
    word(object).is_some() || object.contains_key(HALF_PAIR)
}

/// Whether a value is an object in the line, too.
pub(crate) fn is_object(value: &Value) -> bool {
    value.as_object().is_some_and(|object| !is_mark(object))
}

/// Whether a value is a text in the line, be it one that cannot be used.
fn is_text(value: &Value) -> bool {
    value.is_string() || value.as_object().is_some_and(|object| object.contains_key(HALF_PAIR))
}

/// How a record is written, if it has documents: a text as `content` decides, whatever else there is,
/// then `hits`, then `pos` and `neg`. `null` is as good as nothing, since tables that hold several forms
/// are written with it.
pub(crate) fn form(object: &Map<String, Value>) -> Option<RecordForm> {
    let given = |key| object.get(key).is_some_and(|value| !is_absent(value));
    let has = |key| object.contains_key(key);
    if object.get("content").is_some_and(is_text) {
        Some(RecordForm::Pointwise)
    } else if given("hits") {
        Some(RecordForm::Grouped)
    } else if given("pos") || given("neg") {
        Some(RecordForm::PosNeg)
    } else if has("content") {
        // None of the forms: whoever reads it as the likeliest says what is wrong.
        Some(RecordForm::Pointwise)
    } else if has("hits") {
        Some(RecordForm::Grouped)
    } else {
        (has("pos") || has("neg")).then_some(RecordForm::PosNeg)
    }
}

/// Whether a value only says that there is none, as tables do: `null`, or Python's `NaN`.
pub(crate) fn is_absent(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(|object| word(object).is_some())
}

/// Reads any of the three record forms.
pub(crate) fn parse_record(object: &Map<String, Value>, rule: &LabelRule) -> RecordResult<Record> {
    let query = strip(string_at(object, "query", "")?);
    if query.is_empty() {
        return bad(DropReason::EmptyQuery, "\"query\" is empty, expected text");
    }
    let Some(form) = form(object) else {
        let forms = "\"content\", \"hits\", or \"pos\" and \"neg\"";
        let message = format!("no documents ({}), expected {forms}", keys_of(object));
        return bad(DropReason::MissingKey, message);
    };
    let (documents, implied_labels) = match form {
        RecordForm::Pointwise => (vec![document(object, rule, "")?], false),
        RecordForm::Grouped => (hits(object, rule)?, false),
        RecordForm::PosNeg => positives_and_negatives(object, rule)?,
    };
    Ok(Record { query: query.to_owned(), documents, form, implied_labels })
}

/// A `{"content", label_key}` object; `place` is its path in the record, such as `hits[2].`.
fn document(
    object: &Map<String, Value>,
    rule: &LabelRule,
    place: &str,
) -> RecordResult<(Box<str>, f64)> {
    let content = strip(string_at(object, "content", place)?);
    let Some(key) = rule.key.as_deref() else { return Ok((content.into(), 0.0)) };
    let Some(value) = object.get(key) else {
        let message = format!(
            "no \"{place}{key}\" ({}), expected a number there or another label key",
            keys_of(object)
        );
        return bad(DropReason::MissingLabel, message);
    };
    Ok((content.into(), label(value, rule, &format!("\"{place}{key}\""))?))
}

fn hits(object: &Map<String, Value>, rule: &LabelRule) -> RecordResult<Documents> {
    let hits = list_at(object, "hits")?;
    if hits.is_empty() {
        let key = rule.key.iter().map(|key| format!(", \"{key}\""));
        let message =
            format!("\"hits\" is empty, expected {{\"content\"{}}} in it", key.collect::<String>());
        return bad(DropReason::NoDocuments, message);
    }
    hits.iter()
        .enumerate()
        .map(|(i, hit)| match hit {
            Value::Object(hit) if !is_mark(hit) => document(hit, rule, &format!("hits[{i}].")),
            other => wrong_type(&format!("hits[{i}]"), other, "an object"),
        })
        .collect()
}

/// The older form: lists of texts, with the ends of the label range unless scores are given.
/// Also says whether a text got its label so.
fn positives_and_negatives(
    object: &Map<String, Value>,
    rule: &LabelRule,
) -> RecordResult<(Documents, bool)> {
    let mut documents = Vec::new();
    let mut implied = false;
    for (key, scores_key, default) in
        [("pos", "pos_scores", rule.max), ("neg", "neg_scores", rule.min)]
    {
        let given = |key| object.get(key).is_some_and(|value| !is_absent(value));
        let texts = if given(key) { list_at(object, key)? } else { &[] };
        let scores = if given(scores_key) { Some(list_at(object, scores_key)?) } else { None };
        if let Some(scores) = scores.filter(|scores| scores.len() != texts.len()) {
            let message = format!(
                "\"{scores_key}\" has {} entries, expected {} as in \"{key}\"",
                scores.len(),
                texts.len()
            );
            return bad(DropReason::MissingLabel, message);
        }
        for (i, text) in texts.iter().enumerate() {
            let Value::String(content) = text else {
                return wrong_type(&format!("{key}[{i}]"), text, "a string");
            };
            let label = if rule.key.is_none() {
                0.0
            } else if let Some(scores) = scores {
                label(&scores[i], rule, &format!("\"{scores_key}[{i}]\""))?
            } else {
                implied = true;
                rule.apply(default, key)?
            };
            documents.push((strip(content).into(), label));
        }
    }
    if documents.is_empty() {
        let message = "\"pos\" and \"neg\" are empty, expected at least one text";
        return bad(DropReason::NoDocuments, message);
    }
    Ok((documents, implied))
}

fn label(value: &Value, rule: &LabelRule, place: &str) -> RecordResult<f64> {
    match value {
        Value::Number(number) => rule.apply(number.as_f64().unwrap_or(f64::NAN), place),
        Value::Object(object) if let Some(word) = word(object) => {
            bad(DropReason::LabelNotFinite, format!("{word}, expected a finite number"))
        }
        other => {
            let message = format!("{place} is {}, expected a number", type_name(other));
            bad(DropReason::WrongType, message)
        }
    }
}

/// The string under `key`; `place` is the path of `object` in its record.
pub(crate) fn string_at<'a>(
    object: &'a Map<String, Value>,
    key: &str,
    place: &str,
) -> RecordResult<&'a str> {
    match object.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => wrong_type(&format!("{place}{key}"), other, "a string"),
        None => {
            let message =
                format!("no \"{place}{key}\" ({}), expected a string there", keys_of(object));
            bad(DropReason::MissingKey, message)
        }
    }
}

/// The list under `key`, empty where there is none.
pub(crate) fn list_at<'a>(object: &'a Map<String, Value>, key: &str) -> RecordResult<&'a [Value]> {
    match object.get(key) {
        Some(Value::Array(list)) => Ok(list),
        Some(other) => wrong_type(key, other, "a list"),
        None => Ok(&[]),
    }
}

/// What is said of a value of another type than `expected`.
pub(crate) fn wrong_type<T>(place: &str, found: &Value, expected: &str) -> RecordResult<T> {
    let message = format!("\"{place}\" is {}, expected {expected}", type_name(found));
    bad(DropReason::WrongType, message)
}

fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(object) if word(object).is_some() => "not a number",
        Value::Object(object) if is_mark(object) => "a text with half a surrogate pair",
        Value::Object(_) => "an object",
    }
}

fn keys_of(object: &Map<String, Value>) -> String {
    const SHOWN: usize = 8;
    if object.is_empty() {
        return "no keys found".to_owned();
    }
    let keys: Vec<_> = object.keys().take(SHOWN).map(|key| format!("{key:?}")).collect();
    let more = if object.len() > SHOWN { ", .." } else { "" };
    format!("keys found: {}{more}", keys.join(", "))
}

/// Without white space (Unicode's `White_Space`) at either end.
pub(crate) fn strip(text: &str) -> &str {
    text.trim()
}
