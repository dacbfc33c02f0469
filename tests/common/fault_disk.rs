//! A disk that fails, to preload into a program.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// The library, for `LD_PRELOAD`; compiled once. The source says which variables it heeds.
pub fn library() -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let out = dir.join(format!("libfault_disk-{}.so", env!("CARGO_CRATE_NAME")));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fault_disk/fault_disk.c");
        let status = Command::new("cc")
            .args(["-std=c11", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o"])
            .arg(&out)
            .args([source, "-ldl"])
            .status()
            .unwrap();
        assert!(status.success(), "the failing disk does not compile");
        out
    };
    LIBRARY.get_or_init(make).clone()
}
