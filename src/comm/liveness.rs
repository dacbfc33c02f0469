//! Knowing at once that another rank's process has ended.
//!
//! NCCL over NVLink or shared memory does not notice that a peer died: the others would wait for
//! their deadline. So every rank keeps one idle TCP connection to rank 0. The kernel closes it
//! when a process ends, however it ends; rank 0 then tells the others who it was.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddrV6, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use tch::Tensor;

use super::way::CONNECT_TIMEOUT;
use super::{Communicator, Gloo};
use crate::error::{Error, Result};

/// What a rank says before it leaves in order, in place of a rank's number.
const GOODBYE: u32 = u32::MAX;

/// How often the watching thread looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// Between two looks for ranks that have connected.
const ACCEPT_POLL: Duration = Duration::from_millis(1);

/// Connections that may wait to be accepted: all ranks come at once.
const BACKLOG: i32 = 1024;

/// A host that vanishes without closing its connections is noticed after this, and three probes.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// The connections of one rank, watched by a thread.
#[derive(Debug)]
pub(super) struct Liveness {
    peers: Arc<Vec<Peer>>,
    closing: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Peer {
    rank: u32,
    stream: TcpStream,
}

impl Liveness {
    /// Connects the ranks of `host`; `lost` is called once, with the rank whose process ended
    /// first as far as this one knows.
    ///
    /// # Errors
    /// [`Error::Comm`] when the connections do not come about before `timeout`.
    pub(super) fn start(
        host: &Gloo,
        timeout: Duration,
        lost: impl FnOnce(usize) + Send + 'static,
    ) -> Result<Self> {
        let failed = |error: io::Error| Error::Comm {
            rank: host.rank(),
            operation: "connecting to watch over the other ranks".into(),
            message: error.to_string(),
        };
        let deadline = Instant::now() + timeout;
        let peers = if host.rank() == 0 {
            let listener = listen_for(host).map_err(failed)?;
            let port = listener.local_addr().map_err(failed)?.port();
            let invitation = Invitation::new(host, port).share(host)?;
            accept(&listener, &invitation, host.world_size() - 1, deadline).map_err(failed)?
        } else {
            let invitation = Invitation::default().share(host)?;
            let addresses = invitation.addresses(host.way().master);
            let mut stream = connect(&addresses, invitation.port, deadline).map_err(failed)?;
            stream.write_all(&invitation.greeting(host.rank() as u32)).map_err(failed)?;
            vec![prepared(0, stream).map_err(failed)?]
        };
        let peers = Arc::new(peers);
        let closing = Arc::new(AtomicBool::new(false));
        let (watched, until) = (Arc::clone(&peers), Arc::clone(&closing));
        let thread = std::thread::Builder::new()
            .name("liveness".into())
            .spawn(move || {
                if let Some(rank) = watch(&watched, &until) {
                    lost(rank as usize);
                }
            })
            .map_err(failed)?;
        Ok(Self { peers, closing, thread: Some(thread) })
    }

    /// From now on this rank may end without the others minding.
    pub(super) fn say_goodbye(&self) {
        for peer in self.peers.iter() {
            // A peer that is gone needs no goodbye.
            let _ = say(peer, GOODBYE);
        }
    }
}

impl Drop for Liveness {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked; if it has, there is nobody left to tell.
            let _ = thread.join();
        }
        for peer in self.peers.iter() {
            // Already gone: then that is what was to be said.
            let _ = peer.stream.shutdown(Shutdown::Both);
        }
    }
}

/// What rank 0 tells the others, so that they find it and it knows them.
#[derive(Debug, Default, Clone, Copy)]
struct Invitation {
    port: u16,
    /// What a rank says before its number: other programs connect to open ports as well.
    password: u64,
    /// Rank 0's own address; 0 where it has none that leads to it from other hosts.
    address: u128,
}

impl Invitation {
    /// To `port` of rank 0, which this is. The address that the others name it by may be a proxy's, which
    /// forwards the store's port alone.
    fn new(host: &Gloo, port: u16) -> Self {
        let own = host.way().own;
        let address = match own {
            _ if host.spans_hosts() && own.is_loopback() => Ipv6Addr::UNSPECIFIED,
            IpAddr::V4(own) => own.to_ipv6_mapped(),
            IpAddr::V6(own) => own,
        };
        Self { port, password: RandomState::new().hash_one(port), address: address.into() }
    }

    /// Rank 0's, on every rank.
    fn share(self, host: &Gloo) -> Result<Self> {
        let Self { port, password, address } = self;
        let mut words = [i64::from(port), password as i64, (address >> 64) as i64, address as i64];
        let tensor = Tensor::f_from_slice(&words)?;
        host.broadcast(&tensor, 0)?.wait()?;
        tensor.f_copy_data(&mut words, 4)?;
        let [port, password, high, low] = words;
        let address = u128::from(high as u64) << 64 | u128::from(low as u64);
        Ok(Self { port: port as u16, password: password as u64, address })
    }

