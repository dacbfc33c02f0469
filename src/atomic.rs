//! Files and directories that are either whole or not there.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, AsRawFd as _};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, PROC_SUPER_MAGIC, RenameFlags, linkat, openat, renameat_with,
    statfs,
};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// What the old version ends with while it makes place for the new one.
const OLD: &str = "old";

/// What the new version ends with where the old one has to be removed to make place for it.
pub(crate) const READY: &str = "ready";

fn io(path: &Path, action: &'static str) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}

/// Creates `dir` and its parents.
///
/// # Errors
/// [`Error::Io`] with the directory.
pub fn create_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).map_err(io(dir, "create the directory"))
}

/// Creates `dir` and its parents, and flushes the entry of each that is new: a file flushed inside
/// is found again after a power loss.
///
/// # Errors
/// [`Error::Io`] with the directory.
pub fn create_dir_synced(dir: &Path) -> Result<()> {
    let absolute = std::path::absolute(dir).map_err(io(dir, "find"))?;
    let new = absolute.ancestors().take_while(|path| !path.exists()).collect::<Vec<_>>();
    create_dir(&absolute)?;
    new.into_iter().filter_map(Path::parent).try_for_each(sync_dir)
}

/// Removes `dir` with all it holds.
///
/// # Errors
/// [`Error::Io`] with the directory.
pub fn remove_dir(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).map_err(io(dir, "remove"))
}

/// Removes the file `path`.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn remove_file(path: &Path) -> Result<()> {
    fs::remove_file(path).map_err(io(path, "remove"))
}

/// Writes a whole file and flushes it to the disk.
///
/// # Errors
/// [`Error::Io`] with the file.
pub fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(io(path, "create"))?;
    file.write_all(bytes).map_err(io(path, "write"))?;
    file.sync_all().map_err(io(path, "flush"))
}

/// Whether a lock failed because the file system has none.
pub(crate) fn has_no_locks(error: &std::io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOSYS | Errno::NOTSUP | Errno::NOLCK))
}

/// A directory under construction beside its final place. Dropped without
/// [`StagedDir::publish`], it is removed again.
#[derive(Debug)]
pub struct StagedDir {
    staging: PathBuf,
    target: PathBuf,
    published: bool,
}

impl StagedDir {
    /// Starts a directory that will become `target`. What an earlier run left half-built for the
    /// same target is removed.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn new(target: &Path) -> Result<Self> {
        create_dir(target.parent().unwrap_or(Path::new(".")))?;
        Self::clear_leftovers(target)?;
        let staging = Self::staging(target);
        fs::create_dir(&staging).map_err(io(&staging, "create the directory"))?;
        Ok(Self { staging, target: target.to_owned(), published: false })
    }

    /// As [`StagedDir::new`], for where nothing keeps two processes from building the same target at a time:
    /// this one touches nothing that another has there.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn apart(target: &Path) -> Result<Self> {
        create_dir(target.parent().unwrap_or(Path::new(".")))?;
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let mut number = 0_u64;
        loop {
            let staging = target.with_file_name(format!(".{name}.{number}.partial"));
            match fs::create_dir(&staging) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => number += 1,
                created => {
                    created.map_err(io(&staging, "create the directory"))?;
                    return Ok(Self { staging, target: target.to_owned(), published: false });
                }
            }
        }
    }

    fn staging(target: &Path) -> PathBuf {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        target.with_file_name(format!(".{name}.partial"))
    }

    /// Removes what an earlier run left half-built for `target`. A run that ended between the steps
    /// of an exchange on a file system that needs several has left the old version beside its
    /// place: it goes back where nothing else is there. A new version that was whole and waited for its
    /// place takes it.
    ///
    /// # Errors
    /// [`Error::Io`] when something cannot be removed or moved.
    pub fn clear_leftovers(target: &Path) -> Result<()> {
        let staging = Self::staging(target);
        let (aside, ready) = (staging.with_extension(OLD), staging.with_extension(READY));
        if ready.exists() {
            if target.exists() {
                remove(target).map_err(io(target, "remove the old version of"))?;
            }
            fs::rename(&ready, target).map_err(io(target, "rename to"))?;
            sync_dir(parent_of(target))?;
        }
        if aside.exists() && !target.exists() {
            fs::rename(&aside, target).map_err(io(target, "put back"))?;
            sync_dir(parent_of(target))?;
        }
        for leftover in [staging, aside] {
            if leftover.exists() {
                remove(&leftover).map_err(io(&leftover, "remove the leftover"))?;
            }
        }
        Ok(())
    }

    /// Where to write the files.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.staging
    }

    /// Moves the directory to its place in one step, replacing what is there.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be moved; the old directory is then untouched, or the new one lies
    /// whole beside it and takes its place at the next start.
    pub fn publish(mut self) -> Result<()> {
        sync_dir(&self.staging)?;
        if self.target.exists() {
            let aside = self.staging.with_extension(OLD);
            replace(&self.staging, &self.target, &aside)
                .map_err(io(&self.target, "put the new version in place of"))?;
            // The old version, if it is still there, lies at the staging path; the drop removes it.
        } else {
            fs::rename(&self.staging, &self.target).map_err(io(&self.target, "rename to"))?;
            self.published = true;
        }
        sync_dir(self.target.parent().unwrap_or(Path::new(".")))
    }
}

