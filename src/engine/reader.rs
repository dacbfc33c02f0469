//! A model that is only read, for threads that score side by side.

use tch::Tensor;

use super::Engine;
use crate::error::Result;
use crate::model::{ForwardContext, ModelConfig, PackedBatch, Stage, Views};

/// A model whose parameters are whole and do not change: one thread's hold on an [`Engine`]'s memory.
/// Libtorch lets threads read the same memory, but no two of them may share a handle of it.
#[derive(Debug)]
pub struct Reader {
    stages: Vec<(Box<dyn Stage>, Vec<Tensor>)>,
}

impl Engine {
    /// A hold on this engine's parameters for another thread. `config` is the one that the engine was
    /// loaded with.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    ///
    /// # Panics
    /// Where parameters are divided among ranks: between two uses a rank has only a part of them.
    pub fn reader(&self, config: &ModelConfig) -> Result<Reader> {
        assert!(!self.options.share.sharding.parameters, "the parameters are divided");
        let stages = crate::model::stages(config);
        assert_eq!(stages.len(), self.units.len(), "another model's configuration");
        let own = |view: &Tensor| Ok(view.f_detach()?);
        let stages = stages.into_iter().zip(&self.units).map(|(stage, unit)| {
            Ok((stage, unit.views().iter().map(own).collect::<Result<Vec<_>>>()?))
        });
        Ok(Reader { stages: stages.collect::<Result<Vec<_>>>()? })
    }
}

impl Reader {
    /// The scores `[B]` (logits, fp32) of a batch of at least one sequence.
    ///
    /// # Errors
    /// [`crate::Error::Torch`] from libtorch.
    ///
    /// # Panics
    /// For a batch without sequences.
    pub fn score(&self, batch: &PackedBatch) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        assert!(batch.sequences() > 0, "there is nothing to score");
        let mut x: Option<Tensor> = None;
        for (stage, views) in &self.stages {
            let context = ForwardContext { batch, dropout_seed: None };
            x = Some(stage.forward(Views::new(views), x.as_ref(), context)?);
        }
        Ok(x.expect("a model has stages"))
    }
}
