//! `--gpus` against what NVML says, through the library's own interface: a stand-in for it tells of GPUs
//! that are none (`tests/fake_cuda`).

#![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

mod common;

use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

use common::{Outcome, launcher, run};

/// Prints what a worker sees of its place and its GPU.
const SHOW: &str = "echo $LOCAL_RANK:$CUDA_VISIBLE_DEVICES:$CUDA_DEVICE_ORDER";

/// The UUIDs of the stand-in's GPUs, but for their last digit.
const GPU: &str = "GPU-fa4e0000-0000-0000-0000-00000000000";

/// The folder of the stand-in, compiled once.
fn library() -> PathBuf {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("fake_nvml");
        std::fs::create_dir_all(&folder).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fake_cuda/nvml.c");
        let out = folder.join("libnvidia-ml.so.1");
        let flags = ["-std=gnu11", "-O1", "-shared", "-fPIC", "-o"];
        let status = Command::new("cc").args(flags).arg(out).arg(source).status().unwrap();
        assert!(status.success(), "the stand-in does not compile");
        folder
    };
    FOLDER.get_or_init(make).clone()
}

/// Launches workers that show what they see on a machine of four GPUs, with settings of the stand-in.
fn launch(gpus: &str, settings: &[(&str, &str)]) -> Outcome {
    let mut command = launcher();
    command.args(["--gpus", gpus, "--prefix", "", "--", "sh", "-c", SHOW]);
    command.env("LD_LIBRARY_PATH", library()).env("FAKE_CUDA_DEVICES", "4");
    run(command.envs(settings.iter().copied()))
}

fn shown(gpus: &str, settings: &[(&str, &str)]) -> Vec<String> {
    let outcome = launch(gpus, settings);
    assert_eq!(outcome.code, Some(0), "{gpus}: {}", outcome.stderr);
    let mut lines: Vec<String> = outcome.stdout.lines().map(ToOwned::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn each_worker_gets_its_gpu() {
    let order = "PCI_BUS_ID";
    for (gpus, list, workers) in [
        ("0,1", "0,1", 2),
        ("3,1", "3,1", 2),
        ("all", "0,1,2,3", 4),
        (&format!("{GPU}2"), "2", 1),
        (&format!("{GPU}3,0"), "3,0", 2),
    ] {
        let expected: Vec<_> = (0..workers).map(|rank| format!("{rank}:{list}:{order}")).collect();
        assert_eq!(shown(gpus, &[]), expected, "{gpus}");
    }
}

#[test]
fn another_order_of_cuda_does_not_change_which_gpu_is_meant() {
    let fastest = [("CUDA_DEVICE_ORDER", "FASTEST_FIRST")];
    for gpus in ["2", &format!("{GPU}2")] {
        let outcome = launch(gpus, &fastest);
        assert_eq!(outcome.stdout, "0:2:PCI_BUS_ID\n", "{}", outcome.stderr);
        let told = outcome.stderr.matches("PCI_BUS_ID for the workers, not FASTEST_FIRST").count();
        assert_eq!((told, outcome.stderr.lines().count()), (1, 1), "{}", outcome.stderr);
    }
    // By UUID there is nothing to count.
    let uuid = format!("{GPU}2");
    let inherited = [fastest[0], ("CUDA_VISIBLE_DEVICES", uuid.as_str())];
    let outcome = launch("all", &inherited);
    let expected = (format!("0:{uuid}:FASTEST_FIRST\n"), String::new());
    assert_eq!((outcome.stdout, outcome.stderr), expected);
}

#[test]
fn an_inherited_list_is_counted_from() {
    let inherited = [("CUDA_VISIBLE_DEVICES", "3,1")];
    assert_eq!(shown("1", &inherited), ["0:1:PCI_BUS_ID"]);
    assert_eq!(shown("all", &inherited), ["0:3,1:PCI_BUS_ID", "1:3,1:PCI_BUS_ID"]);
    let outcome = launch("2", &inherited);
    assert!(outcome.stderr.contains("GPU 2 does not exist: 2 GPUs are visible, 0 to 1"));
}

#[test]
fn a_mig_slice_is_chosen_by_its_uuid() {
    let divided = [("FAKE_CUDA_MIG", "2")];
    let slice = "MIG-fa4e0000-0000-0000-0002-000000000001";
    assert_eq!(shown(slice, &divided), [format!("0:{slice}:PCI_BUS_ID")]);
    for (gpus, expected) in [
        (
            "1",
            "GPU 1 is divided into MIG slices: name one of its 2, such as MIG-fa4e0000-0000-0000-0001-",
        ),
        ("all", "a process sees one MIG slice only"),
        ("MIG-fa4e0000-0000-0000-0003-000000000001", "does not exist"),
        ("MIG-fa4e", "ambiguous: give the whole UUID"),
    ] {
        let outcome = launch(gpus, &divided);
        assert_eq!(outcome.code, Some(2), "{gpus}");
        assert!(outcome.stderr.contains(expected), "{gpus}: {}", outcome.stderr);
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.lines().count()), ("", 1), "{gpus}");
    }
}

