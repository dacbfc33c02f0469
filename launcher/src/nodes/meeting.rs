//! How the launchers meet before anything starts: node 0 listens, the others call it until it
//! answers, and all begin at once when all are there and agree.

use std::collections::BTreeSet;
use std::io::{self, Write as _};
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use super::cluster::Cluster;
use super::link::Link;
use super::message::{Hello, Message, Node, Term, World, name_of};
use super::{PING, join};
use crate::contract::exit_code;
use crate::error::LaunchError;
use crate::plan::{self, Rendezvous};
use crate::report::{ranges, workers};
use crate::requests::Requests;
use crate::sys::{Epoll, Interest};

/// Between two looks for a caller that is to be refused.
const ANSWER: Duration = Duration::from_millis(20);

/// How long a node that knows that nothing will come of the meeting waits to tell those who are not
/// there yet, as they do not start in the same moment. They would wait until their patience is over.
pub(super) const LATECOMERS: Duration = Duration::from_secs(5);

/// How long a refusal may take to be heard.
pub(super) const FAREWELL: Duration = Duration::from_secs(1);

/// Which node this is, and where they meet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The number of nodes, at least 2.
    pub nnodes: usize,
    /// This node's number.
    pub node_rank: usize,
    /// The host of node 0.
    pub addr: String,
    /// The port on which it listens.
    pub port: u16,
    /// How long to wait for the others.
    pub patience: Duration,
    /// A node that is silent for so long is lost.
    pub silence: Duration,
    /// The user's `--run-id`, empty where there is none.
    pub run_id: String,
}

/// A meeting that has not begun.
pub struct Meeting {
    place: Place,
    host: String,
    /// On node 0.
    listener: Option<TcpListener>,
}

/// Who has called node 0.
struct Guest {
    link: Link,
    /// The node that it is, by what it said: that it wants to take part, or cannot.
    node: Option<usize>,
    /// Who takes part.
    hello: Option<Hello>,
}

impl Meeting {
    /// Node 0 listens from now on.
    ///
    /// # Errors
    /// It cannot.
    pub fn open(place: Place) -> Result<Self, LaunchError> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = host.trim().to_owned();
        let port = place.port;
        let listen = || -> io::Result<TcpListener> {
            let listener = plan::listen(port)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        let listener = (place.node_rank == 0).then(listen).transpose().map_err(|error| {
            LaunchError::Usage(format!("--rdzv: cannot listen on port {port}: {error}"))
        })?;
        Ok(Self { place, host, listener })
    }

    /// Waits for all nodes, and makes sure that they agree. `run_id` is that of the launch if this
    /// is node 0, `port` the one that the user wants for rank 0.
    ///
    /// # Errors
    /// They do not agree, do not come, or the network fails; or a signal has come, of which the others
    /// are told.
    pub fn meet(
        self,
        workers: usize,
        terms: Vec<Term>,
        run_id: &str,
        port: Option<u16>,
        requests: &Requests,
    ) -> Result<Cluster, LaunchError> {
        let (host, node_rank) = (self.host.clone(), self.place.node_rank);
        let own = Hello { node_rank, host, workers, terms };
        match self.listener {
            Some(listener) => {
                Host { own, place: self.place, listener, guests: Vec::new(), requests }
                    .receive_all(run_id, port)
            }
            None => join::join(&own, &self.place, requests),
        }
    }

    /// Tells the others that this node cannot start, and will exit with `code`: those that come
    /// within [`LATECOMERS`]. A signal meanwhile ends that.
    pub fn decline(self, code: u8, requests: &Requests) {
        let Some(listener) = self.listener else {
            return join::decline(&self.place, &self.host, code, requests);
        };
        let name = name_of(self.place.node_rank, &self.host);
        let line = format!("{name} cannot start: exit code {code}; see its output");
        let absent = (1..self.place.nnodes).collect();
        turn_away(&listener, Vec::new(), absent, &line, code, requests);
    }
}

