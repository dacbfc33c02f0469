//! Weights on disk in every form, whole and damaged.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::fs;
use std::path::Path;

use common::golden_dir;
use reranker::model::stage::{Init, TensorSpec};
use reranker::model::weights::WeightFiles;
use tch::Tensor;
use tempfile::TempDir;

/// A model directory with this file as its `pytorch_model.bin`.
fn directory_with(bytes: &[u8]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("pytorch_model.bin"), bytes).unwrap();
    dir
}

fn torch_file(name: &str) -> Vec<u8> {
    fs::read(golden_dir("torch_files").join(format!("{name}.bin"))).unwrap()
}

fn refusal_of(bytes: &[u8]) -> String {
    let dir = directory_with(bytes);
    WeightFiles::open(dir.path()).unwrap_err().to_string()
}

fn expected(name: &str) -> Vec<(String, Tensor)> {
    let path = golden_dir("torch_files").join(format!("{name}.safetensors"));
    Tensor::read_safetensors(path).unwrap()
}

#[test]
fn files_of_torch_save_hold_what_pytorch_reads_from_them() {
    for name in ["archive", "older"] {
        let dir = directory_with(&torch_file(name));
        let weights = WeightFiles::open(dir.path()).unwrap();
        let tensors = expected(name);
        assert_eq!(tensors.len(), 12, "{name}");
        for (tensor, values) in &tensors {
            let spec = TensorSpec::new(tensor.as_str(), &values.size());
            let ours = weights.read(&spec).unwrap().unwrap();
            assert_eq!(ours.size(), values.size(), "{name}: {tensor}");
            assert!(ours.equal(values), "{name}: {tensor} is {ours}, expected {values}");
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = directory_with(&torch_file("archive"));
    let weights = WeightFiles::open(dir.path()).unwrap();
    let message = |name: &str, shape: &[i64]| {
        let error = weights.check([TensorSpec::new(name, shape)].iter()).unwrap_err().to_string();
        error.rsplit_once(": ").unwrap().1.to_owned()
    };
    assert_eq!(
        message("matrix", &[4, 3]),
        "tensor matrix has shape [3, 4], expected [4, 3] from config.json"
    );
    assert_eq!(
        message("position_ids", &[1, 4]),
        "tensor position_ids holds int64, expected floats"
    );
    // A number of the dictionary is no tensor.
    assert_eq!(message("step", &[1]), "tensor step is missing from the weights (13 tensors here)");
}

/// The trunk's prefix is there or not, on either side.
#[test]
fn the_prefix_of_a_trunk_may_be_absent() {
    let dir = directory_with(&torch_file("archive"));
    let weights = WeightFiles::open(dir.path()).unwrap();
    for prefix in ["bert.", "roberta.", "model."] {
        let spec = TensorSpec::new(format!("{prefix}matrix"), &[3, 4]);
        assert!(weights.read(&spec).unwrap().is_some(), "{prefix}");
        let head = TensorSpec::new(format!("{prefix}other"), &[3, 4]).or_init(Init::Zeros);
        assert!(weights.read(&head).unwrap().is_none(), "{prefix}");
    }
}

#[test]
fn a_damaged_file_is_one_line() {
    for name in ["archive", "older"] {
        let whole = torch_file(name);
        for cut in [1, whole.len() / 4, whole.len() / 2, whole.len() - 1] {
            let message = refusal_of(&whole[..cut]);
            assert!(message.contains("truncated") || cut == 1, "{name} cut at {cut}: {message}");
            assert!(!message.contains('\n'), "{message}");
        }
    }
    for (bytes, expected) in [
        (&b""[..], "not a file that torch.save wrote"),
        (b"hello", "not a file that torch.save wrote"),
        // What pickle.dump(7) writes.
        (b"\x80\x02K\x07.", "a pickle, but none that torch.save wrote"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    ] {
        let message = refusal_of(bytes);
        assert!(message.contains(expected) && message.contains("pytorch_model.bin"), "{message}");
    }
}

/// Whatever a byte is changed to, the file is read or refused: no panic, no memory that is not there.
#[test]
fn no_changed_byte_makes_it_panic() {
    let specs: Vec<TensorSpec> = expected("archive")
        .iter()
        .map(|(name, values)| TensorSpec::new(name.as_str(), &values.size()))
        .collect();
    for name in ["archive", "older"] {
        let whole = torch_file(name);
        let dir = directory_with(&whole);
        let (mut read, mut refused) = (0, 0);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= [0x01, 0x80, 0xff][at % 3];
            fs::write(dir.path().join("pytorch_model.bin"), bytes).unwrap();
            let Ok(weights) = WeightFiles::open(dir.path()) else {
                refused += 1;
                continue;
            };
            read += specs.iter().filter(|&spec| weights.read(spec).is_ok()).count();
        }
        assert!(read > 1000 && refused > 100, "{name}: {read} tensors read, {refused} refusals");
    }
}

#[test]
fn safetensors_come_before_torch_files() {
    let dir = directory_with(b"never read");
    let message = WeightFiles::open(dir.path()).unwrap_err().to_string();
    assert!(message.contains("pytorch_model.bin"), "{message}");
    let from = golden_dir("bert_tiny").join("model.safetensors");
    fs::copy(from, dir.path().join("model.safetensors")).unwrap();
    WeightFiles::open(dir.path()).unwrap();
}

#[test]
fn a_directory_without_weights_says_what_it_expects() {
    let message = WeightFiles::open(Path::new(env!("CARGO_MANIFEST_DIR"))).unwrap_err().to_string();
    assert!(
        message.ends_with(
            "no weights here; expected one of model.safetensors, model.safetensors.index.json, \
             pytorch_model.bin, pytorch_model.bin.index.json"
        ),
        "{message}"
    );
}
