//! A text with one gap, as `query_format` and `document_format` give it.

use crate::error::{Error, Result};

/// What stands before and after a text.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct TextFormat {
    prefix: String,
    suffix: String,
}

/// What is wrong with a format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FormatFault {
    NoGap,
    /// More than one.
    Gaps,
    LoneBrace,
}

impl FormatFault {
    fn what(self) -> &'static str {
        match self {
            Self::NoGap => "has no gap",
            Self::Gaps => "has more than one gap",
            Self::LoneBrace => "has a lone brace",
        }
    }
}

impl TextFormat {
    /// Reads a format in Python's `str.format` notation with exactly one `{}`; `{{` and `}}` stand
    /// for braces. `key` is the name of the setting, for the error.
    ///
    /// # Errors
    /// [`Error::Usage`] when there is no gap, more than one, or a lone brace.
    pub fn parse(format: &str, key: &str) -> Result<Self> {
        Self::read(format).map_err(|fault| {
            let (what, expected) = (fault.what(), "expected one {}, with {{ and }} for braces");
            Error::Usage(format!("{key} \"{format}\" {what}, {expected}"))
        })
    }

    /// As [`Self::parse`], for who words the error.
    pub(super) fn read(format: &str) -> std::result::Result<Self, FormatFault> {
        let mut parts = vec![String::new()];
        let mut rest = format.chars().peekable();
        while let Some(c) = rest.next() {
            let followed_by =
                rest.next_if(|&next| matches!((c, next), ('{', '{' | '}') | ('}', '}')));
            match (c, followed_by) {
                ('{', Some('}')) => parts.push(String::new()),
                ('{' | '}', None) => return Err(FormatFault::LoneBrace),
                _ => parts.last_mut().into_iter().for_each(|part| part.push(c)),
            }
        }
        match <[String; 2]>::try_from(parts) {
            Ok([prefix, suffix]) => Ok(Self { prefix, suffix }),
            Err(parts) if parts.len() == 1 => Err(FormatFault::NoGap),
            Err(_) => Err(FormatFault::Gaps),
        }
    }

    /// The text in its place.
    #[must_use]
    pub fn apply(&self, text: &str) -> String {
        [&self.prefix, text, &self.suffix].concat()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn formats_are_applied_as_python_would() {
        for (format, expected) in [
            ("{}", "text"),
            ("query: {}", "query: text"),
            ("{{A}} {}\n", "{A} text\n"),
            ("<{{{}}}>", "<{text}>"),
        ] {
            assert_eq!(TextFormat::parse(format, "query_format").unwrap().apply("text"), expected);
        }
    }

    #[test]
    fn bad_formats_are_refused() {
        for (format, what) in [
            ("", "has no gap"),
            ("{{}}", "has no gap"),
            ("{} {}", "has more than one gap"),
            ("{0}", "has a lone brace"),
            ("{} }", "has a lone brace"),
        ] {
            let error = TextFormat::parse(format, "query_format").unwrap_err().to_string();
            let expected = "expected one {}, with {{ and }} for braces";
            assert_eq!(error, format!("query_format \"{format}\" {what}, {expected}"));
        }
    }
}
