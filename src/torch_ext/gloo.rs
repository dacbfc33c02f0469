//! libtorch's own Gloo process group and its TCP store.

use std::ffi::CString;
use std::time::Duration;

use tch::Tensor;

use super::{check, ffi};

/// How one rank joins a group.
#[derive(Debug, Clone)]
pub struct Join {
    /// Host on which the store listens.
    pub host: String,
    /// Port of that store.
    pub port: u16,
    /// Whether this rank starts it.
    pub serves_store: bool,
    /// This rank.
    pub rank: usize,
    /// Number of ranks.
    pub world_size: usize,
    /// Deadline of the rendezvous.
    pub joining: Duration,
    /// Deadline of every collective.
    pub timeout: Duration,
    /// What the peers reach this rank through.
    pub via: Via,
    /// The address by which this rank reaches the store's host, where it is on another.
    pub way: Option<String>,
    /// Separates this group's keys in the store from those of an earlier group.
    pub prefix: String,
    /// Whether the store lives over several meetings, such as that of torchrun's agent: the keys of earlier
    /// ones are still there, and the prefix is the same for all.
    pub is_lasting: bool,
}

/// What a rank binds, so that its peers reach it.
#[derive(Debug, Clone)]
pub enum Via {
    /// An address of this host.
    Address(String),
    /// Loopback, though peers are on other hosts: the address by which one of those reaches the store's
    /// host, which is this one; loopback where none tells.
    Asked(String),
    /// Network interfaces, by name, with commas between.
    Interfaces(String),
}

/// How values of several ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduction {
    /// The sum.
    Sum = 0,
    /// The largest.
    Max = 1,
    /// The smallest.
    Min = 2,
}

/// A joined group. Collectives start in the same order on every rank.
#[derive(Debug)]
pub struct Group(*mut ffi::Group);

// SAFETY: ProcessGroupGloo runs its collectives on threads of its own and locks its queue; the
// pointer is only ever used through `&self` and freed once.
unsafe impl Send for Group {}

/// A collective under way. Dropping it without waiting leaves it to finish by itself; the C++ side
/// holds references to the tensors.
#[derive(Debug)]
#[must_use = "a collective is finished only after wait()"]
pub struct Work(*mut ffi::Work);

// SAFETY: c10d::Work is reference counted and locked inside.
unsafe impl Send for Work {}

