//! The groups of ranks that sharded training works over.

use super::{Communicator, Place};
use crate::error::Result;

/// All ranks, those that divide buffers among themselves, and those that hold the same part.
///
/// Without hybrid sharding the ranks divide buffers over the whole world and nobody holds the same
/// part twice. With it, buffers are divided inside a machine, and ranks of the same number on each
/// machine are replicas.
#[derive(Debug)]
pub struct Groups {
    /// All ranks.
    pub world: Box<dyn Communicator>,
    /// `None`: the world.
    shard: Option<Box<dyn Communicator>>,
    /// `None`: no replicas.
    replicas: Option<Box<dyn Communicator>>,
}

impl Groups {
    /// Buffers are divided over the whole world, or not at all.
    #[must_use]
    pub fn flat(world: Box<dyn Communicator>) -> Self {
        Self { world, shard: None, replicas: None }
    }

    /// Buffers are divided inside blocks of `block` consecutive ranks (those of a machine), and
    /// replicated over the blocks. The world divides by `block`.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when a group does not come about.
    pub fn hybrid(world: Box<dyn Communicator>, block: usize) -> Result<Self> {
        let (rank, size) = (world.rank(), world.world_size());
        assert!(block > 0 && size.is_multiple_of(block), "{size} ranks in blocks of {block}");
        let first = rank - rank % block;
        let inside: Vec<usize> = (first..first + block).collect();
        let across: Vec<usize> = (rank % block..size).step_by(block).collect();
        let shard = Some(world.split("shard", &inside)?);
        let replicas = Some(world.split("replicas", &across)?);
        Ok(Self { world, shard, replicas })
    }

    /// What the collectives that follow are for.
    pub fn set_place(&self, place: Option<&Place>) {
        self.world.set_place(place);
        for group in [&self.shard, &self.replicas].into_iter().flatten() {
            group.set_place(place);
        }
    }

    /// The ranks that divide buffers.
    #[must_use]
    pub fn shard(&self) -> &dyn Communicator {
        self.shard.as_ref().unwrap_or(&self.world).as_ref()
    }

    /// The ranks that hold the same part as this one, where there are any beside it.
    #[must_use]
    pub fn replicas(&self) -> Option<&dyn Communicator> {
        self.replicas.as_deref().filter(|replicas| replicas.world_size() > 1)
    }
}
