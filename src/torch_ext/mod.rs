//! The safe face of the C++ shim over libtorch: what tch lacks. The only module of this crate
//! that holds `unsafe`.

pub mod attention;
pub mod autograd;
mod ffi;
pub mod gloo;
pub mod nccl;
pub mod runtime;
pub mod storage;
pub mod stream;

use crate::error::{Error, Result};

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Torch(first_line(&error.to_string()))
    }
}

/// The first line of a libtorch message; what follows is a C++ stack.
pub(crate) fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or("").trim().to_owned()
}

/// Takes over a message of the shim: null is success.
fn check(message: *mut std::ffi::c_char) -> Result<(), String> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: the shim returns null or a NUL-terminated string from malloc, which is ours now.
    let text = unsafe {
        let text = std::ffi::CStr::from_ptr(message).to_string_lossy().into_owned();
        ffi::rr_free_message(message);
        text
    };
    Err(first_line(&text))
}
