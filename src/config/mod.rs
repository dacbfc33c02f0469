//! From YAML files and flags to one validated [`Plan`]; only the plan builds things.
//!
//! Two stages, as in ripgrep. What was written: `tree` reads YAML with positions, `reader` pulls
//! typed keys out of it and reports the rest, `training` and `parallel` list the keys of the two
//! files, `deepspeed_file` those of the JSON that the second may point to, `overrides` those of the command line. What will be done: `resolve` decides precedence,
//! defaults and ranges and makes the plan; `support` refuses what the engine cannot do yet. Every
//! error names the file, line and column of the setting that caused it.

mod deepspeed_file;
mod describe;
mod lora;
mod other_names;
mod overrides;
mod parallel;
pub mod plan;
mod reader;
mod resolve;
mod resolve_parallel;
mod scalar;
mod support;
mod teacher;
mod text_format;
mod training;
mod tree;

#[cfg(test)]
mod tests;

pub use lora::{ALL_LINEAR, LoraPlan, TargetModules};
pub use plan::{
    DataPlan, DatasetKind, Device, LabelRange, LoggingPlan, LossKind, LrGroup, Metric, ModelKind,
    ModelPlan, ParallelPlan, Plan, Precision, Resume, SaveFailure, SavingPlan, Sources, Strategy,
    Tracker, TrainingPlan, ValidationPlan, ZeroStage,
};
pub use reader::Origin;
pub use teacher::TeacherPlan;
pub use text_format::TextFormat;
pub use tree::Place;
