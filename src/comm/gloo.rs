//! Gloo over TCP, for workers without a GPU.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rr_launch::contract::{WorkerEnv, heartbeat, vars};
use tch::{Device, Tensor};

use super::way::{self, Way};
use super::{Communicator, Pending, Place, Reduction, late, operation, tell_waiting};
use crate::error::{Error, Result};
use crate::torch_ext::gloo::{Group, Join, Via, Work};

/// The environment variable that names the network interfaces to bind, as for torch.
const INTERFACE_VARIABLE: &str = "GLOO_SOCKET_IFNAME";

/// The least that is left for the rendezvous itself, so that it can say what is missing.
const LEAST_JOINING: Duration = Duration::from_secs(1);

/// The longest deadline; c10d's clocks do not reach much further.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// A group of ranks joined through rank 0's TCP store.
#[derive(Debug)]
pub struct Gloo {
    group: Group,
    rank: usize,
    world_size: usize,
    /// The way to rank 0's host.
    way: Way,
    /// Whether some ranks are on other hosts than others.
    spans_hosts: bool,
    place: RefCell<Option<Place>>,
}

impl Gloo {
    /// Joins the ranks that `env` describes; returns when all are there.
    ///
    /// # Errors
    /// [`Error::Usage`] when the port is taken, but [`Error::Comm`] where rr-launch has found it free
    /// before, or for a network interface that is not there; [`Error::Comm`] when a peer does not come
    /// before `timeout`.
    pub fn join(env: &WorkerEnv, timeout: Duration) -> Result<Self> {
        let failed = |message: String| Error::Comm {
            rank: env.rank,
            operation: format!("joining the group at {}:{}", env.master_addr, env.master_port),
            message,
        };
        let timeout = timeout.min(LONGEST_TIMEOUT);
        let deadline = Instant::now() + timeout;
        let interfaces = interfaces(std::env::var(INTERFACE_VARIABLE).ok().as_deref())?;
        // torchrun's agent already listens at the address that it gives.
        let agent_serves = std::env::var(vars::TORCHELASTIC_USE_AGENT_STORE)
            .is_ok_and(|value| value.eq_ignore_ascii_case("true"));
        let serves_store = env.rank == 0 && !agent_serves;
        let place = (env.master_addr.as_str(), env.master_port);
        let way = way::find(place, serves_store, deadline, timeout).map_err(failed)?;
        let spans_hosts = env.local_world_size < env.world_size;
        let via = means(interfaces, &way, spans_hosts);
        let is_asked = matches!(via, Via::Asked(_));
        let join = Join {
            host: env.master_addr.clone(),
            port: env.master_port,
            serves_store,
            rank: env.rank,
            world_size: env.world_size,
            joining: deadline.saturating_duration_since(Instant::now()).max(LEAST_JOINING),
            timeout,
            via,
            way: told(&way),
            // torchrun counts restarts on each host for itself.
            prefix: if agent_serves {
                "gloo".into()
            } else {
                format!("gloo/{}", env.restart_count)
            },
            is_lasting: agent_serves,
        };
        let group = Group::join(&join).map_err(|message| {
            if message.contains("EADDRINUSE") || message.contains("already in use") {
                let is_launched = std::env::var_os(vars::RR_LAUNCHER).is_some();
                port_is_taken(env, is_launched)
            } else if is_asked && !message.contains("timed out") {
                let host = &env.master_addr;
                failed(format!(
                    "{message}; {host} is a loopback address on this host: name the interface that leads \
                     to the others in {INTERFACE_VARIABLE}"
                ))
            } else {
                failed(message)
            }
        })?;
        let (rank, world_size) = (env.rank, env.world_size);
        Ok(Self { group, rank, world_size, way, spans_hosts, place: RefCell::new(None) })
    }

    /// Whether some ranks are on other hosts than others.
    pub(super) fn spans_hosts(&self) -> bool {
        self.spans_hosts
    }

    /// The way to rank 0's host.
    pub(super) fn way(&self) -> Way {
        self.way
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
        let (way, spans_hosts, world_size) = (self.way, self.spans_hosts, ranks.len());
        Ok(Some(Self { group, rank, world_size, way, spans_hosts, place: RefCell::new(None) }))
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

/// The address by which this rank reaches rank 0's host, where that is another.
fn told(way: &Way) -> Option<String> {
    let is_elsewhere = !way.own.is_loopback() && way.own != way.master;
    is_elsewhere.then(|| way.master.to_string())
}

/// What the peers of this rank reach it through, of `interfaces` where they are given.
fn means(interfaces: Option<String>, way: &Way, spans_hosts: bool) -> Via {
    let own = way.own.to_string();
    match interfaces {
        Some(names) => Via::Interfaces(names),
        None if spans_hosts && way.own.is_loopback() => Via::Asked(own),
        None => Via::Address(own),
    }
}

/// The interfaces of this host that `value`, that of [`INTERFACE_VARIABLE`], names.
///
/// # Errors
/// [`Error::Usage`] for one that this host does not have.
fn interfaces(value: Option<&str>) -> Result<Option<String>> {
    let names: Vec<&str> = value
        .into_iter()
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|name| !name.is_empty())
        .collect();
    // A line each, of this network namespace; an alias, such as eth0:1, has none.
    let known = std::fs::read_to_string("/proc/self/net/dev").unwrap_or_default();
    let has = |name: &str| known.lines().any(|line| line.trim().starts_with(&format!("{name}:")));
    let is_missing = |name: &&&str| !known.is_empty() && !name.contains(':') && !has(name);
    if let Some(name) = names.iter().find(is_missing) {
        return Err(Error::Usage(format!(
            "{INTERFACE_VARIABLE} names {name:?}, which is no network interface of this host (ip link)"
        )));
    }
    Ok((!names.is_empty()).then(|| names.join(",")))
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
    fn interfaces_are_a_list_of_those_that_there_are() {
        let read = |value| interfaces(value).map_err(|error| error.to_string());
        assert_eq!(read(None), Ok(None));
        assert_eq!(read(Some(" ,")), Ok(None));
        assert_eq!(read(Some("lo, lo")), Ok(Some("lo,lo".to_owned())));
        let error = read(Some("lo,eht0")).expect_err("a name that nothing has");
        assert!(
            error.contains("GLOO_SOCKET_IFNAME names \"eht0\", which is no network"),
            "{error}"
        );
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