/// Refuses the nodes that are `absent`, those that call within [`LATECOMERS`] and before a signal. `links` are of
/// callers that have said nothing yet, as is whoever calls now: what is no launcher says nothing, and does not
/// count. Nor does a call that was given up, as each is by a node that waits for longer than `--node-timeout`: it
/// calls again.
fn turn_away(
    listener: &TcpListener,
    mut links: Vec<Link>,
    mut absent: BTreeSet<usize>,
    line: &str,
    code: u8,
    requests: &Requests,
) {
    let until = Instant::now() + LATECOMERS;
    while !absent.is_empty() && Instant::now() < until {
        while let Ok((stream, _)) = listener.accept() {
            links.extend(Link::new(stream));
        }
        let mut silent = Vec::new();
        for mut link in links {
            let said = link.receive(Instant::now());
            let caller = said.iter().find_map(|said| match said {
                Message::Hello(hello) if link.is_open() => Some(hello.node_rank),
                // It knows already, and may have hung up.
                Message::Decline { node_rank, .. } => Some(*node_rank),
                _ => None,
            });
            if let Some(node) = caller {
                refuse(Ok(link), line, code, Instant::now() + FAREWELL);
                absent.remove(&node);
            } else if link.is_open() {
                silent.push(link);
            }
        }
        links = silent;
        if !absent.is_empty() && requests.pause(ANSWER).is_err() {
            return;
        }
    }
}

/// Says no, and waits until it is heard.
fn refuse(link: io::Result<Link>, reason: &str, code: u8, until: Instant) {
    // Who is gone already needs no answer.
    let Ok(mut link) = link else { return };
    link.send(&Message::Refuse { line: reason.to_owned(), code });
    link.part(until);
}

/// Tells whoever calls that the launch has begun. Who calls may be meant for the next one.
pub fn put_off(listener: &TcpListener) {
    while let Ok((stream, _)) = listener.accept() {
        let Ok(mut link) = Link::new(stream) else { continue };
        // Nothing was read, so that closing it would take this back; it need not be waited for.
        link.receive(Instant::now());
        link.send(&Message::Begun);
    }
}

/// When to say that a wait goes on: not where the others come soon, and then not often.
pub(super) struct Reminder {
    due: Instant,
}

impl Reminder {
    const FIRST: Duration = Duration::from_secs(10);
    const NEXT: Duration = Duration::from_secs(60);

    pub(super) fn new(now: Instant) -> Self {
        Self { due: now + Self::FIRST }
    }

    pub(super) fn is_due(&mut self, now: Instant) -> bool {
        let is_due = now >= self.due;
        if is_due {
            self.due = now + Self::NEXT;
        }
        is_due
    }
}

/// A line on stderr. Where nobody reads it nothing is missed.
pub(super) fn say(line: &str) {
    let _ = writeln!(io::stderr(), "rr-launch: {line}");
}

pub(super) fn network() -> impl FnOnce(io::Error) -> LaunchError {
    LaunchError::system("meet the other nodes")
}

/// Node 0.
struct Host<'a> {
    own: Hello,
    place: Place,
    listener: TcpListener,
    guests: Vec<Guest>,
    requests: &'a Requests,
}

