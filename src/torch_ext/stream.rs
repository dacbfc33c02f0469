//! Streams and events of a GPU: what runs beside the computation, and what waits for what.

use std::ffi::{c_int, c_void};
use std::ptr::NonNull;

use tch::Device;

use super::{check, ffi};
use crate::error::{Error, Result};

/// A queue of work on a device, beside the one that tensors are computed on. The CPU has none:
/// there everything happens when it is called.
#[derive(Debug)]
pub struct Stream(Option<NonNull<ffi::Stream>>);

/// A place in a [`Stream`]: reached when everything before it is done.
#[derive(Debug)]
pub struct Event(Option<NonNull<ffi::Event>>);

// SAFETY: CUDA's streams and events may be used from any thread; the C++ objects are not written
// to after they are made.
unsafe impl Send for Stream {}
// SAFETY: as above.
unsafe impl Sync for Stream {}
// SAFETY: as above.
unsafe impl Send for Event {}
// SAFETY: as above.
unsafe impl Sync for Event {}

/// Makes `device` the calling thread's current one.
///
/// # Errors
/// [`Error::Torch`] when CUDA refuses.
pub fn set_current(device: Device) -> Result<()> {
    match device {
        // SAFETY: no memory is passed.
        Device::Cuda(index) => check(unsafe { ffi::rr_set_device(number(index)) }).map_err(torch),
        _ => Ok(()),
    }
}

impl Stream {
    /// A stream of `device` whose work goes first where it competes with the computation.
    ///
    /// # Errors
    /// [`Error::Torch`] when CUDA refuses.
    pub fn new(device: Device) -> Result<Self> {
        let Device::Cuda(index) = device else { return Ok(Self(None)) };
        let mut stream = std::ptr::null_mut();
        // SAFETY: success makes `stream` a new object that is ours.
        check(unsafe { ffi::rr_stream_new(number(index), &raw mut stream) }).map_err(torch)?;
        Ok(Self(NonNull::new(stream)))
    }

    /// CUDA's own handle; null on the CPU.
    ///
    /// # Errors
    /// [`Error::Torch`] when CUDA refuses.
    pub fn handle(&self) -> Result<*mut c_void> {
        let mut handle = std::ptr::null_mut();
        if let Some(stream) = self.0 {
            // SAFETY: a live stream.
            check(unsafe { ffi::rr_stream_handle(stream.as_ptr(), &raw mut handle) })
                .map_err(torch)?;
        }
        Ok(handle)
    }

    /// Lets work that is queued here from now on wait for the computation queued so far.
    ///
    /// # Errors
    /// [`Error::Torch`] when CUDA refuses.
    pub fn follow_computation(&self) -> Result<()> {
        match self.0 {
            // SAFETY: a live stream.
            Some(stream) => check(unsafe { ffi::rr_stream_follow(stream.as_ptr()) }).map_err(torch),
            None => Ok(()),
        }
    }

    /// The place behind everything queued here so far.
    ///
    /// # Errors
    /// [`Error::Torch`] when CUDA refuses.
    pub fn mark(&self) -> Result<Event> {
        let Some(stream) = self.0 else { return Ok(Event(None)) };
        let mut event = std::ptr::null_mut();
        // SAFETY: a live stream; success makes `event` a new object that is ours.
        check(unsafe { ffi::rr_stream_mark(stream.as_ptr(), &raw mut event) }).map_err(torch)?;
        Ok(Event(NonNull::new(event)))
    }
}

impl Event {
    /// Whether everything before it is done.
    ///
    /// # Errors
    /// [`Error::Torch`] when the device has failed.
    pub fn is_done(&self) -> Result<bool> {
        let Some(event) = self.0 else { return Ok(true) };
        let mut done = false;
        // SAFETY: a live event.
        check(unsafe { ffi::rr_event_done(event.as_ptr(), &raw mut done) }).map_err(torch)?;
        Ok(done)
    }

    /// Lets computation that is queued from now on wait for it; returns at once.
    ///
    /// # Errors
    /// [`Error::Torch`] when CUDA refuses.
    pub fn hold_computation(&self) -> Result<()> {
        match self.0 {
            // SAFETY: a live event.
            Some(event) => check(unsafe { ffi::rr_event_hold(event.as_ptr()) }).map_err(torch),
            None => Ok(()),
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Some(stream) = self.0 {
            // SAFETY: made by rr_stream_new and freed here alone.
            unsafe { ffi::rr_stream_free(stream.as_ptr()) }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Some(event) = self.0 {
            // SAFETY: made by rr_stream_mark and freed here alone.
            unsafe { ffi::rr_event_free(event.as_ptr()) }
        }
    }
}

/// Memory of a GPU in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Not used by any process.
    pub free: usize,
    /// In all.
    pub total: usize,
    /// The most that tensors of this process held at once.
    pub peak: usize,
}

/// The memory of a GPU; `None` for the CPU.
///
/// # Errors
/// [`Error::Torch`] when CUDA refuses.
pub fn memory(device: Device) -> Result<Option<DeviceMemory>> {
    let Device::Cuda(index) = device else { return Ok(None) };
    let (mut free, mut total, mut peak) = (0, 0, 0);
    // SAFETY: three numbers to write to.
    check(unsafe {
        ffi::rr_device_memory(number(index), &raw mut free, &raw mut total, &raw mut peak)
    })
    .map_err(torch)?;
    Ok(Some(DeviceMemory { free, total, peak }))
}

fn number(index: usize) -> c_int {
    c_int::try_from(index).expect("CUDA numbers devices with an int")
}

fn torch(message: String) -> Error {
    Error::Torch(message)
}