#[test]
fn what_is_not_there_or_twice_is_refused() {
    for (gpus, expected) in [
        ("4", "GPU 4 does not exist: 4 GPUs are visible, 0 to 3"),
        (&format!("{GPU}9"), "does not exist: 4 GPUs are visible"),
        (&format!("1,{GPU}1"), "listed twice (it is GPU-fa4e"),
        ("GPU-fa4e", "ambiguous: give the whole UUID"),
    ] {
        let outcome = launch(gpus, &[]);
        assert_eq!((outcome.code, outcome.stderr.lines().count()), (Some(2), 1), "{gpus}");
        assert!(outcome.stderr.contains(expected), "{gpus}: {}", outcome.stderr);
    }
    let outcome = launch("0", &[("FAKE_CUDA_DEVICES", "0")]);
    assert_eq!(outcome.code, Some(2), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("--cpu --nproc N"), "{}", outcome.stderr);
}

#[test]
fn a_gpu_that_cannot_be_read_keeps_nobody_from_the_others() {
    // CUDA does not count such a GPU, so that a number may be another one's.
    let lost = [("FAKE_CUDA_LOST", "1")];
    let order = "PCI_BUS_ID";
    assert_eq!(shown("2", &lost), [format!("0:{GPU}2:{order}")]);
    let expected: Vec<_> = (0..2).map(|rank| format!("{rank}:{GPU}3,{GPU}0:{order}")).collect();
    assert_eq!(shown(&format!("3,{GPU}0"), &lost), expected);
    let inherited = [lost[0], ("CUDA_VISIBLE_DEVICES", "3,2")];
    assert_eq!(shown("1", &inherited), [format!("0:{GPU}2:{order}")]);
    for (gpus, limit, others) in
        [("all", "0,1,2,3", "0,2,3"), ("0,1", "0,1,2,3", "0,2,3"), ("all", "3,1", "0")]
    {
        let outcome = launch(gpus, &[lost[0], ("CUDA_VISIBLE_DEVICES", limit)]);
        let (line, code) = (outcome.stderr.trim(), outcome.code);
        assert_eq!((code, line.lines().count(), outcome.stdout.as_str()), (Some(2), 1, ""));
        assert!(line.contains("--gpus: NVML cannot read GPU 1: "), "{line}");
        assert!(line.ends_with(&format!("those that it can read are --gpus {others}")), "{line}");
    }
}

#[test]
fn gpus_of_other_jobs_are_not_there() {
    // As CUDA and nvidia-smi, and so Slurm too, count from 0 what the job's control group leaves.
    let two = [("FAKE_CUDA_DENIED", "01")];
    let both: Vec<_> = (0..2).map(|rank| format!("{rank}:{GPU}2,{GPU}3:PCI_BUS_ID")).collect();
    assert_eq!(shown("all", &[two[0], ("CUDA_VISIBLE_DEVICES", "0,1")]), both);
    assert_eq!(shown("0,1", &two), both);
    assert_eq!(shown(&format!("{GPU}3"), &two), [format!("0:{GPU}3:PCI_BUS_ID")]);
    let middle = [("FAKE_CUDA_DENIED", "03"), ("CUDA_VISIBLE_DEVICES", "0,1")];
    assert_eq!(shown("1", &middle), [format!("0:{GPU}2:PCI_BUS_ID")]);
    // One of the job's own that is lost is none that belongs to others.
    let lost = [("FAKE_CUDA_DENIED", "03"), ("FAKE_CUDA_LOST", "2")];
    for (settings, gpus, expected) in [
        (&lost[..], "all", "NVML cannot read GPU 1: "),
        (&two, "2", "GPU 2 does not exist: 2 GPUs are visible, 0 to 1"),
        (&[("FAKE_CUDA_DENIED", "0123")], "all", "no GPU was found that this process may use"),
    ] {
        let outcome = launch(gpus, settings);
        assert_eq!((outcome.code, outcome.stderr.lines().count()), (Some(2), 1), "{gpus}");
        assert!(outcome.stderr.contains(expected), "{gpus}: {}", outcome.stderr);
    }
}

#[test]
fn a_busy_gpu_is_told_of_with_who_holds_it() {
    let holder = std::process::id().to_string();
    let outcome = launch("0,1", &[("FAKE_CUDA_BUSY", &format!("1:{holder}"))]);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let expected = format!("GPU 1 is busy: process {holder} (");
    assert!(outcome.stderr.contains(&expected), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("with 3.2 GB"), "{}", outcome.stderr);
    assert!(!launch("0,2", &[("FAKE_CUDA_BUSY", "1:1")]).stderr.contains("busy"));
}