    /// Where to look for rank 0: at its own address, then at `master`, by which this rank knows it.
    fn addresses(&self, master: IpAddr) -> Vec<IpAddr> {
        let own = IpAddr::V6(self.address.into()).to_canonical();
        if own.is_unspecified() || own == master { vec![master] } else { vec![own, master] }
    }

    /// What `rank` says when it has connected.
    fn greeting(&self, rank: u32) -> [u8; 12] {
        let mut said = [0; 12];
        said[..8].copy_from_slice(&self.password.to_le_bytes());
        said[8..].copy_from_slice(&rank.to_le_bytes());
        said
    }

    /// The rank that says `said`; `None` where it is none.
    fn rank_of(&self, said: [u8; 12]) -> Option<u32> {
        let [.., a, b, c, d] = said;
        let rank = u32::from_le_bytes([a, b, c, d]);
        (said == self.greeting(rank)).then_some(rank)
    }
}

/// A port for the other ranks. Where they come from other hosts it is one of every address of this one, as
/// the store's is: the name for it may lead to loopback here, or to an address that is a proxy's.
fn listen_for(host: &Gloo) -> io::Result<TcpListener> {
    if host.spans_hosts() {
        return listen_everywhere();
    }
    TcpListener::bind((host.way().own, 0)).or_else(|_| listen_everywhere())
}

/// A port of all addresses, of IPv4 as of IPv6 whatever this host's default for such a socket is
/// (`net.ipv6.bindv6only`).
fn listen_everywhere() -> io::Result<TcpListener> {
    let of_both = || -> io::Result<TcpListener> {
        let (kind, flags) = (SocketType::STREAM, SocketFlags::CLOEXEC);
        let socket = socket_with(AddressFamily::INET6, kind, flags, None)?;
        sockopt::set_ipv6_v6only(&socket, false)?;
        bind(&socket, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, 0, 0, 0))?;
        listen(&socket, BACKLOG)?;
        Ok(socket.into())
    };
    // A host without IPv6 has no such socket.
    of_both().or_else(|_| TcpListener::bind("0.0.0.0:0"))
}

/// A connection that has not said yet which rank it is of.
struct Caller {
    stream: TcpStream,
    said: [u8; 12],
    /// Bytes of it.
    length: usize,
}

