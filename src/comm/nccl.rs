//! NCCL, for workers with a GPU. Tensors of the host go through Gloo, which every NCCL run also
//! has: it hands out identities, and keeps small host values off the GPU.
//!
//! Collectives run on a stream of their own, ordered with the computation by events, so that
//! [`Pending::wait`] holds up the GPU and not the host. What can go wrong afterwards (a peer that
//! died, a deadline) is therefore seen by a watchdog thread, which ends the communicator; the next
//! call reports it. Without that the host would wait for ever for a GPU that waits for a peer.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rr_launch::contract::heartbeat;
use tch::{Device, Tensor};

use super::liveness::Liveness;
use super::{Communicator, Gloo, Pending, Place, Reduction, late, operation, tell_waiting};
use crate::error::{Error, Result};
use crate::torch_ext::nccl::{self, Comm, State, UNIQUE_ID_BYTES, UniqueId};
use crate::torch_ext::stream::{Event, Stream, set_current};

/// Between two looks of the watchdog at work under way.
const WATCH: Duration = Duration::from_millis(10);

/// Between two looks at a call that the library has not finished queueing, after the first ones.
const SETTLE: Duration = Duration::from_micros(50);

/// Looks at such a call without sleeping in between; most are over by then.
const EAGER_LOOKS: usize = 1000;

/// From this age on of the oldest collective under way, this rank is said to wait in it.
const SLOW: Duration = Duration::from_secs(1);

/// How long the name of a rank that ended may take to get round.
const HEAR_MORE: Duration = Duration::from_millis(500);

/// How long leaving in order may take before the communicator is ended.
const LEAVE: Duration = Duration::from_secs(2);

/// A communicator over NCCL on one device of each rank.
#[derive(Debug)]
pub struct Nccl {
    host: Gloo,
    library: Arc<nccl::Nccl>,
    device: Device,
    /// One for all groups that came from one world: collectives of two communicators that run in
    /// another order on another rank would wait for each other.
    stream: Arc<Stream>,
    shared: Arc<Shared>,
    /// Of the world only: its groups share the world's fate.
    liveness: Option<Liveness>,
    family: Arc<Family>,
    watchdog: Option<JoinHandle<()>>,
    place: RefCell<Option<Place>>,
}

/// The communicators that came from one world: what ends one of them ends all.
#[derive(Debug, Default)]
struct Family {
    members: Mutex<Vec<Weak<Shared>>>,
    /// How many threads are ending communicators.
    ending: Mutex<usize>,
    /// Rung when one of them is through.
    ended: Condvar,
}

/// What the training thread and the watchdog share.
#[derive(Debug)]
struct Shared {
    rank: usize,
    timeout: Duration,
    family: Arc<Family>,
    inner: Mutex<Inner>,
    /// Rung when there is something to watch, or nothing any more.
    bell: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    /// `None` once it has ended.
    comm: Option<Comm>,
    flights: VecDeque<Flight>,
    /// What the library is queueing.
    queueing: Option<String>,
    /// The operation that failed, and why.
    failure: Option<(String, String)>,
    closing: bool,
}

/// A collective that is queued on the stream.
#[derive(Debug)]
struct Flight {
    operation: String,
    done: Arc<Event>,
    deadline: Instant,
    /// When to tell the launcher that this rank waits in it; `None` once that is done.
    tell_at: Option<Instant>,
}

impl Nccl {
    /// Joins the ranks of `host` over `library`, each with its `device`. A wait longer than
    /// `timeout` is an error.
    ///
    /// # Errors
    /// [`Error::Comm`] when a peer does not come, or NCCL refuses.
    pub fn join(
        host: Gloo,
        library: Arc<nccl::Nccl>,
        device: Device,
        timeout: Duration,
    ) -> Result<Self> {
        set_current(device)?;
        let stream = Arc::new(Stream::new(device)?);
        let family = Arc::new(Family::default());
        let mut world = Self::over(host, library, device, stream, Arc::clone(&family), timeout)?;
        let lost = move |rank: usize| family.end(None, &format!("rank {rank} has ended"));
        world.liveness = Some(Liveness::start(&world.host, timeout, lost)?);
        Ok(world)
    }

