//! Flat parameter units: what a stage's parameters, gradients and optimizer states live in.

pub mod layout;
pub mod sharding;
pub mod unit;
mod values;

pub use layout::{ParameterGroups, UnitLayout};
pub use sharding::{Sharding, Share};
pub use unit::{FlatUnit, HeldBytes, Offload, Reducing, UnitOptions};