/// Puts one directory in the place of another of the same file system, which then lies at `staging` or
/// is gone: in one step where it can; in three over `aside` (with a moment in which nothing is at
/// `target`) where it cannot, such as on NFS. A directory in a layer of a container's image cannot be
/// moved at all: it is removed, while the new one waits beside it under a name that says it is whole.
///
/// # Errors
/// What the system says; `target` is then as it was, but for a part of it that could not be removed.
pub(crate) fn replace(staging: &Path, target: &Path, aside: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, staging, CWD, target, RenameFlags::EXCHANGE) {
        Ok(()) => return Ok(()),
        Err(Errno::INVAL | Errno::NOSYS | Errno::NOTSUP) => {}
        Err(Errno::XDEV) => {
            let ready = staging.with_extension(READY);
            fs::rename(staging, &ready)?;
            flush_entries(parent_of(&ready))?;
            remove(target)?;
            return fs::rename(&ready, target);
        }
        Err(errno) => return Err(errno.into()),
    }
    fs::rename(target, aside)?;
    if let Err(error) = fs::rename(staging, target) {
        // Back to how it was; if even that fails, the old version lies beside.
        let _ = fs::rename(aside, target);
        return Err(error);
    }
    fs::rename(aside, staging)
}

impl Drop for StagedDir {
    fn drop(&mut self) {
        if !self.published {
            // Nothing more can be done about a leftover here; the next run removes it.
            let _ = remove(&self.staging);
        }
    }
}

