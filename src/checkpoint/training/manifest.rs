//! The manifest of a checkpoint: what it holds and what it belongs to.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{damaged, read};
use crate::atomic::write_synced;
use crate::error::{Error, Result};
use crate::optim::LossScale;
use crate::shard::FlatUnit;

/// The manifest's name inside a checkpoint.
pub(super) const FILE_NAME: &str = "manifest.json";

/// The version of the format that this program writes; it reads this one only.
const FORMAT_VERSION: u32 = 1;

/// The first line of the file, around the checksum of everything behind it.
const OPENING: &str = "{\"crc32\":\"";
const CLOSING: &str = "\",\n";

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Optimizer steps taken.
    pub step: usize,
    /// The epoch of the next step, from 0.
    pub epoch: usize,
    /// Items (pairs, or groups) of that epoch that steps have used.
    pub items: usize,
}

impl Progress {
    /// A step was taken, which used `items` of the epoch, and perhaps ended it.
    pub fn advance(&mut self, items: usize, ends_epoch: bool) {
        self.step += 1;
        self.items += items;
        if ends_epoch {
            self.epoch += 1;
            self.items = 0;
        }
    }
}

/// What a run trains on and how, by name. A run goes on from its own checkpoints only.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Identity(pub BTreeMap<String, Value>);

impl Identity {
    /// What differs in `other`, a line each: `lr: 2e-5 there, 1e-5 here`; among the names that
    /// `counts` holds for.
    #[must_use]
    pub fn differences(&self, other: &Self, counts: impl Fn(&str) -> bool) -> Vec<String> {
        let names: std::collections::BTreeSet<_> = self.0.keys().chain(other.0.keys()).collect();
        let text = |value: Option<&Value>| value.map_or("nothing".to_owned(), Value::to_string);
        names
            .into_iter()
            .filter(|name| self.0.get(*name) != other.0.get(*name) && counts(name))
            .map(|name| {
                let (there, here) = (text(self.0.get(name)), text(other.0.get(name)));
                format!("{name}: {there} there, {here} here")
            })
            .collect()
    }
}

/// A file of a checkpoint, as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its path inside the checkpoint.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// CRC-32 (ISO-HDLC, as in gzip) of all of it.
    pub crc32: u32,
}

/// A tensor's place in a flat unit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartRecord {
    /// Its checkpoint name.
    pub name: String,
    /// Its first element in the unit's buffer.
    pub start: usize,
    /// Its shape.
    pub shape: Vec<i64>,
}

/// A flat unit: the buffers that the ranks' files hold parts of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnitRecord {
    /// Elements of each buffer, padding included; divides by the number of rank files.
    pub length: usize,
    /// The tensors in it.
    pub parts: Vec<PartRecord>,
}

impl UnitRecord {
    /// The record of a unit.
    #[must_use]
    pub fn of(unit: &FlatUnit) -> Self {
        let layout = unit.layout();
        let parts = layout.places.iter().flat_map(|place| &place.parts).map(|(spec, range)| {
            PartRecord { name: spec.name.clone(), start: range.start, shape: spec.shape.clone() }
        });
        Self { length: layout.length, parts: parts.collect() }
    }
}

/// What `manifest.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of the format.
    pub format_version: u32,
    /// The program that wrote it.
    pub program: String,
    /// How far the run is.
    pub progress: Progress,
    /// Pairs or groups per optimizer step.
    pub items_per_step: usize,
    /// Workers of the run.
    pub world_size: usize,
    /// Files of states; each holds an equal part of every unit.
    pub rank_files: usize,
    /// The loss scale of an fp16 run.
    pub loss_scale: Option<LossScale>,
    /// What the run is.
    pub identity: Identity,
    /// What the job keeps besides: the best validation, for example.
    pub job: Value,
    /// The flat units.
    pub units: Vec<UnitRecord>,
    /// Every file of the checkpoint but this one.
    pub files: Vec<FileRecord>,
}

impl Manifest {
    /// The version that [`Manifest::write`] writes.
    #[must_use]
    pub fn version() -> u32 {
        FORMAT_VERSION
    }

    /// A checksum of all it says.
    #[must_use]
    pub fn fingerprint(&self) -> u32 {
        crc32fast::hash(&serde_json::to_vec(self).unwrap_or_default())
    }

    /// Writes the manifest into the checkpoint `dir`, with a checksum of its own.
    ///
    /// # Errors
    /// [`crate::Error::Io`] with the file.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(FILE_NAME);
        let json = serde_json::to_string_pretty(self)
            .map_err(|error| damaged(&path, format!("cannot be written: {error}")))?;
        let body = json.strip_prefix('{').unwrap_or(&json).trim_start_matches('\n').to_owned();
        let crc32 = crc32fast::hash(body.as_bytes());
        write_synced(&path, format!("{OPENING}{crc32:08x}{CLOSING}{body}").as_bytes())
    }

    /// Whether the checkpoint `dir` is seen to have one.
    #[must_use]
    pub fn is_in(dir: &Path) -> bool {
        dir.join(FILE_NAME).exists()
    }

    /// Reads the manifest of the checkpoint `dir`.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when it is missing, [`crate::Error::File`] when it is damaged,
    /// [`crate::Error::OtherVersion`] when it is of a version that is not known here.
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let bytes = read(&path)?;
        let text = String::from_utf8(bytes).map_err(|_| damaged(&path, "damaged: not UTF-8"))?;
        let rest = text.strip_prefix(OPENING).and_then(|rest| rest.split_once(CLOSING));
        let (written, body) = rest.ok_or_else(|| damaged(&path, "damaged: no checksum"))?;
        let found = format!("{:08x}", crc32fast::hash(body.as_bytes()));
        if written != found {
            let message = format!("damaged: its checksum is {found}, not {written} as written");
            return Err(damaged(&path, message));
        }
        let value: Value = serde_json::from_str(&text)
            .map_err(|error| damaged(&path, format!("not valid JSON: {error}")))?;
        let version = value["format_version"].as_u64();
        if version != Some(u64::from(FORMAT_VERSION)) {
            let (found, program) = (value["format_version"].to_string(), &value["program"]);
            let program = program.as_str().unwrap_or("an unknown program").to_owned();
            return Err(Error::OtherVersion { path, found, known: FORMAT_VERSION, program });
        }
        serde_json::from_value(value)
            .map_err(|error| damaged(&path, format!("not a manifest: {error}")))
    }
}
