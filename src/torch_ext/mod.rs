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
        Self::Torch(gist(&error.to_string()))
    }
}

/// What a run that needs too much memory can do.
pub(crate) const NEED_LESS: &str =
    "lower batch_size or max_len, set gradient_checkpointing: true, or divide more";

/// libtorch's words when a GPU has no room, before the size that was wanted.
const OUT_OF_MEMORY: &str = "out of memory. Tried to allocate ";

/// What of a libtorch message a user can use: its first line, as what follows is a C++ stack; of one about
/// memory, what was wanted and what there is, with what to do.
fn gist(message: &str) -> String {
    let line = message.lines().next().unwrap_or("").trim();
    let line = line.strip_prefix("Internal torch error: ").unwrap_or(line);
    if !line.contains(OUT_OF_MEMORY) {
        return line.to_owned();
    }
    let figures = line.split_once(" Of the allocated memory").map_or(line, |(figures, _)| figures);
    format!("{}; {NEED_LESS}", figures.trim_end_matches('.'))
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
    Err(gist(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_cut_to_what_a_user_can_use() {
        let full = "Internal torch error: CUDA out of memory. Tried to allocate 16.00 MiB. GPU 0 has a total \
                    capacity of 450.00 MiB of which 8.00 MiB is free. Of the allocated memory 398.50 MiB is \
                    allocated by PyTorch.\nException raised from malloc";
        assert_eq!(
            gist(full),
            "CUDA out of memory. Tried to allocate 16.00 MiB. GPU 0 has a total capacity of 450.00 MiB of \
             which 8.00 MiB is free; lower batch_size or max_len, set gradient_checkpointing: true, or \
             divide more"
        );
        assert_eq!(gist("Internal torch error: shapes differ\nframe #0"), "shapes differ");
    }
}
