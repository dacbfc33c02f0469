//! What a worker tells its launcher while it works: the step it is in and what it does, so that a
//! hang can be told from a slow step, and the launcher can say which rank is where.
//!
//! The channel is one record of [`LENGTH`] bytes in a file in memory, named by
//! [`vars::RR_HEARTBEAT`], which the worker overwrites and the launcher reads. Nobody waits for
//! anybody: a heartbeat is a few stores to memory that both have mapped, also while the launcher is
//! stopped, and the last one outlives a worker that was killed or stopped. A worker without the
//! variable writes nothing, and a program that does not know it never does.
//!
//! A record is a line of text, padded with spaces:
//! `rr-heartbeat 412 waits all_reduce of layer 7`. A reader may see half of one and half of the next;
//! since it looks for whether they change, and the last one stays, that does not matter.

use std::fmt::{self, Write as _};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::vars;
use crate::sys;

/// Bytes of a record.
pub const LENGTH: usize = 128;

/// How a record begins, also before the first heartbeat: what does not is no heartbeat file, and is
/// left alone.
const MARK: &str = "rr-heartbeat";

const WAITS: &str = "waits";
const WORKS: &str = "works";

/// What a worker does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// The step it is in, from 1; 0 before the first.
    pub step: u64,
    /// Whether it waits for other workers.
    pub waits: bool,
    /// What it does: `reading data`, `all_reduce of layer 7`.
    pub phase: String,
}

impl Beat {
    /// Reads a record; `None` before the first heartbeat, and for what is no record.
    #[must_use]
    pub fn decode(record: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(record).ok()?.strip_prefix(MARK)?.trim();
        let (step, rest) = text.split_once(' ')?;
        let (kind, phase) = rest.split_once(' ')?;
        let waits = match kind {
            WAITS => true,
            WORKS => false,
            _ => return None,
        };
        Some(Self { step: step.parse().ok()?, waits, phase: phase.to_owned() })
    }
}

impl fmt::Display for Beat {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.step {
            0 => out.write_str(&self.phase),
            step => write!(out, "{}, step {step}", self.phase),
        }
    }
}

/// A record before the first heartbeat.
#[must_use]
pub fn blank() -> [u8; LENGTH] {
    Record::new().0
}

/// The step that this process is in, from 1; heartbeats that follow carry it.
pub fn enter_step(step: u64) {
    STEP.store(step, Ordering::Relaxed);
}

/// This process now works on `phase` (`format_args!("reading data")`).
pub fn working(phase: fmt::Arguments<'_>) {
    beat(WORKS, phase);
}

/// This process now waits for other workers in `phase` (`format_args!("all_reduce of layer 7")`).
pub fn waiting(phase: fmt::Arguments<'_>) {
    beat(WAITS, phase);
}

static STEP: AtomicU64 = AtomicU64::new(0);

fn beat(kind: &str, phase: fmt::Arguments<'_>) {
    static SHARED: OnceLock<Option<&[AtomicU64]>> = OnceLock::new();
    let Some(shared) = SHARED.get_or_init(open) else { return };
    let record = Record::of(STEP.load(Ordering::Relaxed), kind, phase);
    let (words, _) = record.0.as_chunks();
    for (shared, word) in shared.iter().zip(words) {
        shared.store(u64::from_ne_bytes(*word), Ordering::Relaxed);
    }
}

/// The record in the file that the launcher named, if it is one.
fn open() -> Option<&'static [AtomicU64]> {
    let path = std::env::var_os(vars::RR_HEARTBEAT)?;
    let file = File::options().read(true).write(true).open(path).ok()?;
    let mut mark = [0; MARK.len()];
    file.read_exact_at(&mut mark, 0).ok()?;
    if mark != *MARK.as_bytes() {
        return None;
    }
    sys::map_words(&file, LENGTH / size_of::<u64>()).ok()
}

/// A record under construction.
struct Record([u8; LENGTH], usize);

impl Record {
    fn new() -> Self {
        let mut record = Self([b' '; LENGTH], 0);
        record.push(MARK);
        record.0[LENGTH - 1] = b'\n';
        record
    }

    fn of(step: u64, kind: &str, phase: fmt::Arguments<'_>) -> Self {
        let mut record = Self::new();
        // Never an error: what is too long is cut.
        let _ = write!(record, " {step} {kind} {phase}");
        record
    }

    /// Appends as much as there is room for, up to a border of characters.
    fn push(&mut self, text: &str) {
        let room = LENGTH - 1 - self.1;
        let end = (0..=room.min(text.len())).rev().find(|&end| text.is_char_boundary(end));
        let text = &text[..end.unwrap_or(0)];
        self.0[self.1..self.1 + text.len()].copy_from_slice(text.as_bytes());
        self.1 += text.len();
    }
}

impl fmt::Write for Record {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.push(text);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_back() {
        let record = Record::of(412, WAITS, format_args!("all_reduce of layer {}", 7));
        let beat = Beat { step: 412, waits: true, phase: "all_reduce of layer 7".into() };
        assert_eq!(Beat::decode(&record.0), Some(beat.clone()));
        assert_eq!(beat.to_string(), "all_reduce of layer 7, step 412");
        let early = Record::of(0, WORKS, format_args!("loading the model"));
        assert_eq!(Beat::decode(&early.0).map(|b| b.to_string()), Some("loading the model".into()));
    }

    #[test]
    fn what_is_no_record_is_nothing() {
        assert_eq!(Beat::decode(&blank()), None);
        assert_eq!(Beat::decode(b"root:x:0:0"), None);
        assert_eq!(Beat::decode(b"rr-heartbeat many waits x"), None);
        assert_eq!(Beat::decode(b"rr-heartbeat 1 sleeps x"), None);
    }

    #[test]
    fn a_long_phase_is_cut_between_characters() {
        let record = Record::of(1, WORKS, format_args!("{}", "ä".repeat(200)));
        let beat = Beat::decode(&record.0).map(|beat| beat.phase);
        assert!(beat.is_some_and(|phase| phase.len() > 90 && phase.chars().all(|c| c == 'ä')));
        assert_eq!(record.0[LENGTH - 1], b'\n');
    }
}