impl Host<'_> {
    fn receive_all(mut self, run_id: &str, port: Option<u16>) -> Result<Cluster, LaunchError> {
        let deadline = Instant::now().checked_add(self.place.patience);
        let mut reminder = Reminder::new(Instant::now());
        // New for each turn: guests come and go, and there are few.
        while !self.missing().is_empty() {
            let now = Instant::now();
            if deadline.is_some_and(|deadline| now >= deadline) {
                let line = format!(
                    "{} did not come within {} s (--rdzv-timeout)",
                    nodes(&self.missing()),
                    self.place.patience.as_secs_f64()
                );
                return Err(self.end(line, exit_code::NODE_LOST));
            }
            let left = deadline.map_or(PING, |deadline| deadline.duration_since(now).min(PING));
            self.wait(left).map_err(network())?;
            if let Err(error) = self.requests.heed() {
                let line = format!("{}: {error}", name_of(0, &self.own.host));
                return Err(self.end(line, error.exit_code()));
            }
            self.accept();
            if let Some((line, code)) = self.listen(Instant::now()) {
                return Err(self.end(line, code));
            }
            let missing = self.missing();
            if !missing.is_empty() && reminder.is_due(Instant::now()) {
                let patience = self.place.patience.as_secs_f64();
                say(&format!("waiting for {}, up to {patience} s in all", nodes(&missing)));
            }
        }
        self.begin(run_id, port)
    }

    fn wait(&self, timeout: Duration) -> io::Result<()> {
        let mut epoll = Epoll::new()?;
        epoll.add(self.listener.as_fd(), Interest::Read, 0)?;
        self.requests.watch(&epoll, 2)?;
        for guest in &self.guests {
            epoll.add(guest.link.as_fd(), Interest::Read, 1)?;
        }
        epoll.wait(Some(timeout)).map(drop)
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.listener.accept() {
            if let Ok(link) = Link::new(stream) {
                self.guests.push(Guest { link, node: None, hello: None });
            }
        }
    }

    /// The nodes that are not there.
    fn missing(&self) -> Vec<usize> {
        let is_there = |node: &usize| self.guest(*node).is_some();
        (1..self.place.nnodes).filter(|node| !is_there(node)).collect()
    }

    fn guest(&self, node: usize) -> Option<&Hello> {
        self.guests.iter().filter_map(|guest| guest.hello.as_ref()).find(|h| h.node_rank == node)
    }

    /// Hears what the guests say; why nothing can come of it, and the exit code.
    fn listen(&mut self, now: Instant) -> Option<(String, u8)> {
        let mut index = 0;
        while index < self.guests.len() {
            let guest = &mut self.guests[index];
            let (mut refusal, mut stranger) = (None, None);
            for message in guest.link.receive(now) {
                match message {
                    Message::Ping { .. } => {
                        guest.link.send(&Message::Wait);
                    }
                    Message::Decline { node_rank, host, run_id, code } => {
                        guest.node = Some(node_rank);
                        let name = name_of(node_rank, &host);
                        stranger = another_run(&self.own, &name, &run_id);
                        if stranger.is_some() {
                            break;
                        }
                        let line = format!("{name} cannot start: exit code {code}; see its output");
                        return Some((line, code));
                    }
                    Message::Hello(hello) => {
                        guest.node = Some(hello.node_rank);
                        let name = name_of(hello.node_rank, &hello.host);
                        stranger = another_run(&self.own, &name, hello.run_id());
                        refusal = Some(hello);
                    }
                    _ => {}
                }
            }
            if let Some(line) = stranger {
                self.refuse_guest(index, &line, now);
                continue;
            }
            if !guest.link.is_open() || guest.link.is_silent(self.place.silence, now) {
                self.guests.remove(index);
                continue;
            }
            if let Some(hello) = refusal {
                if let Some(line) = disagreement(&self.own, &hello) {
                    return Some((line, exit_code::USER_ERROR));
                }
                if let Some(line) = self.taken(&hello) {
                    self.refuse_guest(index, &line, now);
                    continue;
                }
                self.guests[index].hello = Some(hello);
            }
            index += 1;
        }
        None
    }

    /// One guest cannot take part, which is nothing to the others.
    fn refuse_guest(&mut self, index: usize, line: &str, now: Instant) {
        say(line);
        let guest = self.guests.remove(index);
        refuse(Ok(guest.link), line, exit_code::USER_ERROR, now + FAREWELL);
    }

    /// Why a node of this rank cannot take part, if there is one already.
    fn taken(&self, hello: &Hello) -> Option<String> {
        let Hello { node_rank, host, .. } = hello;
        let holder = if *node_rank == 0 { Some(&self.own) } else { self.guest(*node_rank) };
        holder.map(|holder| {
            let holder = &holder.host;
            format!("--node-rank {node_rank} of host {host} is that of host {holder} already")
        })
    }

    /// Nothing comes of it: all are told why.
    fn end(self, line: String, code: u8) -> LaunchError {
        let until = Instant::now() + FAREWELL;
        let (heard, silent): (Vec<_>, Vec<_>) =
            self.guests.into_iter().partition(|guest| guest.node.is_some());
        let is_heard = |node: &usize| heard.iter().any(|guest| guest.node == Some(*node));
        let absent = (1..self.place.nnodes).filter(|node| !is_heard(node)).collect();
        for guest in heard {
            refuse(Ok(guest.link), &line, code, until);
        }
        // Who did not come in all that time hardly comes now.
        if code != exit_code::NODE_LOST {
            say(&line);
            let silent = silent.into_iter().map(|guest| guest.link).collect();
            turn_away(&self.listener, silent, absent, &line, code, self.requests);
            return LaunchError::Told(code);
        }
        LaunchError::Nodes { line, code }
    }

    /// All are there.
    fn begin(mut self, run_id: &str, port: Option<u16>) -> Result<Cluster, LaunchError> {
        let master_port = match Rendezvous::on_this_host(port) {
            Ok(rendezvous) => rendezvous.port,
            Err(error) => return Err(self.end(error.to_string(), error.exit_code())),
        };
        self.guests.retain(|guest| guest.hello.is_some());
        self.guests.sort_by_key(|guest| guest.hello.as_ref().map(|hello| hello.node_rank));
        let addresses = self.guests.iter().map(|guest| guest.link.own_address());
        let addresses = addresses.collect::<io::Result<Vec<_>>>().map_err(network())?;
        let (address, interface) = most_reachable(&addresses);
        let node = |hello: &Hello| Node { host: hello.host.clone(), workers: hello.workers };
        let mut all = vec![node(&self.own)];
        all.extend(self.guests.iter().filter_map(|guest| guest.hello.as_ref()).map(node));
        let mut world = World {
            run_id: run_id.to_owned(),
            nodes: all,
            master_addr: address.to_string(),
            master_port,
        };
        for (index, node) in world.nodes.iter().enumerate() {
            if node.workers != self.own.workers {
                let (name, count) = (world.name(index), workers(node.workers));
                let (own, others) = (world.name(0), self.own.workers);
                say(&format!("{name} starts {count}, {own} starts {others}"));
            }
        }
        let mut links: Vec<Link> = self.guests.into_iter().map(|guest| guest.link).collect();
        for link in &mut links {
            link.send(&Message::Welcome(world.clone()));
        }
        world.reach_on(interface);
        Ok(Cluster::hub(world, links, self.listener, self.place.silence))
    }
}