impl Group {
    /// Joins the group; returns when all ranks are there.
    ///
    /// # Errors
    /// The backend's message: a port taken, a peer absent until the timeout.
    pub fn join(join: &Join) -> Result<Self, String> {
        let text = |s: &str| CString::new(s).map_err(|_| format!("{s:?} holds a NUL byte"));
        let (address, interfaces) = match &join.via {
            Via::Address(address) | Via::Asked(address) => (address.as_str(), ""),
            Via::Interfaces(names) => ("", names.as_str()),
        };
        let way = text(join.way.as_deref().unwrap_or_default())?;
        let (host, prefix) = (text(&join.host)?, text(&join.prefix)?);
        let (address, interfaces) = (text(address)?, text(interfaces)?);
        let milliseconds = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX);
        let raw = ffi::GlooJoin {
            host: host.as_ptr(),
            port: join.port,
            serves_store: join.serves_store,
            rank: i32::try_from(join.rank).map_err(|e| e.to_string())?,
            world_size: i32::try_from(join.world_size).map_err(|e| e.to_string())?,
            joining_ms: milliseconds(join.joining),
            timeout_ms: milliseconds(join.timeout),
            local_address: address.as_ptr(),
            interfaces: interfaces.as_ptr(),
            way: way.as_ptr(),
            asks_the_way: matches!(join.via, Via::Asked(_)),
            prefix: prefix.as_ptr(),
            is_lasting: join.is_lasting,
        };
        let mut group = std::ptr::null_mut();
        // SAFETY: all strings outlive the call.
        check(unsafe { ffi::rr_gloo_join(&raw const raw, &raw mut group) })?;
        Ok(Self(group))
    }

    /// A group of `size` of this group's ranks, all of which call this with the same `name`, which
    /// no other group of theirs has; `rank` is this one's number among them.
    ///
    /// # Errors
    /// The backend's message.
    pub fn split(&self, rank: usize, size: usize, name: &str) -> Result<Self, String> {
        let name = CString::new(name).map_err(|error| error.to_string())?;
        let rank = i32::try_from(rank).map_err(|error| error.to_string())?;
        let size = i32::try_from(size).map_err(|error| error.to_string())?;
        let mut group = std::ptr::null_mut();
        // SAFETY: the group is alive and the name outlives the call.
        check(unsafe { ffi::rr_gloo_split(self.0, rank, size, name.as_ptr(), &raw mut group) })?;
        Ok(Self(group))
    }

    /// Reduces a contiguous CPU tensor over all ranks, in place.
    ///
    /// # Errors
    /// The backend's message.
    pub fn all_reduce(&self, tensor: &Tensor, op: Reduction) -> Result<Work, String> {
        let mut work = std::ptr::null_mut();
        // SAFETY: the group is alive; the work takes its own reference on the tensor.
        check(unsafe {
            ffi::rr_gloo_all_reduce(self.0, tensor.as_ptr(), op as i32, &raw mut work)
        })?;
        Ok(Work(work))
    }

    /// Copies `root`'s contiguous CPU tensor into that of every other rank.
    ///
    /// # Errors
    /// The backend's message.
    pub fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Work, String> {
        let root = i32::try_from(root).map_err(|e| e.to_string())?;
        let mut work = std::ptr::null_mut();
        // SAFETY: as in all_reduce.
        check(unsafe { ffi::rr_gloo_broadcast(self.0, tensor.as_ptr(), root, &raw mut work) })?;
        Ok(Work(work))
    }

    /// Finishes when every rank has come here.
    ///
    /// # Errors
    /// The backend's message.
    pub fn barrier(&self) -> Result<Work, String> {
        let mut work = std::ptr::null_mut();
        // SAFETY: the group is alive.
        check(unsafe { ffi::rr_gloo_barrier(self.0, &raw mut work) })?;
        Ok(Work(work))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: made by rr_gloo_join and freed here alone.
        unsafe { ffi::rr_gloo_leave(self.0) }
    }
}

impl Work {
    /// Waits until the collective is done on this rank.
    ///
    /// # Errors
    /// The backend's message: a peer that went away, or the timeout.
    pub fn wait(self) -> Result<(), String> {
        let raw = self.0;
        std::mem::forget(self);
        // SAFETY: rr_gloo_wait frees the work, and `self` is forgotten.
        check(unsafe { ffi::rr_gloo_wait(raw) })
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // SAFETY: not waited for, so still ours to free.
        unsafe { ffi::rr_gloo_forget(self.0) }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::net::TcpListener;
    use std::thread::{self, JoinHandle};

    use tch::{Device, Kind};

    use super::*;

    fn join(port: u16, rank: usize, world_size: usize) -> Join {
        let limit = Duration::from_secs(60);
        Join {
            host: "127.0.0.1".into(),
            port,
            serves_store: false,
            rank,
            world_size,
            joining: limit,
            timeout: limit,
            via: Via::Address("127.0.0.1".into()),
            way: None,
            prefix: "gloo".into(),
            is_lasting: true,
        }
    }

    #[test]
    fn ranks_meet_again_in_a_store_with_the_keys_of_earlier_meetings() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let server = Join { serves_store: true, is_lasting: false, ..join(port, 0, 1) };
        let _agent = Group::join(&Join { prefix: "agent".into(), ..server }).unwrap();
        for meeting in 0..3 {
            let start = |rank: usize| -> JoinHandle<f64> {
                thread::spawn(move || {
                    let group = Group::join(&join(port, rank, 3)).unwrap();
                    let sum = Tensor::full([1], rank as f64 + 1.0, (Kind::Double, Device::Cpu));
                    group.all_reduce(&sum, Reduction::Sum).unwrap().wait().unwrap();
                    sum.double_value(&[0])
                })
            };
            // Rank 0 is late: what the others find is of the meeting before.
            let others = [2, 1].map(start);
            if meeting > 0 {
                thread::sleep(Duration::from_millis(100));
            }
            let first = start(0);
            for rank in others.into_iter().chain([first]) {
                assert_eq!(rank.join().unwrap(), 6.0);
            }
        }
    }
}
