//! Data sets on the disk, read and tokenized once and mapped by every worker.
//!
//! A cache is a directory of sections with a `header.json`. Its name comes from what was asked for
//! (the file's path, label rules, tokenizer), so a file that changed replaces its own cache; the
//! header says in full what it was made from. It appears by a rename once it is complete. One
//! worker builds, under a lock; the others wait and map the same pages.

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::hash::{DefaultHasher, Hasher as _};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::build::{Built, DOCUMENTS, GROUPS, PAIRS, QUERIES, Sections};
use super::encode::{Encode, Encoder};
use super::load::{LoadOptions, build};
use super::report::LoadReport;
use super::store::{Bytes, Checksum, Form, Place, Table};
use super::{Dataset, DatasetKind};
use crate::atomic::{StagedDir, create_dir, has_no_locks, write_synced};
use crate::error::{Error, Result};
use crate::mapped::Mapped;

/// Changes with the layout of the sections, and with what a line is read as.
const FORMAT: u32 = 3;

const HEADER: &str = "header.json";

/// Plain files above this size are cached; below, reading them again is as quick.
const LARGE_BYTES: u64 = 32 << 20;

/// The same for compressed ones, which hold several times as much.
const LARGE_COMPRESSED_BYTES: u64 = LARGE_BYTES / 8;

/// When and how data sets are cached.
#[derive(Debug, Clone)]
pub struct CacheOptions {
    /// Where caches are kept; every file has one then. `None` keeps those of large files in the
    /// user's cache directory.
    pub dir: Option<PathBuf>,
    /// Turns queries and documents into the tokens that are kept.
    pub encoder: Arc<dyn Encode>,
    /// Keep documents as texts, for augmentation.
    pub document_texts: bool,
}

impl CacheOptions {
    /// The directory of caches for `path`, or `None` where it is not cached.
    pub(super) fn directory_for(&self, path: &Path) -> Result<Option<PathBuf>> {
        if let Some(dir) = &self.dir {
            return Ok(Some(dir.clone()));
        }
        // A file that cannot be opened is reported by the load.
        if !fs::metadata(path).is_ok_and(|data| data.is_file() && is_large(path, data.len())) {
            return Ok(None);
        }
        let below = |name, rest| {
            let value = std::env::var_os(name).filter(|value| !value.is_empty())?;
            Some(PathBuf::from(value).join(rest))
        };
        let dir = below("RERANKER_CACHE", "data")
            .or_else(|| below("XDG_CACHE_HOME", "reranker/data"))
            .or_else(|| below("HOME", ".cache/reranker/data"));
        dir.map(Some).ok_or_else(|| Error::File {
            path: path.to_owned(),
            message: "is large enough to need a cache on the disk, but neither HOME nor \
                      XDG_CACHE_HOME is set; set cache_dir to a directory"
                .to_owned(),
        })
    }
}

fn is_large(path: &Path, bytes: u64) -> bool {
    let name = path.extension().unwrap_or_default();
    let compressed = name == "gz" || name == "zst";
    bytes > if compressed { LARGE_COMPRESSED_BYTES } else { LARGE_BYTES }
}

/// All that a cache depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[allow(clippy::struct_field_names, reason = "the key of the labels is called so")]
struct Key {
    format: u32,
    version: String,
    /// The file's absolute path.
    path: String,
    /// Its size, and the seconds and nanoseconds of its times of modification and change.
    bytes: u64,
    times: [i64; 4],
    kind: Option<DatasetKind>,
    pos_neg: DatasetKind,
    label_key: Option<String>,
    label_range: [f64; 2],
    skip_bad_records: bool,
    tokenizer: u64,
    forms: [Form; 2],
}

impl Key {
    fn new(options: &LoadOptions, cache: &CacheOptions, forms: [Form; 2]) -> Result<Self> {
        let io = |source| Error::Io { path: options.path.clone(), action: "open", source };
        let path = options.path.canonicalize().map_err(io)?;
        let data = fs::metadata(&path).map_err(io)?;
        Ok(Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            path: path.to_string_lossy().into_owned(),
            bytes: data.len(),
            times: [data.mtime(), data.mtime_nsec(), data.ctime(), data.ctime_nsec()],
            kind: options.kind,
            pos_neg: options.pos_neg,
            label_key: options.label_key.clone(),
            label_range: [options.label_min, options.label_max],
            skip_bad_records: options.skip_bad_records,
            tokenizer: cache.encoder.fingerprint(),
            forms,
        })
    }

    /// The name of the cache: what was asked for, without the state of the file.
    fn name(&self) -> String {
        let asked = Self { bytes: 0, times: [0; 4], ..self.clone() };
        let mut hasher = DefaultHasher::new();
        hasher.write(serde_json::to_string(&asked).unwrap_or_default().as_bytes());
        let file = Path::new(&self.path).file_name().unwrap_or_default().to_string_lossy();
        format!("{file}-{:016x}", hasher.finish())
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    key: Key,
    report: LoadReport,
    sections: Sections,
}

