//! Communication between ranks: one small trait, a backend per transport.

mod gloo;
mod groups;
mod liveness;
mod nccl;
mod solo;
mod way;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rr_launch::contract::{WorkerEnv, heartbeat};
use tch::Tensor;

pub use gloo::Gloo;
pub use groups::Groups;
pub use nccl::Nccl;
pub use solo::Solo;

pub use crate::torch_ext::gloo::Reduction;

use crate::error::{Error, Result};

/// Collectives over the ranks of a run. Every rank calls the same ones in the same order.
pub trait Communicator: fmt::Debug {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// What the collectives that follow are for; their errors say it.
    fn set_place(&self, _place: Option<&Place>) {}

    /// Starts reducing a contiguous tensor over all ranks, in place.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when the collective cannot start.
    fn all_reduce(&self, tensor: &Tensor, op: Reduction) -> Result<Pending>;

    /// Starts copying `root`'s contiguous tensor into that of every rank.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when the collective cannot start.
    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Pending>;

    /// Starts reducing equal parts of `whole` over all ranks: part number `rank` of `whole` holds
    /// this rank's result afterwards, the other parts hold nothing of use. `whole` is contiguous,
    /// 1-d, and divides by the number of ranks.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when the collective cannot start.
    fn reduce_scatter(&self, whole: &Tensor, op: Reduction) -> Result<Pending>;

    /// Starts collecting equal parts: every rank gives part number `rank` of its `whole`, and all
    /// parts of `whole` are filled afterwards. `whole` is contiguous, 1-d, and divides by the
    /// number of ranks.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when the collective cannot start.
    fn all_gather(&self, whole: &Tensor) -> Result<Pending>;

    /// A communicator over `ranks` of this one, in that order; all of them, and no others, call
    /// this with the same list. A rank is in at most one group of the same `name`.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when the group does not come about.
    fn split(&self, name: &str, ranks: &[usize]) -> Result<Box<dyn Communicator>>;

    /// Returns when every rank has come here.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when a peer went away or the deadline passed.
    fn barrier(&self) -> Result<()>;

    /// Ends the work together: a barrier, after which a rank may go without being missed.
    ///
    /// # Errors
    /// As [`Communicator::barrier`].
    fn leave(&self) -> Result<()> {
        self.barrier()
    }
}

/// The longest wait for another rank where nothing else is asked for.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// The ranks that `env` describes, for work that moves host values only: over TCP, or a world of one.
/// `timeout` is the longest wait for another rank, [`TIMEOUT`] where nothing else is asked for.
///
/// # Errors
/// As [`Gloo::join`].
pub fn join_hosts(env: &WorkerEnv, timeout: Option<Duration>) -> Result<Box<dyn Communicator>> {
    let timeout = timeout.unwrap_or(TIMEOUT);
    Ok(if env.world_size == 1 { Box::new(Solo) } else { Box::new(Gloo::join(env, timeout)?) })
}

/// What a collective is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The stage whose buffers are moved.
    pub stage: Arc<str>,
    /// Index of the optimizer step, from 0; none outside of training steps.
    pub step: Option<usize>,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}", self.stage)?;
        self.step.map_or(Ok(()), |step| write!(out, ", step {}", step + 1))
    }
}

/// Tells the launcher that this rank waits for the others in the collective `name`.
fn tell_waiting(name: &str, stage: Option<&str>) {
    match stage {
        Some(stage) => heartbeat::waiting(format_args!("{name} of {stage}")),
        None => heartbeat::waiting(format_args!("{name}")),
    }
}

/// What is said of a collective that a peer did not come to within `timeout`.
fn late(timeout: Duration) -> String {
    format!(
        "timed out after {} s; a peer is stuck, gone or slow (--timeout)",
        timeout.as_secs_f64()
    )
}

/// `name`, and what it is for where that is known.
fn operation(name: &str, place: Option<&Place>) -> String {
    place.map_or_else(|| name.to_owned(), |place| format!("{name} of {place}"))
}

/// A collective under way; its tensors may be used only after [`Pending::wait`].
#[must_use = "a collective is finished only after wait()"]
pub struct Pending(Option<Box<dyn FnOnce() -> Result<()> + Send>>);

impl Pending {
    /// One that is already done.
    pub(crate) fn done() -> Self {
        Self(None)
    }

    /// One that is done when all of `parts` are.
    pub(crate) fn all(parts: Vec<Self>) -> Self {
        Self::new(move || parts.into_iter().try_for_each(Self::wait))
    }

    /// One whose end `wait` brings about.
    fn new(wait: impl FnOnce() -> Result<()> + Send + 'static) -> Self {
        Self(Some(Box::new(wait)))
    }

    /// Waits until the collective is done on this rank.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] when a peer went away or the deadline passed.
    pub fn wait(self) -> Result<()> {
        self.0.map_or(Ok(()), |wait| wait())
    }
}

/// Sums a few host values over all ranks.
///
/// # Errors
/// As [`Communicator::all_reduce`].
pub fn reduce_values(comm: &dyn Communicator, values: &mut [f64], op: Reduction) -> Result<()> {
    let tensor = Tensor::f_from_slice(values)?;
    comm.all_reduce(&tensor, op)?.wait()?;
    tensor.f_copy_data(values, values.len())?;
    Ok(())
}

/// Returns on all ranks when `is_done` holds on each, however long that takes: they meet again and again
/// meanwhile, so that a rank that ends is noticed, and none is waited for longer than its deadline. One that
/// is not done says so by `tell`, over and over.
///
/// # Errors
/// As [`Communicator::all_reduce`].
pub fn wait_together(
    comm: &dyn Communicator,
    is_done: impl Fn() -> bool,
    tell: impl Fn(),
) -> Result<()> {
    let mut pause = Duration::from_millis(5);
    loop {
        let works = !is_done();
        let mut left = [f64::from(u8::from(works))];
        reduce_values(comm, &mut left, Reduction::Max)?;
        if left[0] == 0.0 {
            return Ok(());
        }
        // Behind the collective, whose own heartbeats are the same every time.
        if works {
            tell();
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(Duration::from_millis(500));
    }
}

/// Does `work` in a thread of its own, and returns what came of it when every rank's is done, as
/// [`wait_together`], which says what `tell` is.
///
/// # Errors
/// As [`Communicator::all_reduce`]; [`Error::Training`] where there is no thread to be had.
///
/// # Panics
/// When `work` does.
pub fn work_together<T: Send>(
    comm: &dyn Communicator,
    work: impl FnOnce() -> T + Send,
    tell: impl Fn(),
) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, work);
        let thread = thread
            .map_err(|error| Error::Training(format!("cannot start another thread: {error}")))?;
        let met = wait_together(comm, || thread.is_finished(), tell);
        let done = thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        met.map(|()| done)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::cell::Cell;

    use super::*;

    #[test]
    fn a_rank_that_is_not_done_says_so_each_time() {
        let (looks, told) = (Cell::new(0), Cell::new(0));
        let is_done = || looks.replace(looks.get() + 1) == 3;
        wait_together(&Solo, is_done, || told.set(told.get() + 1)).unwrap();
        assert_eq!((looks.get(), told.get()), (4, 3));
    }
}
