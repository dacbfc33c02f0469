//! One call to node 0: its name is looked up, then it is connected to. A thread of its own does that, as
//! nothing can end the system's search for a name, which takes long where the server of names is away.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::link::Link;
use super::meeting::{Place, network};
use crate::error::LaunchError;
use crate::requests::Requests;
use crate::sys::{Epoll, Interest};

/// A call that is on its way. Who drops it leaves the thread to itself.
pub struct Call {
    thread: JoinHandle<io::Result<TcpStream>>,
    /// The thread closes the other end when it is through.
    end: UnixStream,
    is_found: Arc<AtomicBool>,
}

impl Call {
    /// Calls node 0; each of its addresses has so long to answer.
    pub fn begin(place: &Place, timeout: Duration) -> io::Result<Self> {
        let (end, other_end) = UnixStream::pair()?;
        let is_found = Arc::new(AtomicBool::new(false));
        let (addr, port, finds) = (place.addr.clone(), place.port, Arc::clone(&is_found));
        let thread = thread::Builder::new().spawn(move || {
            let _other_end = other_end;
            connect(&addr, port, timeout, &finds)
        })?;
        Ok(Self { thread, end, is_found })
    }

    /// Waits for so long, and says whether it is through.
    ///
    /// # Errors
    /// A signal has come.
    pub fn is_through(&self, time: Duration, requests: &Requests) -> Result<bool, LaunchError> {
        const THROUGH: u64 = 0;
        let until = Instant::now() + time;
        let mut epoll = Epoll::new().map_err(network())?;
        epoll.add(self.end.as_fd(), Interest::Read, THROUGH).map_err(network())?;
        requests.watch(&epoll, 1).map_err(network())?;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let ready = epoll.wait(Some(left)).map_err(network())?;
            if ready.contains(&THROUGH) {
                return Ok(true);
            }
            requests.heed()?;
            if left.is_zero() {
                return Ok(false);
            }
        }
    }

    /// Whether node 0 has an address: then it is one of those that does not answer.
    pub fn has_found(&self) -> bool {
        self.is_found.load(Ordering::Relaxed)
    }

    /// What came of a call that is through.
    pub fn answer(self) -> io::Result<Link> {
        let stream = self.thread.join();
        Link::new(stream.unwrap_or_else(|_| Err(io::Error::other("the call was broken off")))?)
    }
}

fn connect(addr: &str, port: u16, timeout: Duration, finds: &AtomicBool) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    let addresses = (addr, port).to_socket_addrs()?;
    finds.store(true, Ordering::Relaxed);
    for address in addresses {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}
