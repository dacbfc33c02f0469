//! What a run leaves on disk: the Hugging Face model directory.

mod growing;
pub mod model_dir;
pub mod sidecar;
pub mod training;
pub mod weight_writer;

pub(crate) use growing::{copy_dir, tell_reading, tell_saving};
pub use model_dir::{SavedModel, save_model};
pub use sidecar::{FILE_NAME as SIDECAR, Sidecar};
