//! What a PyTorch program says of its own failure: the file of `@record`
//! (`torch.distributed.elastic.multiprocessing.errors`), which torchrun's variable
//! `TORCHELASTIC_ERROR_FILE` names.
//!
//! A rank that fails first may end last: it waits for its peers in an exit handler while they fail over
//! its silence. Its record is written where the exception is caught, before any of that.

use std::path::Path;
use std::time::{Duration, SystemTime};
use std::{fs, io};

use serde_json::{Value, json};

/// Of a longer record only so much is read, which is then no JSON, and of no use.
pub const MOST_BYTES: usize = 1 << 20;

/// Of a message so much is said on the console.
const HEADLINE_CHARS: usize = 300;

/// An exception that a worker has recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerError {
    /// Its kind and message: `ValueError: no such column`.
    pub message: String,
    /// Python's traceback, where the record has one.
    pub traceback: Option<String>,
    /// From the worker's start to the record.
    pub after: Duration,
}

impl WorkerError {
    /// Reads a record. `None` where it is empty or of another form.
    #[must_use]
    pub fn decode(record: &[u8], after: Duration) -> Option<Self> {
        let record: Value = serde_json::from_slice(record).ok()?;
        let message = &record["message"];
        // torch.distributed.elastic also knows records whose message is plain text.
        let text = message["message"].as_str().or_else(|| message.as_str())?;
        let traceback = message["extraInfo"]["py_callstack"].as_str().map(str::to_owned);
        Some(Self { message: text.to_owned(), traceback, after })
    }

    /// The first line of the message that says something, cut where it is long.
    #[must_use]
    pub fn headline(&self) -> String {
        let mut lines = self.message.lines().map(str::trim);
        let line = lines.find(|line| !line.is_empty()).unwrap_or_default();
        match line.char_indices().nth(HEADLINE_CHARS) {
            Some((end, _)) => format!("{}...", &line[..end]),
            None => line.to_owned(),
        }
    }

    /// Writes it, in torch's form, where whoever started the launcher wants to read it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write(&self, path: &Path, exit_code: u8) -> io::Result<()> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let extra = json!({
            "py_callstack": self.traceback.as_deref().unwrap_or(&self.message),
            "timestamp": now.as_secs().to_string(),
        });
        let message = json!({"message": self.message, "extraInfo": extra, "errorCode": exit_code});
        fs::write(path, json!({"message": message}).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_both_forms_are_read_and_others_are_none() {
        let after = Duration::from_secs(3);
        let read = |text: &str| WorkerError::decode(text.as_bytes(), after);
        let full = r#"{"message": {"message": "ValueError: \nno such column\nx", "extraInfo":
            {"py_callstack": "Traceback", "timestamp": "1795849699"}}}"#;
        let error = WorkerError {
            message: "ValueError: \nno such column\nx".to_owned(),
            traceback: Some("Traceback".to_owned()),
            after,
        };
        assert_eq!(read(full), Some(error.clone()));
        assert_eq!(error.headline(), "ValueError:");
        let long = WorkerError { message: "\u{e9}".repeat(400), ..error };
        assert_eq!(long.headline().chars().count(), HEADLINE_CHARS + 3);
        let plain = read(r#"{"message": "out of cheese"}"#).map(|error| error.message);
        assert_eq!(plain.as_deref(), Some("out of cheese"));
        for other in ["", "{", "3", r#"{"message": 3}"#, r#"{"message": {"text": "x"}}"#] {
            assert_eq!(read(other), None, "{other}");
        }
    }
}
