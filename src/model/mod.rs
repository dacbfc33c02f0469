//! Models as lists of stages, their configuration, and their weights on disk.

pub mod config;
pub mod decoder;
pub mod encoder;
mod layer_class;
pub mod lora;
pub mod modernbert;
mod pretrained;
pub mod rotary;
pub mod stage;
mod views;
pub mod weights;

pub use config::{Activation, ModelConfig, Trunk};
pub use layer_class::foreign_layer_classes;
pub use lora::Lora;
pub use pretrained::Pretrained;
pub use stage::{ForwardContext, PackedBatch, Parameter, Stage, Width};
pub use views::Views;

/// The stages of the model that `config` describes, with its adapters where it has any.
#[must_use]
pub fn stages(config: &ModelConfig) -> Vec<Box<dyn Stage>> {
    match &config.lora {
        Some(lora) => lora.adapt(bare_stages(config)),
        None => bare_stages(config),
    }
}

/// The stages without adapters.
fn bare_stages(config: &ModelConfig) -> Vec<Box<dyn Stage>> {
    match &config.trunk {
        Trunk::Encoder(encoder) => encoder::stages(encoder),
        Trunk::Decoder(decoder) => decoder::stages(decoder),
        Trunk::ModernBert(modernbert) => modernbert::stages(modernbert),
    }
}