/// Removes a directory with all that is in it, or what else is at its place.
pub(crate) fn remove(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

/// The directory of a file, also of one that is named without.
fn parent_of(file: &Path) -> &Path {
    file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// The file that is built and moved into place so that an output appears whole at `path`: itself, or
/// what a symbolic link there leads to. `None` where bytes can only be written to what is there: a
/// pipe, a device, or an open file by its number, such as `/dev/stdout`.
#[must_use]
pub fn whole_file(path: &Path) -> Option<PathBuf> {
    // As many as the kernel follows.
    const MOST_LINKS: usize = 40;
    let mut file = path.to_owned();
    for _ in 0..MOST_LINKS {
        // What is wrong with a path is told when a file is created there.
        let Ok(found) = file.symlink_metadata() else { return Some(file) };
        if !found.is_file() && !found.is_symlink() {
            return None;
        }
        let parent = parent_of(&file);
        // A number there leads to a file that is open already, whatever its name is by now.
        if statfs(parent).is_ok_and(|system| system.f_type == PROC_SUPER_MAGIC) {
            return None;
        }
        if found.is_file() {
            return Some(file);
        }
        file = parent.join(fs::read_link(&file).ok()?);
    }
    None
}

/// A file under construction beside its final place. Dropped without [`StagedFile::publish`], it is
/// removed again.
#[derive(Debug)]
pub struct StagedFile {
    file: File,
    /// Whether it lies at `staging` already.
    named: bool,
    staging: PathBuf,
    target: PathBuf,
}

impl StagedFile {
    /// Starts a file that will become `target`, in a directory that exists.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be created.
    pub fn new(target: &Path) -> Result<Self> {
        let staging = Self::staging(target);
        let file = File::create(&staging).map_err(io(target, "create"))?;
        Ok(Self { file, named: true, staging, target: target.to_owned() })
    }

    /// As [`StagedFile::new`], but where the file system can, it has no name until it is published, so
    /// that not even a process that is killed leaves it behind. For what takes long and is closed then:
    /// whoever looks at a handle (`lsof`) takes the file for a deleted one.
    ///
    /// # Errors
    /// As [`StagedFile::new`].
    pub fn unnamed(target: &Path) -> Result<Self> {
        let Some(file) = unnamed(parent_of(target)) else { return Self::new(target) };
        Ok(Self { file, named: false, staging: Self::staging(target), target: target.to_owned() })
    }

    fn staging(target: &Path) -> PathBuf {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        target.with_file_name(format!(".{name}.{}.partial", std::process::id()))
    }

    /// The file, to be written to.
    ///
    /// # Errors
    /// [`Error::Io`] when the system gives no second handle.
    pub fn writer(&self) -> Result<File> {
        self.file.try_clone().map_err(io(&self.target, "write"))
    }

    /// Flushes the file to the disk and moves it to its place, replacing what is there.
    ///
    /// # Errors
    /// [`Error::Io`]; the old file is then untouched.
    pub fn publish(mut self) -> Result<()> {
        if !self.named {
            // Flushed before it has a name: the time in which a kill leaves it behind is short.
            self.file.sync_all().map_err(io(&self.target, "flush"))?;
            link(&self.file, &self.staging).map_err(io(&self.target, "name"))?;
            self.named = true;
        }
        publish(&self.file, &self.staging, &self.target)
    }
}

/// A file without a name in `dir`, where the file system has such and it can be given a name later.
fn unnamed(dir: &Path) -> Option<File> {
    let mode = Mode::from_raw_mode(0o666);
    let file = openat(CWD, dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode).ok()?;
    // It is named by its number, which a system without `/proc` does not tell.
    by_number(&file).symlink_metadata().is_ok().then(|| File::from(file))
}

fn by_number(file: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()).into()
}

/// Gives an unnamed file the name `path`, in the place of a leftover of that name.
fn link(file: &File, path: &Path) -> std::io::Result<()> {
    let link = || linkat(CWD, by_number(file), CWD, path, AtFlags::SYMLINK_FOLLOW);
    match link() {
        Err(Errno::EXIST) => {
            fs::remove_file(path)?;
            Ok(link()?)
        }
        result => Ok(result?),
    }
}

/// Flushes `file`, which lies at `staging`, to the disk and moves it to `target` on the same file
/// system, replacing what is there.
///
/// # Errors
/// [`Error::Io`]; what was at `target` is then untouched.
pub fn publish(file: &File, staging: &Path, target: &Path) -> Result<()> {
    file.sync_all().map_err(io(target, "flush"))?;
    fs::rename(staging, target).map_err(io(target, "rename to"))?;
    sync_dir(parent_of(target))
}

impl Drop for StagedFile {
    fn drop(&mut self) {
        if self.named {
            // After a rename it is not there any more; otherwise a leftover is the worst.
            let _ = fs::remove_file(&self.staging);
        }
    }
}

/// Flushes a directory's entries to the disk.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
    flush_entries(dir).map_err(io(dir, "flush the directory"))
}