    fn over(
        host: Gloo,
        library: Arc<nccl::Nccl>,
        device: Device,
        stream: Arc<Stream>,
        family: Arc<Family>,
        timeout: Duration,
    ) -> Result<Self> {
        const JOINING: &str = "joining the NCCL group";
        let rank = host.rank();
        let failed = |message| comm_error(rank, JOINING, message);
        let id = agree_on_id(&host, &library).map_err(|error| match error {
            Error::Comm { message, .. } => failed(message),
            other => other,
        })?;
        let comm = Comm::join(&library, &id, rank, host.world_size()).map_err(failed)?;
        let shared = Arc::new(Shared {
            rank,
            timeout,
            family: Arc::clone(&family),
            inner: Mutex::new(Inner { comm: Some(comm), ..Inner::default() }),
            bell: Condvar::new(),
        });
        lock(&family.members).push(Arc::downgrade(&shared));
        shared.settled(|| shared.settle(shared.lock(), JOINING).map(drop))?;
        let watched = Arc::clone(&shared);
        let watchdog = std::thread::Builder::new()
            .name("nccl watchdog".into())
            .spawn(move || watched.watch(device))
            .map_err(|error| failed(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            host,
            library,
            device,
            stream,
            shared,
            liveness: None,
            family,
            watchdog: Some(watchdog),
            place: RefCell::new(None),
        })
    }

    /// Queues a collective on `tensor` behind the computation queued so far.
    fn start(
        &self,
        name: &str,
        tensor: &Tensor,
        queue: impl FnOnce(&Comm) -> Result<(), String>,
    ) -> Result<Pending> {
        let operation = operation(name, self.place.borrow().as_ref());
        self.stream.follow_computation()?;
        let done = self.shared.settled(|| self.queue(operation, queue))?;
        let shared = Arc::clone(&self.shared);
        // Its memory goes back to the computation's stream, whose later work waits for `done`.
        let kept = tensor.shallow_clone();
        Ok(Pending::new(move || {
            shared.look_back()?;
            done.hold_computation()?;
            drop(kept);
            Ok(())
        }))
    }

    /// Queues what `queue` starts; returns what tells that it is done.
    fn queue(
        &self,
        operation: String,
        queue: impl FnOnce(&Comm) -> Result<(), String>,
    ) -> Result<Arc<Event>> {
        let inner = self.shared.lock();
        self.shared.check(&inner)?;
        let started = inner.comm.as_ref().map_or(Ok(()), queue);
        if let Err(message) = started {
            return Err(self.shared.fail(inner, &operation, &message));
        }
        let mut inner = self.shared.settle(inner, &operation)?;
        let done = Arc::new(self.stream.mark()?);
        let now = Instant::now();
        inner.flights.push_back(Flight {
            operation,
            done: Arc::clone(&done),
            deadline: now + self.shared.timeout,
            tell_at: Some(now + SLOW),
        });
        self.shared.bell.notify_all();
        Ok(done)
    }

    /// Ends the communicator on this rank without waiting for the others, which learn of it.
    pub fn abort(&self) {
        self.shared.fail(self.shared.lock(), "abort", "ended on this rank");
    }

    /// What has ended the communicator, if anything has.
    #[must_use]
    pub fn failure(&self) -> Option<Error> {
        self.shared.look_back().err()
    }

    fn is_ours(&self, tensor: &Tensor) -> bool {
        tensor.device() == self.device
    }
}

/// Rank 0's new identity, on every rank.
fn agree_on_id(host: &Gloo, library: &nccl::Nccl) -> Result<UniqueId> {
    // One more value says whether rank 0 has one: the others must not wait if it has not.
    let mut bytes = [0_u8; UNIQUE_ID_BYTES + 1];
    let mut refusal = None;
    if host.rank() == 0 {
        match library.unique_id() {
            Ok(id) => {
                bytes[..UNIQUE_ID_BYTES].copy_from_slice(&id);
                bytes[UNIQUE_ID_BYTES] = 1;
            }
            Err(message) => refusal = Some(message),
        }
    }
    let tensor = Tensor::f_from_slice(&bytes)?;
    host.broadcast(&tensor, 0)?.wait()?;
    tensor.f_copy_data(&mut bytes, UNIQUE_ID_BYTES + 1)?;
    if bytes[UNIQUE_ID_BYTES] == 0 {
        let message = refusal.unwrap_or_else(|| "rank 0 cannot start one".into());
        return Err(comm_error(host.rank(), "", message));
    }
    let mut id = [0; UNIQUE_ID_BYTES];
    id.copy_from_slice(&bytes[..UNIQUE_ID_BYTES]);
    Ok(id)
}

/// Tells the launcher that this rank waits in `operation`; the step it knows.
fn tell_waiting_in(operation: &str) {
    tell_waiting(operation.split(", step ").next().unwrap_or_default(), None);
}

