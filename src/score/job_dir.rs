//! The directory of a job's scores: what scoring puts into it, whose it is, and its end.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// What is scored with what.
pub(super) const JOB: &str = "job.json";
/// The end of the name of a rank's log.
pub(super) const LOG: &str = ".scores";
/// The output, before it is whole.
pub(super) const OUTPUT: &str = "output.jsonl";
/// What the names of files begin with that were removed while a process of this host has them open: NFS
/// keeps them until they are closed.
const REMOVED_WHILE_OPEN: &str = ".nfs";

pub(super) fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Io { path, action, source }
}

/// The log of a rank.
pub(super) fn log_path(dir: &Path, rank: usize) -> PathBuf {
    dir.join(format!("rank-{rank}{LOG}"))
}

/// Refuses a directory that is no job's, whose files scoring would take for its own. Every job has the
/// keys of `identity`.
///
/// # Errors
/// [`Error::Usage`] that names what is there; [`Error::Io`] from the disk.
pub(super) fn check_own(dir: &Path, identity: &Value) -> Result<()> {
    let path = dir.join(JOB);
    let stranger = match fs::read(&path) {
        Ok(text) if is_job(&text, identity) => return Ok(()),
        Ok(_) => Some(JOB.to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // A start that was killed at once has left its log alone.
            let names = names(dir).map_err(io(dir, "read the directory"))?;
            names.into_iter().find(|name| !name.ends_with(LOG) && !is_on_its_way_out(name))
        }
        Err(error) => return Err(io(&path, "read")(error)),
    };
    let Some(name) = stranger else { return Ok(()) };
    Err(Error::Usage(format!(
        "{} holds {name}, which no scoring put there, and scores would be kept in that directory; move \
         it, or choose another output",
        dir.display()
    )))
}

/// Whether this is what a job's file holds; nothing, where a start was killed as it wrote it.
fn is_job(text: &[u8], identity: &Value) -> bool {
    let found = serde_json::from_slice(text).unwrap_or(Value::Null);
    let keys = identity.as_object().map(|object| object.keys());
    text.is_empty() || keys.is_some_and(|mut keys| keys.all(|key| found.get(key).is_some()))
}

/// Removes what scoring has put into `dir`, none of which this process has open, and `dir` itself, which
/// stays where another process has a file open that NFS then keeps.
///
/// # Errors
/// [`Error::File`] that names what else is in it, and so stays with it; [`Error::Io`] from the disk.
pub(super) fn remove(dir: &Path) -> Result<()> {
    // First: without it nobody goes on with what is left.
    remove_file(&dir.join(JOB)).map_err(io(dir, "remove"))?;
    let mut stranger = None;
    for name in names(dir).map_err(io(dir, "remove"))? {
        if name.ends_with(LOG) || name == OUTPUT {
            remove_file(&dir.join(name)).map_err(io(dir, "remove"))?;
        } else if !is_on_its_way_out(&name) {
            stranger = Some(name);
        }
    }
    if let Some(name) = stranger {
        let message = format!("stays, because of {name}, which no scoring put there");
        return Err(Error::File { path: dir.to_owned(), message });
    }
    match fs::remove_dir(dir) {
        Err(error)
            if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::DirectoryNotEmpty) =>
        {
            Err(io(dir, "remove")(error))
        }
        _ => Ok(()),
    }
}

fn remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// The names of what is in a directory; none where it is not there.
fn names(dir: &Path) -> io::Result<Vec<String>> {
    let name =
        |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
    match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(name).collect(),
    }
}

fn is_on_its_way_out(name: &str) -> bool {
    name.starts_with(REMOVED_WHILE_OPEN)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use serde_json::json;

    use super::*;

    #[test]
    fn a_file_of_the_same_name_that_is_no_jobs_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        let (dir, identity) = (root.path(), json!({"model": "a", "max_len": 8}));
        for text in ["{\"model\": \"mine\"}", "[]", "text"] {
            fs::write(dir.join(JOB), text).unwrap();
            let error = check_own(dir, &identity).unwrap_err().to_string();
            assert!(error.contains("holds job.json, which no scoring put there"), "{error}");
        }
        for text in ["", r#"{"model": "b", "max_len": null, "more": 1}"#] {
            fs::write(dir.join(JOB), text).unwrap();
            check_own(dir, &identity).unwrap();
        }
    }

    #[test]
    fn only_what_scoring_put_there_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out.partial");
        let (mine, kept) = (dir.join("mine"), dir.join(".nfs0001"));
        fs::create_dir(&dir).unwrap();
        for path in [&dir.join(JOB), &dir.join(OUTPUT), &log_path(&dir, 0), &mine, &kept] {
            fs::write(path, "").unwrap();
        }
        let error = remove(&dir).unwrap_err().to_string();
        assert!(error.ends_with("stays, because of mine, which no scoring put there"), "{error}");
        fs::remove_file(&mine).unwrap();
        // NFS's own is neither removed nor told, and no reason not to score there again.
        remove(&dir).unwrap();
        assert_eq!(names(&dir).unwrap(), [".nfs0001"]);
        check_own(&dir, &json!({"model": "a"})).unwrap();
        fs::remove_file(&kept).unwrap();
        remove(&dir).unwrap();
        remove(&dir).unwrap();
        assert!(!dir.exists());
    }
}