/// Of the addresses at which node 0 was reached, at least one, that which most nodes can use: one on node 0's own
/// host may have come by an address that no other host knows.
fn most_reachable(addresses: &[(IpAddr, u32)]) -> (IpAddr, u32) {
    let narrowness = |(address, _): &&(IpAddr, u32)| match address {
        address if address.is_loopback() => 2,
        IpAddr::V6(address) if address.is_unicast_link_local() => 1,
        IpAddr::V4(address) if address.is_link_local() => 1,
        _ => 0,
    };
    addresses.iter().min_by_key(narrowness).copied().unwrap_or((Ipv4Addr::LOCALHOST.into(), 0))
}

/// Why a node is none of this run: both have a `--run-id`, and they differ. Where one has none a flag is
/// forgotten rather, which is a disagreement.
fn another_run(own: &Hello, name: &str, run_id: &str) -> Option<String> {
    let own_id = own.run_id();
    let differs = !own_id.is_empty() && !run_id.is_empty() && own_id != run_id;
    differs.then(|| {
        let own = name_of(own.node_rank, &own.host);
        format!("{name} is of another run and is turned away: --run-id {run_id}, {own_id} on {own}")
    })
}

/// What two nodes do not agree on, in a line: every term that differs.
fn disagreement(own: &Hello, other: &Hello) -> Option<String> {
    let [one, two] = [own, other].map(|hello| name_of(hello.node_rank, &hello.host));
    let named_alike = own.terms.iter().zip(&other.terms).all(|(a, b)| a.name == b.name);
    if !named_alike || own.terms.len() != other.terms.len() {
        return Some(format!("{two} is another rr-launch than {one}"));
    }
    let pairs = own.terms.iter().zip(&other.terms);
    let differing: Vec<_> = pairs.filter(|(ours, theirs)| ours != theirs).collect();
    // A digest of files tells nothing by itself, and often follows from a setting beside it.
    let (shown, digests): (Vec<_>, Vec<_>) =
        differing.into_iter().partition(|(ours, theirs)| ours.is_readable && theirs.is_readable);
    let or_none = |value: &str| if value.is_empty() { "none".to_owned() } else { value.to_owned() };
    let shown: Vec<String> = shown
        .into_iter()
        .map(|(ours, theirs)| {
            let [ours_value, theirs] = [&ours.value, &theirs.value].map(|value| or_none(value));
            format!("{}: {theirs} on {two}, {ours_value} on {one}", ours.name)
        })
        .collect();
    if !shown.is_empty() {
        return Some(format!("{}; they have to be the same", shown.join("; ")));
    }
    let digests: Vec<&str> = digests.iter().map(|(ours, _)| ours.name.as_str()).collect();
    (!digests.is_empty())
        .then(|| format!("{}: not the same on {two} and on {one}", digests.join(", ")))
}

