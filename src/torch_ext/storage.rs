//! The memory behind a tensor, given back and taken again while views of it stay.
//!
//! Sharded parameters are whole only while a stage computes. The views that the stage's graph has
//! saved keep pointing at the storage, so the storage, not the tensor, is what comes and goes.

use tch::{Device, Tensor};

use super::{check, ffi};
use crate::error::{Error, Result};

/// Gives the memory of `tensor`'s storage back. Reading it or a view of it afterwards is an error
/// until [`take`].
///
/// # Errors
/// [`Error::Torch`] when the storage is not the allocator's own.
pub fn give_back(tensor: &Tensor) -> Result<()> {
    resize(tensor, 0)
}

/// Takes memory for a storage that was given back; its values are undefined. `tensor` must span
/// its storage. Does nothing where the memory is there.
///
/// # Errors
/// [`Error::Torch`] when there is no room.
pub fn take(tensor: &Tensor) -> Result<()> {
    if held_bytes(tensor) > 0 {
        return Ok(());
    }
    resize(tensor, tensor.numel() * tensor.f_kind()?.elt_size_in_bytes())
}

/// Bytes that `tensor`'s storage holds now.
#[must_use]
pub fn held_bytes(tensor: &Tensor) -> usize {
    // SAFETY: a live tensor with a storage, only read.
    unsafe { ffi::rr_storage_bytes(tensor.as_ptr()) }
}

fn resize(tensor: &Tensor, bytes: usize) -> Result<()> {
    // SAFETY: a live tensor; the C++ side replaces the memory its storage owns.
    check(unsafe { ffi::rr_storage_resize(tensor.as_ptr(), bytes) }).map_err(Error::Torch)
}

/// Copies a tensor of the host to `device`. The host does not wait for a GPU: the copy is ordered with the
/// computation, from pinned memory that libtorch gives to nobody else before it is over.
///
/// # Errors
/// [`crate::Error::Torch`] when the device, or the host's pinned memory, has no room.
pub fn upload(host: &Tensor, device: Device) -> Result<Tensor> {
    if device == Device::Cpu || host.numel() == 0 {
        return Ok(host.f_to_device(device)?);
    }
    Ok(host.f_pin_memory(device)?.f_to_device_(device, host.f_kind()?, true, false)?)
}
