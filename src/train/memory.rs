//! What the workers of a run held in memory, as they counted it.

use std::fmt;

use serde_json::{Value, json};

use crate::comm::{Communicator, Reduction, reduce_values};
use crate::engine::Engine;
use crate::error::Result;
use crate::shard::HeldBytes;
use crate::torch_ext::runtime;

/// Bytes, each the largest of all workers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Memory {
    /// Parameters, gradients and states between two steps, and what of them is offloaded.
    pub held: HeldBytes,
    /// The most of each at once during steps.
    pub peak: HeldBytes,
    /// The most of parameters while the model was saved.
    pub saving: usize,
    /// The most that a process had of the host's memory, with libraries and buffers.
    pub process: usize,
    /// The most that tensors held on a GPU; 0 on the CPU.
    pub gpu: usize,
}

impl Memory {
    /// Compares what the ranks of `comm` count, which all call it; `saving` is what
    /// [`crate::checkpoint::save_model`] returned.
    pub(super) fn gather(engine: &Engine, saving: usize, comm: &dyn Communicator) -> Result<Self> {
        let (held, peak) = (engine.held_bytes(), engine.peak_held_bytes());
        let device = engine.device();
        let process = runtime::peak_host_memory().unwrap_or(0);
        let gpu = runtime::peak_gpu_memory(device).unwrap_or(0);
        // An f64 holds every number of bytes below 2^53.
        let mut bytes = [
            held.parameters,
            held.gradients,
            held.states,
            held.host,
            peak.parameters,
            peak.gradients,
            peak.states,
            peak.host,
            saving,
            process,
            gpu,
        ]
        .map(|bytes| bytes as f64);
        reduce_values(comm, &mut bytes, Reduction::Max)?;
        let bytes = bytes.map(|bytes| bytes as usize);
        let kinds = |at: usize| HeldBytes {
            parameters: bytes[at],
            gradients: bytes[at + 1],
            states: bytes[at + 2],
            host: bytes[at + 3],
        };
        let [.., saving, process, gpu] = bytes;
        Ok(Self { held: kinds(0), peak: kinds(4), saving, process, gpu })
    }

    /// The line of `metrics.jsonl`; all sizes in bytes.
    pub(super) fn to_json(self) -> Value {
        let Self { held, peak, saving, process, gpu } = self;
        let kinds = |held: HeldBytes| {
            json!({
                "parameters": held.parameters,
                "gradients": held.gradients,
                "states": held.states,
                "host": held.host,
            })
        };
        json!({
            "type": "memory",
            "held": kinds(held),
            "peak": kinds(peak),
            "peak_saving": saving,
            "peak_process": process,
            "peak_gpu": gpu,
        })
    }
}

impl fmt::Display for Memory {
    /// One line, in MB of 10^6 bytes.
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: usize| bytes as f64 / 1e6;
        write!(
            out,
            "held per worker: parameters {:.0} MB, gradients {:.0} MB, optimizer states {:.0} MB; \
             at most {:.0}, {:.0} and {:.0} MB; ",
            mb(self.held.parameters),
            mb(self.held.gradients),
            mb(self.held.states),
            mb(self.peak.parameters),
            mb(self.peak.gradients),
            mb(self.peak.states),
        )?;
        if self.held.host > 0 {
            write!(out, "offloaded {:.0} MB; ", mb(self.held.host))?;
        }
        if self.gpu > 0 {
            write!(out, "on a GPU at most {:.0} MB; ", mb(self.gpu))?;
        }
        write!(out, "a process at most {:.0} MB", mb(self.process))
    }
}