/// `node 2`, `nodes 1, 3-5`.
fn nodes(ranks: &[usize]) -> String {
    let plural = if ranks.len() == 1 { "" } else { "s" };
    format!("node{plural} {}", ranges(ranks))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(node_rank: usize, terms: &[(&str, &str, bool)]) -> Hello {
        let term = |&(name, value, is_readable): &(&str, &str, bool)| Term {
            name: name.to_owned(),
            value: value.to_owned(),
            is_readable,
        };
        let host = ["a", "b"][node_rank].to_owned();
        Hello { node_rank, host, workers: 2, terms: terms.iter().map(term).collect() }
    }

    #[test]
    fn a_long_wait_is_told_now_and_then() {
        let start = Instant::now();
        let mut reminder = Reminder::new(start);
        let told = (0..200).filter(|&s| reminder.is_due(start + Duration::from_secs(s)));
        assert_eq!(told.collect::<Vec<_>>(), [10, 70, 130, 190]);
    }

    #[test]
    fn rank_0_is_met_at_the_address_that_most_nodes_can_reach() {
        let chosen = |addresses: &[&str]| {
            let parsed = addresses.iter().enumerate().flat_map(|(index, address)| {
                address.parse().map(|address: IpAddr| (address, index as u32))
            });
            most_reachable(&parsed.collect::<Vec<_>>()).0.to_string()
        };
        assert_eq!(chosen(&["127.0.1.1", "10.77.0.1"]), "10.77.0.1");
        assert_eq!(chosen(&["10.77.0.1", "192.168.0.1"]), "10.77.0.1", "else the first node's");
        assert_eq!(chosen(&["::1", "fe80::1", "2001:db8::1"]), "2001:db8::1");
        assert_eq!(chosen(&["127.0.0.1", "fe80::1"]), "fe80::1");
        assert_eq!(chosen(&["127.0.1.1", "127.0.0.1"]), "127.0.1.1", "all on one host");
    }

    #[test]
    fn what_differs_is_named() {
        let own =
            hello(0, &[("--nnodes", "3", true), ("--run-id", "", true), ("--config", "1", false)]);
        assert_eq!(disagreement(&own, &Hello { node_rank: 1, ..own.clone() }), None);
        let other =
            hello(1, &[("--nnodes", "2", true), ("--run-id", "", true), ("--config", "1", false)]);
        assert_eq!(
            disagreement(&own, &other).as_deref(),
            Some("--nnodes: 2 on node 1 (b), 3 on node 0 (a); they have to be the same")
        );
        let other =
            hello(1, &[("--nnodes", "2", true), ("--run-id", "x", true), ("--config", "2", false)]);
        assert_eq!(
            disagreement(&own, &other).as_deref(),
            Some(
                "--nnodes: 2 on node 1 (b), 3 on node 0 (a); --run-id: x on node 1 (b), none on \
                 node 0 (a); they have to be the same"
            )
        );
        let other =
            hello(1, &[("--nnodes", "3", true), ("--run-id", "x", true), ("--config", "1", false)]);
        assert!(disagreement(&own, &other).is_some_and(|line| line.contains("none on node 0")));
        let other =
            hello(1, &[("--nnodes", "3", true), ("--run-id", "", true), ("--config", "2", false)]);
        assert_eq!(
            disagreement(&own, &other).as_deref(),
            Some("--config: not the same on node 1 (b) and on node 0 (a)")
        );
    }
}