fn comm_error(rank: usize, operation: &str, message: String) -> Error {
    Error::Comm { rank, operation: operation.into(), message }
}

/// A panic elsewhere leaves nothing half-done in any of these.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Family {
    /// Ends all communicators together, and returns when they have ended. `operation` is what failed;
    /// where none did, each blames what it waits for. To be called without a lock.
    fn end(&self, operation: Option<&str>, message: &str) {
        *lock(&self.ending) += 1;
        let members: Vec<_> = lock(&self.members).iter().filter_map(Weak::upgrade).collect();
        let comms = members.iter().filter_map(|member| member.give_up(operation, message));
        Comm::abort_all(comms.collect());
        *lock(&self.ending) -= 1;
        self.ended.notify_all();
        self.wait();
    }

    /// Returns when no communicator is being ended.
    fn wait(&self) {
        let ended = self.ended.wait_while(lock(&self.ending), |ending| *ending > 0);
        drop(ended.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// What `work` gives; an error only once the communicators have ended. This process may end on an
    /// error, and not while NCCL is at work. To be called without a lock.
    fn settled<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let outcome = work();
        if outcome.is_err() {
            self.family.wait();
        }
        outcome
    }

    /// An earlier failure, once the communicators have ended. To be called without a lock.
    fn look_back(&self) -> Result<()> {
        self.settled(|| self.check(&self.lock()))
    }

    /// An earlier failure, if any.
    fn check(&self, inner: &Inner) -> Result<()> {
        match &inner.failure {
            Some((operation, message)) => Err(comm_error(self.rank, operation, message.clone())),
            None => Ok(()),
        }
    }

    /// Notes a failure of `operation`, or of what this communicator waits for, and hands the
    /// communicator out to be ended.
    fn give_up(&self, operation: Option<&str>, message: &str) -> Option<Comm> {
        let mut inner = self.lock();
        let oldest = inner.flights.front().map(|flight| &flight.operation);
        let own = oldest.or(inner.queueing.as_ref()).map(String::as_str);
        let operation = operation.or(own).unwrap_or("watching over the ranks").to_owned();
        inner.failure.get_or_insert((operation, message.to_owned()));
        inner.flights.clear();
        self.bell.notify_all();
        inner.comm.take()
    }

    /// Ends the communicator, and those of its family, because `operation` failed; returns the first
    /// failure.
    fn fail(&self, inner: MutexGuard<'_, Inner>, operation: &str, message: &str) -> Error {
        drop(inner);
        self.family.end(Some(operation), message);
        let first = self.check(&self.lock()).err();
        first.unwrap_or_else(|| comm_error(self.rank, operation, message.to_owned()))
    }

    /// Waits until the library has queued what was started.
    fn settle<'a>(
        &'a self,
        mut inner: MutexGuard<'a, Inner>,
        operation: &str,
    ) -> Result<MutexGuard<'a, Inner>> {
        let begun = Instant::now();
        let deadline = begun + self.timeout;
        let (mut looks, mut told) = (0, false);
        inner.queueing = Some(operation.to_owned());
        loop {
            self.check(&inner)?;
            match inner.comm.as_ref().map_or(Ok(State::Queued), Comm::state) {
                Ok(State::Queued) => {
                    inner.queueing = None;
                    if told {
                        heartbeat::working(format_args!("computing"));
                    }
                    return Ok(inner);
                }
                Ok(State::InProgress) if Instant::now() < deadline => {
                    // The first collective connects the ranks, and waits for each of them.
                    if !told && begun.elapsed() >= SLOW {
                        tell_waiting_in(operation);
                        told = true;
                    }
                }
                Ok(State::InProgress) => {
                    return Err(self.fail(inner, operation, &late(self.timeout)));
                }
                Err(message) => {
                    inner = self.hear_more(inner);
                    self.check(&inner)?;
                    return Err(self.fail(inner, operation, &message));
                }
            }
            drop(inner);
            looks += 1;
            if looks > EAGER_LOOKS {
                std::thread::sleep(SETTLE);
            } else {
                std::thread::yield_now();
            }
            inner = self.lock();
        }
    }

    /// NCCL has seen a failure. If a rank has ended, it is known in a moment which.
    fn hear_more<'a>(&'a self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        let heard = self.bell.wait_timeout_while(inner, HEAR_MORE, |inner| {
            inner.failure.is_none() && !inner.closing
        });
        heard.unwrap_or_else(PoisonError::into_inner).0
    }

    /// The watchdog: looks after collectives under way until the communicator closes.
    fn watch(&self, device: Device) {
        let mut inner = self.lock();
        if let Err(error) = set_current(device) {
            self.fail(inner, "watching NCCL", &error.to_string());
            return;
        }
        while !inner.closing && inner.failure.is_none() {
            if inner.flights.is_empty() {
                inner = self.bell.wait(inner).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if let Err(message) = self.look(&mut inner) {
                inner = self.hear_more(inner);
                let oldest = inner.flights.front().map(|flight| flight.operation.clone());
                self.fail(inner, &oldest.unwrap_or_default(), &message);
                return;
            }
            let waited = self.bell.wait_timeout(inner, WATCH);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Forgets collectives that are done; an error for what has failed or is late.
    fn look(&self, inner: &mut Inner) -> Result<(), String> {
        while let Some(flight) = inner.flights.front_mut() {
            if flight.done.is_done().map_err(|error| error.to_string())? {
                inner.flights.pop_front();
                continue;
            }
            if let Some(comm) = &inner.comm {
                comm.state()?;
            }
            // The host does not wait in a collective, so that nobody else can tell.
            if flight.tell_at.take_if(|at| Instant::now() >= *at).is_some() {
                tell_waiting_in(&flight.operation);
            }
            return if Instant::now() < flight.deadline { Ok(()) } else { Err(late(self.timeout)) };
        }
        Ok(())
    }

    /// Leaves in order when nothing has failed, and at once otherwise.
    fn close(&self) {
        let mut inner = self.lock();
        let Some(comm) = inner.comm.take() else { return };
        let deadline = Instant::now() + LEAVE;
        let mut state = comm.leave().map(|()| State::InProgress);
        while state == Ok(State::InProgress) && Instant::now() < deadline {
            std::thread::sleep(SETTLE);
            state = comm.state();
        }
        if state == Ok(State::Queued) { comm.free() } else { comm.abort() }
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.bell.notify_all();
        if let Some(watchdog) = self.watchdog.take() {
            // It cannot have panicked; if it has, there is nobody left to tell.
            let _ = watchdog.join();
        }
        self.shared.close();
    }
}

impl Communicator for Nccl {
    fn rank(&self) -> usize {
        self.host.rank()
    }

    fn world_size(&self) -> usize {
        self.host.world_size()
    }

    fn set_place(&self, place: Option<&Place>) {
        *self.place.borrow_mut() = place.cloned();
        self.host.set_place(place);
    }

    fn all_reduce(&self, tensor: &Tensor, op: Reduction) -> Result<Pending> {
        if !self.is_ours(tensor) {
            self.shared.look_back()?;
            return self.host.all_reduce(tensor, op);
        }
        self.start("all_reduce", tensor, |comm| comm.all_reduce(tensor, op, &self.stream))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Pending> {
        if !self.is_ours(tensor) {
            return self.host.broadcast(tensor, root);
        }
        self.start("broadcast", tensor, |comm| comm.broadcast(tensor, root, &self.stream))
    }

    fn reduce_scatter(&self, whole: &Tensor, op: Reduction) -> Result<Pending> {
        if !self.is_ours(whole) {
            return self.host.reduce_scatter(whole, op);
        }
        let part = (self.rank(), self.world_size());
        self.start("reduce_scatter", whole, |comm| {
            comm.reduce_scatter(whole, part, op, &self.stream)
        })
    }

    fn all_gather(&self, whole: &Tensor) -> Result<Pending> {
        if !self.is_ours(whole) {
            return self.host.all_gather(whole);
        }
        let part = (self.rank(), self.world_size());
        self.start("all_gather", whole, |comm| comm.all_gather(whole, part, &self.stream))
    }

    fn split(&self, name: &str, ranks: &[usize]) -> Result<Box<dyn Communicator>> {
        let Some(host) = self.host.split_off(name, ranks)? else {
            return Ok(Box::new(super::Solo));
        };
        let (library, stream) = (Arc::clone(&self.library), Arc::clone(&self.stream));
        let (family, timeout) = (Arc::clone(&self.family), self.shared.timeout);
        Ok(Box::new(Self::over(host, library, self.device, stream, family, timeout)?))
    }

    fn barrier(&self) -> Result<()> {
        self.shared.look_back()?;
        self.host.barrier()
    }

    fn leave(&self) -> Result<()> {
        self.barrier()?;
        if let Some(liveness) = &self.liveness {
            liveness.say_goodbye();
        }
        Ok(())
    }
}
