//! What a scalar means to the reader that asks for it.
//!
//! The rules are those of `PyYAML` (YAML 1.1), which users of accelerate know, with its two traps
//! removed: `5e-5` is a number although it has no dot, and `no` is text where text is wanted
//! (`mixed_precision: no`). A quoted scalar is text, or a number where one with a fraction is wanted:
//! `RAG-Retrieval` calls `float` on what it reads, and its users have quoted `"5e-5"`.

use super::tree::{Node, Value};

impl Node {
    /// The scalar's text and whether it was written without quotes.
    fn scalar(&self) -> Option<(&str, bool)> {
        match &self.value {
            Value::Scalar { text, plain } => Some((text, *plain)),
            Value::Sequence(_) | Value::Mapping(_) => None,
        }
    }

    fn plain(&self) -> Option<&str> {
        self.scalar().filter(|(_, plain)| *plain).map(|(text, _)| text)
    }

    /// Nothing was written: an empty value, `~` or `null`.
    #[must_use]
    pub fn is_null(&self) -> bool {
        self.plain().is_some_and(|text| matches!(text, "" | "~" | "null" | "Null" | "NULL"))
    }

    /// The value as text: any scalar, or what was typed on the command line.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.scalar().map(|(text, _)| text).or(self.typed.as_deref())
    }

    /// As [`Node::text`], but of the command line as it was typed, unless it is quoted: white space at
    /// its ends, ` #` and line breaks are part of a text there.
    #[must_use]
    pub fn verbatim(&self) -> Option<&str> {
        let is_quoted = self.scalar().is_some_and(|(_, plain)| !plain);
        if is_quoted { self.text() } else { self.typed.as_deref().or_else(|| self.text()) }
    }

    /// `true`, `yes`, `on` and their opposites.
    #[must_use]
    pub fn boolean(&self) -> Option<bool> {
        boolean(self.plain()?)
    }

    /// A finite number, with or without quotes.
    #[must_use]
    pub fn float(&self) -> Option<f64> {
        float(self.scalar()?.0)
    }

    /// An integer, also written `1_000`, `2.0` or `1e3`.
    #[must_use]
    pub fn integer(&self) -> Option<i64> {
        integer(self.plain()?)
    }

    /// What was found, for an error that expected something else.
    #[must_use]
    pub fn describe(&self) -> String {
        match &self.value {
            Value::Sequence(_) => "a list".into(),
            Value::Mapping(_) => "a mapping".into(),
            Value::Scalar { .. } if self.is_null() => "nothing".into(),
            Value::Scalar { text, plain: false } => {
                let unquoted = float(text).is_some() || boolean(text).is_some();
                let hint = if unquoted { " (remove the quotes)" } else { "" };
                format!("the text {text:?}{hint}")
            }
            Value::Scalar { text, plain: true } => {
                if boolean(text).is_some() {
                    text.clone()
                } else if float(text).is_some() {
                    format!("the number {text}")
                } else {
                    format!("the text {text:?}")
                }
            }
        }
    }

    /// The value on one line, as a notice shows it.
    #[must_use]
    pub fn show(&self) -> String {
        match &self.value {
            _ if self.is_null() => "null".into(),
            Value::Scalar { text, plain: true } => match &self.typed {
                Some(typed) if typed.trim() != text => format!("{typed:?}"),
                _ => text.clone(),
            },
            Value::Scalar { text, plain: false } => format!("{text:?}"),
            Value::Sequence(items) => {
                let items: Vec<_> = items.iter().map(Self::show).collect();
                format!("[{}]", items.join(", "))
            }
            Value::Mapping(entries) => {
                let entries: Vec<_> =
                    entries.iter().map(|e| format!("{}: {}", e.key, e.node.show())).collect();
                format!("{{{}}}", entries.join(", "))
            }
        }
    }
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => Some(true),
        "false" | "no" | "off" => Some(false),
        _ => None,
    }
}

/// Rust's parser also takes `nan` and `infinity`, which no setting can use.
fn float(text: &str) -> Option<f64> {
    let first_is_numeric =
        text.trim_start_matches(['+', '-']).starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if !first_is_numeric {
        return None;
    }
    without_underscores(text)?.parse().ok().filter(|value: &f64| value.is_finite())
}

fn integer(text: &str) -> Option<i64> {
    let digits = without_underscores(text)?;
    let magnitude = digits.trim_start_matches(['+', '-']);
    // YAML 1.1 reads 010 as eight and YAML 1.2 as ten: neither is what most people mean.
    if magnitude.len() > 1 && magnitude.starts_with('0') && !magnitude.starts_with("0.") {
        return None;
    }
    digits.parse().ok().or_else(|| {
        let value = float(&digits)?;
        // 2^53: beyond it a float no longer holds every integer.
        let exact = value.fract() == 0.0 && value.abs() <= 9_007_199_254_740_992.0;
        exact.then_some(value as i64)
    })
}

/// `1_000` means a thousand; an underscore anywhere else is not part of a number.
fn without_underscores(text: &str) -> Option<String> {
    let misplaced =
        text.split('_').skip(1).any(|part| !part.starts_with(|c: char| c.is_ascii_digit()));
    (!misplaced).then(|| text.replace('_', ""))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]

    use std::path::Path;

    use super::*;
    use crate::config::tree::{Place, parse};

    fn node(text: &str) -> Node {
        parse(&format!("- {text}"), &Place::start_of(Path::new("t.yaml")))
            .unwrap()
            .map(|list| match list.value {
                Value::Sequence(mut items) => items.remove(0),
                _ => unreachable!("a dash starts a list"),
            })
            .unwrap()
    }

    #[test]
    fn numbers_are_read_as_people_write_them() {
        let table = [
            ("5e-5", Some(5e-5)),
            ("5.0e-5", Some(5e-5)),
            ("1", Some(1.0)),
            (".5", Some(0.5)),
            ("-0.25", Some(-0.25)),
            ("+3", Some(3.0)),
            ("1_000", Some(1000.0)),
            ("\"5e-5\"", Some(5e-5)),
            ("'fast'", None),
            ("nan", None),
            (".inf", None),
            ("inf", None),
            ("1e999", None),
            ("_1", None),
            ("1__0", None),
            ("fast", None),
            ("5e-5x", None),
        ];
        for (text, expected) in table {
            assert_eq!(node(text).float(), expected, "{text}");
        }
    }

    #[test]
    fn integers_are_exact_or_refused() {
        let table = [
            ("8", Some(8)),
            ("2.0", Some(2)),
            ("1e3", Some(1000)),
            ("1_000", Some(1000)),
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("2.5", None),
            ("010", None),
            ("1e300", None),
            ("'8'", None),
            ("99999999999999999999", None),
        ];
        for (text, expected) in table {
            assert_eq!(node(text).integer(), expected, "{text}");
        }
    }

    #[test]
    fn a_scalar_is_what_its_reader_wants() {
        for (text, boolean) in [("no", false), ("Off", false), ("YES", true), ("true", true)] {
            assert_eq!(node(text).boolean(), Some(boolean), "{text}");
            assert_eq!(node(text).text(), Some(text));
        }
        assert_eq!(node("'no'").boolean(), None);
        assert_eq!(node("'no'").text(), Some("no"));
        for text in ["", "~", "null"] {
            assert!(node(text).is_null(), "{text}");
            assert!(!node(&format!("'{text}'")).is_null(), "{text}");
        }
        assert_eq!(node("!!str 5").integer(), None);
    }
}