/// Flushes a directory's entries where that can be done: some file systems (of networks, clusters, user
/// space) say that the call is none for a directory, and a drop box takes entries from those who may not
/// open it.
fn flush_entries(dir: &Path) -> std::io::Result<()> {
    let flushed = match File::open(dir) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => return Ok(()),
        opened => opened?.sync_all(),
    };
    match flushed {
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::INVAL | Errno::BADF)) => {
            Ok(())
        }
        flushed => flushed,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::os::unix::fs::PermissionsExt as _;

    use rustix::fs::mkfifoat;

    use super::*;

    #[test]
    fn published_replaces_and_dropped_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        for text in ["first", "second"] {
            let staged = StagedDir::new(&target).unwrap();
            write_synced(&staged.path().join("a"), text.as_bytes()).unwrap();
            staged.publish().unwrap();
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), text);
        }
        let staged = StagedDir::new(&target).unwrap();
        write_synced(&staged.path().join("a"), b"never").unwrap();
        drop(staged);
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "second");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no leftovers");
    }

    #[test]
    fn an_exchange_that_was_cut_short_loses_nothing() {
        let root = tempfile::tempdir().unwrap();
        let (target, aside) = (root.path().join("model"), root.path().join(".model.old"));
        let old = |dir: &Path| {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("a"), "old").unwrap();
        };
        // Killed when neither version was at its place.
        old(&aside);
        fs::create_dir(root.path().join(".model.partial")).unwrap();
        StagedDir::clear_leftovers(&target).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "old");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no leftovers");
        // Killed when the new one was.
        old(&aside);
        fs::write(target.join("a"), "new").unwrap();
        StagedDir::clear_leftovers(&target).unwrap();
        assert_eq!(fs::read_to_string(target.join("a")).unwrap(), "new");
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no leftovers");
        // Killed while the old one was removed to make place, and when it was gone.
        let ready = root.path().join(".model.ready");
        for text in ["newer", "newest"] {
            fs::create_dir(&ready).unwrap();
            fs::write(ready.join("a"), text).unwrap();
            StagedDir::clear_leftovers(&target).unwrap();
            assert_eq!(fs::read_to_string(target.join("a")).unwrap(), text);
            assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1, "no leftovers");
            if text == "newer" {
                fs::remove_dir_all(&target).unwrap();
            }
        }
    }

    #[test]
    fn directories_are_created_with_their_parents() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b/c");
        create_dir_synced(&dir).unwrap();
        create_dir_synced(&dir).unwrap();
        assert!(dir.is_dir());
        // One that may not be read, but by root.
        let drop_box = root.path().join("drop");
        let mode = |mode| fs::set_permissions(&drop_box, fs::Permissions::from_mode(mode));
        fs::create_dir(&drop_box).unwrap();
        mode(0o333).unwrap();
        create_dir_synced(&drop_box.join("a/b")).unwrap();
        mode(0o755).unwrap();
    }

    #[test]
    fn a_file_system_that_flushes_no_directories_is_one_to_write_to() {
        let proc = Path::new("/proc");
        let error = File::open(proc).unwrap().sync_all().unwrap_err();
        assert_eq!(Errno::from_io_error(&error), Some(Errno::INVAL));
        sync_dir(proc).unwrap();
        assert!(sync_dir(Path::new("/proc/none")).is_err());
    }

    #[test]
    fn a_leftover_of_a_killed_run_is_cleared() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("model");
        let leftover = root.path().join(".model.partial");
        fs::create_dir(&leftover).unwrap();
        fs::write(leftover.join("old"), "x").unwrap();
        StagedDir::new(&target).unwrap().publish().unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);
    }
    #[test]
    fn a_staged_file_has_no_name_before_its_own() {
        let root = tempfile::tempdir().unwrap();
        let target = root.path().join("out");
        fs::write(&target, "old").unwrap();
        let plain = target.metadata().unwrap().permissions();
        let leftover = root.path().join(format!(".out.{}.partial", std::process::id()));
        let entries = || fs::read_dir(root.path()).unwrap().count();
        for (text, is_published) in [("first", true), ("never", false), ("second", true)] {
            let staged = StagedFile::unnamed(&target).unwrap();
            if !staged.named {
                assert_eq!(entries(), 1, "a kill now leaves nothing");
                // As of an earlier process of the same number.
                fs::write(&leftover, "leftover").unwrap();
            }
            staged.writer().unwrap().write_all(text.as_bytes()).unwrap();
            if is_published {
                staged.publish().unwrap();
                assert_eq!(fs::read_to_string(&target).unwrap(), text);
                assert_eq!(target.metadata().unwrap().permissions(), plain);
            } else {
                drop(staged);
                assert_eq!(fs::read_to_string(&target).unwrap(), "first");
                let _ = fs::remove_file(&leftover);
            }
            assert_eq!(entries(), 1);
        }
    }

    #[test]
    fn an_output_is_whole_where_a_file_can_be_moved() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(to, at(name)).unwrap();
        fs::write(at("file"), "x").unwrap();
        fs::create_dir(at("dir")).unwrap();
        mkfifoat(CWD, at("pipe"), 0o600.into()).unwrap();
        link("../file", "dir/link");
        link("dir/link", "chain");
        link("new", "dangling");
        link("pipe", "to-pipe");
        link("/dev/null", "null");
        link("/proc/self/fd/1", "stdout");
        link("round", "round");
        let open = File::open(at("file")).unwrap();
        link(&format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open)), "number");
        for (name, file) in [("file", "file"), ("new", "new"), ("chain", "dir/../file")] {
            assert_eq!(whole_file(&at(name)), Some(at(file)), "{name}");
        }
        assert_eq!(whole_file(&at("dangling")), Some(at("new")));
        for name in ["dir", "pipe", "to-pipe", "null", "stdout", "round", "number"] {
            assert_eq!(whole_file(&at(name)), None, "{name}");
        }
        assert_eq!(whole_file(Path::new("/dev/stdout")), None);
    }
}
