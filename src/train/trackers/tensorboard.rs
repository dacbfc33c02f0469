//! `TensorBoard` event files: `TFRecord`s (length, data, and a masked CRC-32C of each) of `Event`
//! protocol buffers (`tensorflow/core/util/event.proto`), of which a handful of fields are needed.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::error::{Error, Result};

/// Protocol buffer wire types.
const VARINT: u64 = 0;
const FIXED64: u64 = 1;
const BYTES: u64 = 2;
const FIXED32: u64 = 5;

/// `SessionLog.SessionStatus.START`: readers drop what an earlier start wrote from this step on.
const SESSION_START: u64 = 1;

/// An event file that a run appends to.
#[derive(Debug)]
pub(super) struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// A new file in `dir`, named as `TensorBoard` looks for it, for a run that goes on after
    /// `done` steps, or begins.
    ///
    /// # Errors
    /// [`Error::Io`] with the file.
    pub(super) fn create(dir: &Path, done: usize) -> Result<Self> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let (seconds, process) = (now() as u64, std::process::id());
        let name = format!("events.out.tfevents.{seconds:010}.{}.{process}.0", host.trim());
        let path = dir.join(name);
        let file = File::create(&path).map_err(|source| Error::Io {
            path: path.clone(),
            action: "create",
            source,
        })?;
        let mut this = Self { path, file };
        // Event.file_version
        this.append(|event| bytes(event, 3, b"brain.Event:2"))?;
        let mut session = Vec::new();
        varint(&mut session, 1, SESSION_START);
        // A run that begins anew in the directory of another leaves nothing of that one's curves.
        let first = if done > 0 { done as u64 + 1 } else { 0 };
        this.append(|event| {
            varint(event, 2, first);
            // Event.session_log
            bytes(event, 7, &session);
        })?;
        Ok(this)
    }

    /// Appends figures of one step.
    ///
    /// # Errors
    /// [`Error::Io`] with the file.
    pub(super) fn log(&mut self, step: u64, figures: &[(String, f64)]) -> Result<()> {
        let mut summary = Vec::new();
        for (tag, figure) in figures {
            let mut value = Vec::new();
            bytes(&mut value, 1, tag.as_bytes());
            key(&mut value, 2, FIXED32);
            value.extend((*figure as f32).to_le_bytes());
            bytes(&mut summary, 1, &value);
        }
        self.append(|event| {
            varint(event, 2, step);
            // Event.summary
            bytes(event, 5, &summary);
        })
    }

    fn append(&mut self, fill: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut event = Vec::new();
        // Event.wall_time
        key(&mut event, 1, FIXED64);
        event.extend(now().to_le_bytes());
        fill(&mut event);
        let length = (event.len() as u64).to_le_bytes();
        let checks = [masked_crc(&length), masked_crc(&event)].map(u32::to_le_bytes);
        let record = [&length[..], &checks[0], &event, &checks[1]].concat();
        self.file.write_all(&record).map_err(|source| Error::Io {
            path: self.path.clone(),
            action: "write",
            source,
        })
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// CRC-32C, rotated and shifted as `TFRecord` wants it, so that checksums of checksums are sound.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn key(out: &mut Vec<u8>, field: u64, wire: u64) {
    number(out, field << 3 | wire);
}

fn varint(out: &mut Vec<u8>, field: u64, value: u64) {
    key(out, field, VARINT);
    number(out, value);
}

fn bytes(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, BYTES);
    number(out, value.len() as u64);
    out.extend_from_slice(value);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use super::*;

    /// The data of each record, with both checksums compared.
    fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        while !file.is_empty() {
            let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
            let check = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().unwrap());
            assert_eq!(check(8), masked_crc(&file[..8]));
            let data = file[12..12 + length].to_vec();
            assert_eq!(check(12 + length), masked_crc(&data));
            all.push(data);
            file = &file[16 + length..];
        }
        all
    }

    #[test]
    fn records_hold_steps_tags_and_values() {
        // The check value of CRC-32C's catalogue entry.
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let root = tempfile::tempdir().unwrap();
        let mut file = EventFile::create(root.path(), 7).unwrap();
        file.log(300, &[("train/loss".into(), 0.5)]).unwrap();
        let path = file.path.clone();
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let records = records(&std::fs::read(path).unwrap());
        // Behind the wall time, which takes nine bytes.
        let rest: Vec<&[u8]> = records.iter().map(|record| &record[9..]).collect();
        assert_eq!(rest[0], b"\x1a\x0dbrain.Event:2");
        assert_eq!(rest[1], b"\x10\x08\x3a\x02\x08\x01");
        let half = 0.5_f32.to_le_bytes();
        let value = [&b"\x0a\x0atrain/loss\x15"[..], &half].concat();
        let expected = [&b"\x10\xac\x02\x2a\x13\x0a\x11"[..], &value].concat();
        assert_eq!(rest[2], expected);
        assert_eq!(records.len(), 3);
    }

    #[test]
    fn a_run_that_begins_anew_drops_what_another_has_logged() {
        let root = tempfile::tempdir().unwrap();
        let file = EventFile::create(root.path(), 0).unwrap();
        let records = records(&std::fs::read(file.path).unwrap());
        assert_eq!(records[1][9..], *b"\x10\x00\x3a\x02\x08\x01");
    }
}
