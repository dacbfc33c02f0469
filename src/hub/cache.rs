//! The cache of Python's `huggingface_hub` on disk.
//!
//! `models--ORG--NAME/` holds `blobs/ETAG`, the contents; `snapshots/COMMIT/FILE`, links to them; and
//! `refs/BRANCH`, the commit of a branch; an empty `.no_exist/COMMIT/FILE` says that the commit has no
//! such file. A download in progress is `blobs/ETAG.incomplete`, under
//! the lock `.locks/models--ORG--NAME/ETAG.lock`, which Python takes too.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::client::{Client, Failure};
use super::files;
use crate::atomic::has_no_locks;
use crate::error::{Error, Result};

/// The place of one model in the cache.
pub(super) struct CachedModel {
    dir: PathBuf,
    locks: PathBuf,
}

/// The files of a commit in the cache.
pub(super) struct Snapshot {
    pub(super) path: PathBuf,
    pub(super) commit: String,
    /// Whether it is known if the model has a `reranker.json`: what transformers or peft fetched is
    /// a whole model without it.
    pub(super) is_settled: bool,
}

impl CachedModel {
    /// The place of `name` (`name` or `org/name`) in `cache`; nothing is created.
    pub(super) fn new(cache: &Path, name: &str) -> Self {
        let folder = format!("models--{}", name.replace('/', "--"));
        Self { dir: cache.join(&folder), locks: cache.join(".locks").join(&folder) }
    }

    /// Where the files of `commit` are.
    pub(super) fn snapshot_dir(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    /// The snapshot of `revision`, a branch, tag or commit, where all is here that the model cannot be
    /// loaded without.
    pub(super) fn snapshot(&self, revision: &str) -> Option<Snapshot> {
        let commit = fs::read_to_string(self.dir.join("refs").join(revision));
        let commit = commit.map_or_else(|_| revision.to_owned(), |commit| commit.trim().to_owned());
        let path = self.snapshot_dir(&commit);
        let settled = [path.join(files::SIDECAR), self.absent(&commit, files::SIDECAR)];
        let is_settled = settled.iter().any(|path| path.exists());
        files::is_complete(&path).then_some(Snapshot { path, commit, is_settled })
    }

    /// Notes that `commit` has no file `name`, so that nobody asks again.
    pub(super) fn write_absent(&self, commit: &str, name: &str) -> Result<()> {
        let path = self.absent(commit, name);
        create_parent(&path)?;
        fs::write(&path, "").map_err(io(&path, "write"))
    }

    fn absent(&self, commit: &str, name: &str) -> PathBuf {
        self.dir.join(".no_exist").join(commit).join(name)
    }

    /// Notes that the branch or tag `revision` is at `commit`.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        if revision == commit {
            return Ok(());
        }
        let path = self.dir.join("refs").join(revision);
        create_parent(&path)?;
        fs::write(&path, commit).map_err(io(&path, "write"))
    }

    /// The file `name` of `commit`, downloaded where it is not here.
    pub(super) fn fetch(
        &self,
        client: &Client,
        commit: &str,
        name: &str,
    ) -> Result<PathBuf, Failure> {
        let link = self.snapshot_dir(commit).join(name);
        if link.exists() {
            return Ok(link);
        }
        let remote = client.head(commit, name)?;
        let lock = self.lock(&remote.etag)?;
        if link.exists() {
            // Another process has fetched it while this one waited.
            return Ok(link);
        }
        let blob = self.dir.join("blobs").join(&remote.etag);
        let is_whole = fs::metadata(&blob).is_ok_and(|data| data.len() == remote.size);
        if !is_whole {
            create_parent(&blob)?;
            let holder = if lock.is_some() { String::new() } else { this_process() };
            let partial = blob.with_file_name(format!("{}{holder}.incomplete", remote.etag));
            client.download(commit, name, remote.size, &partial)?;
            fs::rename(&partial, &blob).map_err(io(&blob, "rename to"))?;
        }
        create_parent(&link)?;
        point(&link, &blob)?;
        Ok(link)
    }

    /// Waits until no other process fetches `etag`; the lock goes with the file that is returned. `None` where
    /// the file system has no locks: another process may fetch it too.
    fn lock(&self, etag: &str) -> Result<Option<File>> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        let file = OpenOptions::new().create(true).append(true).open(&path);
        let file = file.map_err(io(&path, "create"))?;
        match file.lock() {
            Err(error) if has_no_locks(&error) => Ok(None),
            locked => locked.map(|()| Some(file)).map_err(io(&path, "lock")),
        }
    }
}

/// A part of a file's name that no other process has, on this host or another.
fn this_process() -> String {
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    format!(".{}-{}", host.trim(), std::process::id())
}

/// Points `link`, a file of a snapshot, to `blob`; copies it where links cannot be made.
fn point(link: &Path, blob: &Path) -> Result<()> {
    if !link.exists() {
        // A link that leads nowhere.
        let _ = fs::remove_file(link);
    }
    let target = Path::new("../../blobs").join(blob.file_name().unwrap_or_default());
    let made = match std::os::unix::fs::symlink(target, link) {
        // Made by another process, where no lock keeps it out: a copy would go through it onto the blob.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(_) => fs::copy(blob, link).map(drop),
        made => made,
    };
    made.map_err(io(link, "link"))
}

fn create_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(io(parent, "create the directory"))
}

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}
