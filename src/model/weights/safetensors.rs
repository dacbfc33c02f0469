//! The header of a safetensors file.

use std::fs::File;
use std::os::unix::fs::FileExt;

use safetensors::Dtype;
use safetensors::tensor::Metadata;
use tch::Kind;

use super::{Element, Place};

/// The format's own bound on headers.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Where the tensors of `file`, which is `length` bytes long, lie in it.
///
/// # Errors
/// What is wrong with the file.
pub(super) fn places(file: &File, length: u64) -> Result<Vec<(String, Place)>, String> {
    let mut prefix = [0_u8; 8];
    file.read_exact_at(&mut prefix, 0)
        .map_err(|_| format!("truncated: {length} bytes are no safetensors file"))?;
    let header_bytes = u64::from_le_bytes(prefix);
    if header_bytes > length.saturating_sub(8).min(MAX_HEADER_BYTES) {
        return Err(format!(
            "truncated or not safetensors: the header says {header_bytes} bytes, the file has \
             {length}"
        ));
    }
    let mut header = vec![0_u8; header_bytes as usize];
    file.read_exact_at(&mut header, 8).map_err(|error| error.to_string())?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| format!("not a safetensors file: {error}"))?;
    let data = header_bytes + 8;
    let expected = data + metadata.data_len() as u64;
    if expected != length {
        return Err(format!(
            "truncated or damaged: its header promises {expected} bytes, the file has {length}"
        ));
    }
    let place = |info: &safetensors::tensor::TensorInfo| {
        let shape: Vec<i64> = info.shape.iter().map(|&d| d as i64).collect();
        Place::contiguous(element(info.dtype), shape, data + info.data_offsets.0 as u64)
    };
    Ok(metadata.tensors().into_iter().map(|(name, info)| (name, place(info))).collect())
}

fn element(dtype: Dtype) -> Element {
    match dtype {
        Dtype::F32 => Element::Float(Kind::Float),
        Dtype::F16 => Element::Float(Kind::Half),
        Dtype::BF16 => Element::Float(Kind::BFloat16),
        Dtype::F64 => Element::Float(Kind::Double),
        other => Element::Other(format!("{other:?}")),
    }
}
