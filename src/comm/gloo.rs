//! Gloo over TCP, for workers without a GPU.

use std::cell::RefCell;
use std::net::{TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rr_launch::contract::{WorkerEnv, heartbeat, vars};
use tch::{Device, Tensor};

use super::{Communicator, Pending, Place, Reduction, late, operation, tell_waiting};
use crate::error::{Error, Result};
use crate::torch_ext::gloo::{Group, Join, Via, Work};

/// The environment variable that names the network interface to bind, as for torch.
const INTERFACE_VARIABLE: &str = "GLOO_SOCKET_IFNAME";

/// Between two looks for rank 0's store.
const STORE_POLL: Duration = Duration::from_millis(10);

/// A group of ranks joined through rank 0's TCP store.
#[derive(Debug)]
pub struct Gloo {
    group: Group,
    rank: usize,
    world_size: usize,
    /// The host of rank 0, as the ranks name it.
    master: String,
    place: RefCell<Option<Place>>,
}

impl Gloo {
    /// Joins the ranks that `env` describes; returns when all are there.
    ///
    /// # Errors
    /// [`Error::Usage`] when the port is taken, but [`Error::Comm`] where rr-launch has found it free
    /// before; [`Error::Comm`] when a peer does not come before `timeout`.
    pub fn join(env: &WorkerEnv, timeout: Duration) -> Result<Self> {
        let failed = |message: String| Error::Comm {
            rank: env.rank,
            operation: format!("joining the group at {}:{}", env.master_addr, env.master_port),
            message,
        };
        let via = match std::env::var(INTERFACE_VARIABLE) {
            Ok(name) if !name.is_empty() => Via::Interface(name),
            _ => Via::Address(
                own_address(&env.master_addr, env.master_port)
                    .map_err(|error| failed(format!("no way to that address: {error}")))?,
            ),
        };
        // torchrun's agent already listens at the address that it gives.
        let agent_serves = std::env::var(vars::TORCHELASTIC_USE_AGENT_STORE)
            .is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        let serves_store = env.rank == 0 && !agent_serves;
        if !serves_store {
            wait_for_store(&env.master_addr, env.master_port, timeout);
        }
        let join = Join {
            host: env.master_addr.clone(),
            port: env.master_port,
            serves_store,
            rank: env.rank,
            world_size: env.world_size,
            timeout,
            via,
            prefix: format!("gloo/{}", env.restart_count),
        };
        let group = Group::join(&join).map_err(|message| {
            if message.contains("EADDRINUSE") || message.contains("already in use") {
                let is_launched = std::env::var_os(vars::RR_LAUNCHER).is_some();
                port_is_taken(env, is_launched)
            } else {
                failed(message)
            }
        })?;
        Ok(Self::over(group, env.rank, env.world_size, &env.master_addr))
    }

    fn over(group: Group, rank: usize, world_size: usize, master: &str) -> Self {
        Self { group, rank, world_size, master: master.to_owned(), place: RefCell::new(None) }
    }

    pub(super) fn master(&self) -> &str {
        &self.master
    }

    fn failed(&self, name: &str) -> impl Fn(String) -> Error + Send + use<> {
        let rank = self.rank;
        let operation = operation(name, self.place.borrow().as_ref());
        move |message| {
            // Gloo begins with the place in its own source, which tells a user nothing.
            let place = message.strip_prefix('[').and_then(|rest| rest.split_once("] "));
            let plain = place.map_or(message.as_str(), |(_, plain)| plain);
            let message = waited(plain).map_or_else(|| plain.to_owned(), late);
            Error::Comm { rank, operation: operation.clone(), message }
        }
    }

    /// The group of `ranks`, of which this is one; none where it is alone.
    ///
    /// # Errors
    /// [`Error::Comm`] when the group does not come about.
    pub(super) fn split_off(&self, name: &str, ranks: &[usize]) -> Result<Option<Self>> {
        let rank = ranks.iter().position(|&rank| rank == self.rank);
        let rank = rank.expect("only members of a group make it");
        if ranks.len() == 1 {
            return Ok(None);
        }
        let name = format!("{name}/{}", ranks[0]);
        let group =
            self.group.split(rank, ranks.len(), &name).map_err(self.failed("splitting a group"))?;
        Ok(Some(Self::over(group, rank, ranks.len(), &self.master)))
    }

    /// Gloo works on host memory: a tensor elsewhere goes through a copy.
    fn on_host(
        &self,
        tensor: &Tensor,
        name: &'static str,
        start: impl FnOnce(&Tensor) -> Result<Work, String>,
    ) -> Result<Pending> {
        let failed = self.failed(name);
        let stage = self.place.borrow().as_ref().map(|place| Arc::clone(&place.stage));
        let finish = move |work: Work| {
            tell_waiting(name, stage.as_deref());
            let outcome = work.wait();
            heartbeat::working(format_args!("computing"));
            outcome
        };
        if tensor.device() == Device::Cpu {
            let work = start(tensor).map_err(&failed)?;
            return Ok(Pending::new(move || finish(work).map_err(failed)));
        }
        let host = tensor.f_to_device(Device::Cpu)?;
        let work = start(&host).map_err(&failed)?;
        let mut target = tensor.shallow_clone();
        Ok(Pending::new(move || {
            finish(work).map_err(failed)?;
            Ok(target.f_copy_(&host)?)
        }))
    }
}

impl Communicator for Gloo {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn set_place(&self, place: Option<&Place>) {
        *self.place.borrow_mut() = place.cloned();
    }

    fn all_reduce(&self, tensor: &Tensor, op: Reduction) -> Result<Pending> {
        self.on_host(tensor, "all_reduce", |host| self.group.all_reduce(host, op))
    }

    fn broadcast(&self, tensor: &Tensor, root: usize) -> Result<Pending> {
        self.on_host(tensor, "broadcast", |host| self.group.broadcast(host, root))
    }

    /// Gloo's own reduce-scatter is slower than reducing everything: 137 ms against 76 ms for 90 MB
    /// over two ranks.
    fn reduce_scatter(&self, whole: &Tensor, op: Reduction) -> Result<Pending> {
        self.all_reduce(whole, op)
    }

    /// A broadcast in place by every rank; Gloo's own all-gather copies more and takes 2.8 times
    /// as long.
    fn all_gather(&self, whole: &Tensor) -> Result<Pending> {
        let part = whole.size1()? / self.world_size as i64;
        let parts = (0..self.world_size)
            .map(|root| self.broadcast(&whole.f_narrow(0, root as i64 * part, part)?, root))
            .collect::<Result<Vec<_>>>()?;
        Ok(Pending::all(parts))
    }

    fn split(&self, name: &str, ranks: &[usize]) -> Result<Box<dyn Communicator>> {
        Ok(match self.split_off(name, ranks)? {
            Some(group) => Box::new(group),
            None => Box::new(super::Solo),
        })
    }

    fn barrier(&self) -> Result<()> {
        tell_waiting("barrier", None);
        let work = self.group.barrier().map_err(self.failed("barrier"))?;
        work.wait().map_err(self.failed("barrier"))
    }
}

/// The port of rank 0's store is another program's. The launcher saw it free, and let it go for rank 0
/// to take: that is nobody's mistake, and another start finds another port, or the same one free.
fn port_is_taken(env: &WorkerEnv, is_launched: bool) -> Error {
    let WorkerEnv { rank, master_addr: host, master_port: port, .. } = env;
    if !is_launched {
        let advice = "choose another MASTER_PORT (rr-launch --master-port)";
        return Error::Usage(format!("port {port} on {host} is taken; {advice}"));
    }
    Error::Comm {
        rank: *rank,
        operation: format!("joining the group at {host}:{port}"),
        message: "another program has taken the port since rr-launch found it free; start again \
                  (rr-launch --max-restarts)"
            .to_owned(),
    }
}

/// Waits until rank 0's store listens, or the deadline passes; joining then tells what is wrong.
/// The store's own client sleeps a whole second after a refused connection, which workers that
/// start together would pay on most starts.
fn wait_for_store(host: &str, port: u16, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    while Instant::now() < deadline && TcpStream::connect((host, port)).is_err() {
        std::thread::sleep(STORE_POLL);
    }
}

/// The address of this host on the way to `host`. Connecting a UDP socket asks the routing table
/// and sends nothing; a host name that resolves to a loopback address thus stays on loopback.
fn own_address(host: &str, port: u16) -> std::io::Result<String> {
    let bind = if host.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    let socket = UdpSocket::bind(bind)?;
    socket.connect((host, port))?;
    Ok(socket.local_addr()?.ip().to_string())
}

/// How long Gloo has waited in vain, by its message "Timed out waiting 3000ms for …"; `None` where it
/// says something else.
fn waited(message: &str) -> Option<Duration> {
    let (milliseconds, _) = message.strip_prefix("Timed out waiting ")?.split_once("ms ")?;
    milliseconds.parse().ok().map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_was_taken_meanwhile_is_no_mistake_of_the_user() {
        let world = [("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")];
        let place = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")];
        let named = |name: &str| {
            let found = world.iter().chain(&place).find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let env = WorkerEnv::from_lookup(named).expect("a complete environment");
        let [given, chosen] = [false, true].map(|is_launched| port_is_taken(&env, is_launched));
        assert_eq!((given.exit_code(), chosen.exit_code()), (2, 1));
        assert!(chosen.to_string().contains("127.0.0.1:29500"), "{chosen}");
    }

    #[test]
    fn how_long_gloo_waited_is_read_from_its_message() {
        let waited = |message| waited(message).map(late);
        assert_eq!(
            waited("Timed out waiting 3500ms for recv operation to complete").as_deref(),
            Some("timed out after 3.5 s; a peer is stuck, gone or slow (--timeout)")
        );
        assert_eq!(waited("Connection closed by peer [127.0.0.1]:41"), None);
    }
}