impl Caller {
    /// Hears what there is to hear; whether that is all.
    ///
    /// # Errors
    /// It is gone.
    fn hear(&mut self) -> io::Result<bool> {
        match self.stream.read(&mut self.said[self.length..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.length += count,
            Err(error) if is_nothing_yet(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(self.length == self.said.len())
    }
}

fn is_nothing_yet(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

/// Waits for the ranks from 1 to `count`. What else connects is let go of, and holds nobody up.
fn accept(
    listener: &TcpListener,
    invitation: &Invitation,
    count: usize,
    deadline: Instant,
) -> io::Result<Vec<Peer>> {
    listener.set_nonblocking(true)?;
    let mut callers: Vec<Caller> = Vec::new();
    let mut peers: Vec<Peer> = Vec::with_capacity(count);
    while peers.len() < count {
        match listener.accept() {
            Ok((stream, _)) => {
                stream.set_nonblocking(true)?;
                callers.push(Caller { stream, said: [0; 12], length: 0 });
            }
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) if is_nothing_yet(&error) => std::thread::sleep(ACCEPT_POLL),
            Err(error) => return Err(error),
        }
        let mut silent = Vec::new();
        for mut caller in callers {
            match caller.hear() {
                Ok(false) => silent.push(caller),
                Ok(true) => {
                    let rank = invitation.rank_of(caller.said).filter(|&rank| {
                        (1..=count as u32).contains(&rank)
                            && peers.iter().all(|peer| peer.rank != rank)
                    });
                    if let Some(rank) = rank {
                        peers.push(prepared(rank, caller.stream)?);
                    }
                }
                Err(_) => {}
            }
        }
        callers = silent;
        if peers.len() < count && Instant::now() >= deadline {
            return Err(ErrorKind::TimedOut.into());
        }
    }
    Ok(peers)
}

/// Connects to `port` of the first of `addresses` that answers, which may be some time in coming.
fn connect(addresses: &[IpAddr], port: u16, deadline: Instant) -> io::Result<TcpStream> {
    loop {
        let mut outcome = Err(ErrorKind::AddrNotAvailable.into());
        for &address in addresses {
            let left = deadline.saturating_duration_since(Instant::now()).max(LOOK);
            outcome =
                TcpStream::connect_timeout(&(address, port).into(), left.min(CONNECT_TIMEOUT));
            if outcome.is_ok() {
                return outcome;
            }
        }
        match outcome {
            Err(error) if error.kind() == ErrorKind::TimedOut && Instant::now() < deadline => {}
            Err(error) => {
                let names: Vec<String> = addresses.iter().map(ToString::to_string).collect();
                let message = format!("port {port} of {}: {error}", names.join(" or "));
                return Err(io::Error::new(error.kind(), message));
            }
            Ok(stream) => return Ok(stream),
        }
    }
}

fn prepared(rank: u32, stream: TcpStream) -> io::Result<Peer> {
    sockopt::set_socket_keepalive(&stream, true)?;
    sockopt::set_tcp_keepidle(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepintvl(&stream, KEEPALIVE)?;
    sockopt::set_tcp_keepcnt(&stream, 3)?;
    stream.set_nonblocking(true)?;
    Ok(Peer { rank, stream })
}

/// Waits until a peer is lost (its rank) or nobody is left to watch over (none).
fn watch(peers: &[Peer], closing: &AtomicBool) -> Option<u32> {
    let mut open: Vec<&Peer> = peers.iter().collect();
    while !open.is_empty() && !closing.load(Ordering::Relaxed) {
        let mut fds: Vec<_> =
            open.iter().map(|peer| PollFd::new(&peer.stream, PollFlags::IN)).collect();
        let wait = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
        // Interrupted by a signal: look again.
        let _ = poll(&mut fds, Some(&wait));
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let mut gone = Vec::new();
        for (index, _) in ready.iter().enumerate().filter(|(_, ready)| **ready) {
            match hear(open[index]) {
                Heard::Nothing => {}
                Heard::Goodbye => gone.push(index),
                Heard::Lost(rank) => {
                    for peer in &open {
                        // One that is gone as well will not mind.
                        let _ = say(peer, rank);
                    }
                    return Some(rank);
                }
            }
        }
        for index in gone.into_iter().rev() {
            open.remove(index);
        }
    }
    None
}

enum Heard {
    Nothing,
    Goodbye,
    Lost(u32),
}

/// What a peer has said, or that it is gone.
fn hear(peer: &Peer) -> Heard {
    let mut word = [0; 4];
    match (&peer.stream).read(&mut word) {
        // Words are four bytes, sent at once.
        Ok(4) => match u32::from_le_bytes(word) {
            GOODBYE => Heard::Goodbye,
            rank => Heard::Lost(rank),
        },
        Err(error) if is_nothing_yet(&error) => Heard::Nothing,
        Ok(_) | Err(_) => Heard::Lost(peer.rank),
    }
}

fn say(peer: &Peer, word: u32) -> io::Result<()> {
    (&peer.stream).write_all(&word.to_le_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may panic")]
    use std::net::{Ipv4Addr, SocketAddr};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn strangers_that_connect_hold_no_rank_up() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let invitation = Invitation { port: address.port(), password: 7, address: 0 };
        let call = |said: &[u8]| {
            let mut stream = TcpStream::connect(address).unwrap();
            stream.write_all(said).unwrap();
            stream
        };
        drop(call(b""));
        drop(call(b"GET"));
        let silent = call(b"");
        let other = Invitation { password: 8, ..invitation };
        let strangers = [call(b"GET / HTTP/1.1\r\n\r\n"), call(&other.greeting(1))];
        // No rank either: itself, one beyond the last, and one that is there already.
        let known = [2, 0, 3, 2, 1].map(|rank| call(&invitation.greeting(rank)));
        let peers = accept(&listener, &invitation, 2, Instant::now() + PATIENCE).unwrap();
        let mut found: Vec<_> =
            peers.iter().map(|peer| (peer.rank, peer.stream.peer_addr().unwrap())).collect();
        found.sort_unstable();
        let end = |call: &TcpStream| call.local_addr().unwrap();
        assert_eq!(found, [(1, end(&known[4])), (2, end(&known[0]))]);
        drop((silent, strangers));
        let error = accept(&listener, &invitation, 1, Instant::now()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::TimedOut);
    }

    #[test]
    fn every_address_of_the_host_is_listened_at() {
        let port = listen_everywhere().unwrap();
        let number = port.local_addr().unwrap().port();
        let six = IpAddr::from(Ipv6Addr::LOCALHOST);
        let has_six = TcpListener::bind((six, 0)).is_ok();
        let addresses = [Ipv4Addr::LOCALHOST.into(), six];
        for address in &addresses[..=usize::from(has_six)] {
            let end = connect(&[*address], number, Instant::now() + PATIENCE).unwrap();
            assert_eq!(end.peer_addr().unwrap(), SocketAddr::new(*address, number));
        }
        drop(port);
        let error = connect(&addresses[..1], number, Instant::now() + PATIENCE).unwrap_err();
        assert!(error.to_string().starts_with(&format!("port {number} of 127.0.0.1: ")), "{error}");
    }
}
