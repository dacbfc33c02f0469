//! A data file to a [`Dataset`] with its [`LoadReport`].

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use tracing::info;

use super::build::{Builder, Built};
use super::cache::{self, CacheOptions};
use super::encode::{Encoder, LineBatch, LineBatches};
use super::lines::Lines;
use super::record::LabelRule;
use super::report::{LoadReport, grouped};
use super::store::Place;
use super::{Dataset, DatasetKind, RecordForm};
use crate::error::{Error, Result};
use crate::ordered::ordered_map;

/// What to load and how.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadOptions {
    /// UTF-8 JSON Lines, plain, gzip or zstd.
    pub path: PathBuf,
    /// How to use the records; `None` takes it from the first record.
    pub kind: Option<DatasetKind>,
    /// How to use a file whose first record has `pos` and `neg`, where `kind` is silent: such records are
    /// single pairs as much as a group.
    pub pos_neg: DatasetKind,
    /// The key of the label, in a pointwise record or in a hit; `None` reads no labels, and all are 0.
    pub label_key: Option<String>,
    /// The pointwise label that becomes 0.
    pub label_min: f64,
    /// The pointwise label that becomes 1.
    pub label_max: f64,
    /// Drop and count bad records rather than stop at the first.
    pub skip_bad_records: bool,
}

impl LoadOptions {
    /// Options with the defaults: kind from the first record, which makes a group of `pos` and `neg`, key
    /// `label`, labels from 0 to 1, a bad record is an error.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            kind: None,
            pos_neg: DatasetKind::Grouped,
            label_key: Some("label".to_owned()),
            label_min: 0.0,
            label_max: 1.0,
            skip_bad_records: false,
        }
    }

    fn check_range(&self) -> Result<()> {
        let range = self.label_min..self.label_max;
        if range.is_empty() || !(range.end - range.start).is_finite() {
            return Err(Error::Usage(format!(
                "the label range {} to {} is empty, expected max_label above min_label",
                range.start, range.end
            )));
        }
        Ok(())
    }

    /// How to use a file whose first record is of this form.
    fn kind_for(&self, form: RecordForm) -> DatasetKind {
        match form {
            RecordForm::Pointwise => DatasetKind::Pointwise,
            RecordForm::Grouped => DatasetKind::Grouped,
            RecordForm::PosNeg => self.pos_neg,
        }
    }

    fn rule(&self, kind: DatasetKind) -> LabelRule {
        let Self { label_key, label_min, label_max, .. } = self;
        LabelRule { key: label_key.clone(), kind, min: *label_min, max: *label_max }
    }
}

impl Dataset {
    /// Reads a file into memory; texts stay texts.
    ///
    /// # Errors
    /// [`Error::Data`] at the first bad record unless they are skipped; [`Error::File`] when
    /// nothing is left or the file breaks off; [`Error::Io`] when it cannot be opened;
    /// [`Error::Usage`] when the label range is empty.
    pub fn load(options: &LoadOptions) -> Result<(Self, LoadReport)> {
        let (dataset, report, _) = build(options, &Encoder::texts(), &Place::Memory)?;
        Ok((dataset, report))
    }

    /// Reads a file as [`Dataset::load`] does, or, where it is large or `cache` names a directory,
    /// through a cache on the disk: the first to ask tokenizes the file into it, all others map it.
    ///
    /// # Errors
    /// As [`Dataset::load`]; also when the cache cannot be written.
    pub fn open(options: &LoadOptions, cache: &CacheOptions) -> Result<(Self, LoadReport)> {
        match cache.directory_for(&options.path)? {
            Some(dir) => cache::load(options, cache, &dir),
            None => Self::load(options),
        }
    }
}

/// Batches that may wait for each thread.
const BATCHES_AHEAD: usize = 4;

/// Reads a file into `place`, all of it in one pass.
pub(super) fn build(options: &LoadOptions, encoder: &Encoder, place: &Place) -> Result<Built> {
    options.check_range()?;
    let (lines, read) = Lines::open(&options.path)?;
    let rule = options.kind.map(|kind| Arc::new(options.rule(kind)));
    let (fallback, owned) = (options.rule(DatasetKind::Pointwise), options.clone());
    let rule_for = Box::new(move |form| owned.rule(owned.kind_for(form)));
    let batches = LineBatches { lines, path: options.path.clone(), rule_for, rule };
    // Parsing alone keeps one thread busy for as long as reading takes.
    let cores = available_parallelism().map_or(1, usize::from);
    let threads = if encoder.tokenizes() { cores } else { 1 };
    let worker = encoder.clone();
    let work = move |batch: LineBatch| Ok(batch.encode(&worker, &fallback));
    let mut builder = Builder::new(options, encoder, place)?;
    let mut progress = Progress::new(options, read);
    for batch in ordered_map(batches, threads, threads * BATCHES_AHEAD, work)? {
        builder.take(batch?)?;
        progress.tell(builder.records());
    }
    builder.finish()
}

/// A line every few seconds for files that take long.
struct Progress<'a> {
    options: &'a LoadOptions,
    /// Bytes of the file read so far, before decompression.
    read: Arc<AtomicU64>,
    size: u64,
    started: Instant,
    told: Instant,
}

impl<'a> Progress<'a> {
    const INTERVAL: Duration = Duration::from_secs(5);

    fn new(options: &'a LoadOptions, read: Arc<AtomicU64>) -> Self {
        let size = options.path.metadata().map_or(0, |data| data.len());
        let now = Instant::now();
        Self { options, read, size, started: now, told: now }
    }

    fn tell(&mut self, records: usize) {
        if self.told.elapsed() < Self::INTERVAL {
            return;
        }
        self.told = Instant::now();
        let share = 100.0 * self.read.load(Ordering::Relaxed) as f64 / self.size.max(1) as f64;
        let rate = records as f64 / self.started.elapsed().as_secs_f64();
        info!(
            "reading {}: {:.0} %, {} records, {} a second",
            self.options.path.display(),
            share.min(100.0),
            grouped(records),
            grouped(rate as usize)
        );
    }
}

#[cfg(test)]
#[path = "load_tests.rs"]
mod tests;