/// Opens the cache of a file below `dir`, built first where there is none or it is not whole.
pub(super) fn load(
    options: &LoadOptions,
    cache: &CacheOptions,
    dir: &Path,
) -> Result<(Dataset, LoadReport)> {
    let encoder = Encoder::tokens(Arc::clone(&cache.encoder), cache.document_texts);
    let key = Key::new(options, cache, encoder.forms)?;
    let target = dir.join(key.name());
    if let Ok(Some(found)) = open(&target, &key, options) {
        return Ok(found);
    }
    create_dir(dir)?;
    let lock = lock(&target)?;
    // Another worker may have built it in the meantime.
    match open(&target, &key, options) {
        Ok(Some(found)) => return Ok(found),
        Ok(None) => {}
        Err(reason) => warn!("{}: {reason}; it is built anew", target.display()),
    }
    let is_alone = lock.is_some();
    let staged = if is_alone { StagedDir::new(&target) } else { StagedDir::apart(&target) }?;
    let place = Place::Directory(staged.path().to_owned());
    let (dataset, report, sections): Built = build(options, &encoder, &place)?;
    let header = Header { key, report, sections };
    let json = serde_json::to_string(&header).unwrap_or_default();
    let checksum = Checksum::of(json.as_bytes()).crc32;
    write_synced(&staged.path().join(HEADER), format!("{json}\n{checksum}\n").as_bytes())?;
    match staged.publish() {
        // Another worker may have put its own there in the same moment; this one has what it needs.
        Err(error) if !is_alone => {
            warn!("{error}; it is used all the same");
            return Ok((dataset, header.report));
        }
        published => published?,
    }
    let bytes: u64 = header.sections.values().map(|section| section.bytes).sum();
    info!(
        "wrote {} ({:.1} MB); it may be removed at any time",
        target.display(),
        bytes as f64 / 1e6
    );
    Ok((dataset, header.report))
}

/// Waits for the right to build `target`; it ends with the file or the process. `None` where the file system
/// has no locks, so that others may build it too.
fn lock(target: &Path) -> Result<Option<File>> {
    const LOOK_EVERY: Duration = Duration::from_millis(50);
    const TELL_EVERY: Duration = Duration::from_secs(5);
    let mut path = target.as_os_str().to_owned();
    path.push(".lock");
    let path = PathBuf::from(path);
    let io = |action| {
        let path = path.clone();
        move |source| Error::Io { path, action, source }
    };
    let file = File::create(&path).map_err(io("create"))?;
    let mut told = Instant::now();
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(TryLockError::WouldBlock) => sleep(LOOK_EVERY),
            Err(TryLockError::Error(error)) if has_no_locks(&error) => {
                warn!(
                    "the file system of {} has no locks: workers that start at once each build it",
                    target.display()
                );
                return Ok(None);
            }
            Err(TryLockError::Error(source)) => return Err(io("lock")(source)),
        }
        if told.elapsed() > TELL_EVERY {
            told = Instant::now();
            info!("waiting for another worker, which builds {}", target.display());
        }
    }
}

/// The cache at `target`: `None` where there is none, and why where it cannot be used.
fn open(
    target: &Path,
    key: &Key,
    options: &LoadOptions,
) -> Result<Option<(Dataset, LoadReport)>, String> {
    let text = match fs::read_to_string(target.join(HEADER)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && !target.exists() => {
            return Ok(None);
        }
        Err(error) => return Err(format!("not a data cache: {error}")),
    };
    let whole = text
        .trim_end()
        .rsplit_once('\n')
        .filter(|(json, checksum)| checksum.parse() == Ok(Checksum::of(json.as_bytes()).crc32));
    let header = whole.and_then(|(json, _)| serde_json::from_str::<Header>(json).ok());
    let Some(Header { key: found, report, sections }) = header else {
        return Err(format!("damaged: {HEADER} is not what was written"));
    };
    if found != *key {
        return Err("made from another state of the file".to_owned());
    }
    let mut maps = BTreeMap::new();
    for (name, &expected) in &sections {
        let path = target.join(name);
        match checksum_of(&path) {
            Ok(found) if found == expected => {}
            Ok(_) => return Err(format!("damaged: {name} is not what was written")),
            Err(error) => return Err(format!("damaged: {name}: {error}")),
        }
        maps.insert(name.as_str(), Mapped::open(&path).map_err(|error| error.to_string())?);
    }
    let mut take = |name: &str| {
        let map = maps.remove(name).ok_or_else(|| format!("damaged: there is no {name}"))?;
        Ok::<_, String>(Bytes::Mapped(map))
    };
    let mut table = |name: &str, form| {
        Ok::<_, String>(Table::new(form, take(&format!("{name}.ends"))?, take(name)?))
    };
    let [query_form, document_form] = key.forms;
    let (queries, documents) = (table(QUERIES, query_form)?, table(DOCUMENTS, document_form)?);
    let (path, kind) = (options.path.clone(), report.kind);
    let (pairs, groups) = (take(PAIRS)?, take(GROUPS)?);
    let dataset = Dataset { path: path.clone(), kind, queries, documents, pairs, groups };
    Ok(Some((dataset, LoadReport { path, ..report })))
}

/// Reads a file through once; that also brings it into the page cache in order.
fn checksum_of(path: &Path) -> io::Result<Checksum> {
    let mut file = File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let mut hasher = crc32fast::Hasher::new();
    let mut bytes = 0;
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(Checksum { bytes, crc32: hasher.finalize() });
        }
        hasher.update(&buffer[..read]);
        bytes += read as u64;
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
