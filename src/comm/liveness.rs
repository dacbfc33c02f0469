//! Knowing at once that another rank's process has ended.
//!
//! NCCL over NVLink or shared memory does not notice that a peer died: the others would wait for
//! their deadline. So every rank keeps one idle TCP connection to rank 0. The kernel closes it
//! when a process ends, however it ends; rank 0 then tells the others who it was.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tch::Tensor;

use super::{Communicator, Gloo};
use crate::error::{Error, Result};

/// What a rank says before it leaves in order, in place of a rank's number.
const GOODBYE: u32 = u32::MAX;

/// How often the watching thread looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

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
        let failed = |error: std::io::Error| Error::Comm {
            rank: host.rank(),
            operation: "connecting to watch over the other ranks".into(),
            message: error.to_string(),
        };
        let deadline = Instant::now() + timeout;
        let peers = if host.rank() == 0 {
            // Where others come from other hosts, every address of this one, as the store does: the
            // name for it may be of loopback here, or of an address that it does not have itself, as
            // behind a proxy.
            let own = if host.spans_hosts() { "::" } else { host.master() };
            let listener = TcpListener::bind((own, 0))
                .or_else(|_| TcpListener::bind("[::]:0"))
                .or_else(|_| TcpListener::bind("0.0.0.0:0"))
                .map_err(failed)?;
            exchange_port(host, listener.local_addr().map_err(failed)?.port())?;
            accept(&listener, host.world_size() - 1, deadline).map_err(failed)?
        } else {
            let port = exchange_port(host, 0)?;
            vec![connect(host.master(), port, host.rank() as u32, deadline).map_err(failed)?]
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

/// Rank 0's port, on every rank.
fn exchange_port(host: &Gloo, own: u16) -> Result<u16> {
    let tensor = Tensor::f_from_slice(&[i64::from(own)])?;
    host.broadcast(&tensor, 0)?.wait()?;
    Ok(tensor.f_int64_value(&[0])? as u16)
}

fn accept(listener: &TcpListener, count: usize, deadline: Instant) -> std::io::Result<Vec<Peer>> {
    listener.set_nonblocking(true)?;
    let mut peers: Vec<Peer> = Vec::with_capacity(count);
    while peers.len() < count {
        match listener.accept() {
            Ok((mut stream, _)) => {
                stream.set_nonblocking(false)?;
                stream
                    .set_read_timeout(Some(deadline.saturating_duration_since(Instant::now())))?;
                let mut rank = [0; 4];
                stream.read_exact(&mut rank)?;
                peers.push(prepared(u32::from_le_bytes(rank), stream)?);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock && Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                return Err(ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
    }
    Ok(peers)
}

fn connect(master: &str, port: u16, rank: u32, deadline: Instant) -> std::io::Result<Peer> {
    let mut last = ErrorKind::AddrNotAvailable.into();
    for address in (master, port).to_socket_addrs()? {
        let wait = deadline.saturating_duration_since(Instant::now()).max(LOOK);
        match TcpStream::connect_timeout(&address, wait) {
            Ok(mut stream) => {
                stream.write_all(&rank.to_le_bytes())?;
                return prepared(0, stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn prepared(rank: u32, stream: TcpStream) -> std::io::Result<Peer> {
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
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Heard::Nothing
        }
        Ok(_) | Err(_) => Heard::Lost(peer.rank),
    }
}

fn say(peer: &Peer, word: u32) -> std::io::Result<()> {
    (&peer.stream).write_all(&word.to_le_bytes())
}
