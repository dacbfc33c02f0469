//! A connection to another launcher: messages of JSON, each behind its length in four bytes, that
//! neither end ever waits for.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::message::Message;

/// Far more than any message has; whoever sends more is no launcher.
const MAX_MESSAGE: usize = 16 << 20;

/// One connection.
pub struct Link {
    stream: TcpStream,
    incoming: Vec<u8>,
    outgoing: Vec<u8>,
    is_open: bool,
    /// When something last came.
    heard: Instant,
    /// When a ping is due.
    ping_at: Instant,
}

impl Link {
    /// Takes a connection over.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let now = Instant::now();
        let (incoming, outgoing) = (Vec::new(), Vec::new());
        Ok(Self { stream, incoming, outgoing, is_open: true, heard: now, ping_at: now })
    }

    /// The address at this end, an IPv4 one as such, and the interface that it holds on (see [`scope`]).
    pub fn own_address(&self) -> io::Result<(IpAddr, u32)> {
        let address = self.stream.local_addr()?;
        Ok((address.ip().to_canonical(), scope(address)))
    }

    /// The interface on which the other end is reached (see [`scope`]).
    pub fn interface(&self) -> u32 {
        self.stream.peer_addr().map_or(0, scope)
    }

    /// Whether the other end has not hung up, nor said what is no message.
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// When something last came.
    pub fn heard(&self) -> Instant {
        self.heard
    }

    /// Whether nothing has come for so long.
    pub fn is_silent(&self, patience: Duration, now: Instant) -> bool {
        now.duration_since(self.heard) >= patience
    }

    /// Says something, now or as soon as there is room. That the other end is gone is noticed when
    /// it is read from.
    pub fn send(&mut self, message: &Message) {
        self.queue(message);
        self.flush();
    }

    fn queue(&mut self, message: &Message) {
        let Ok(text) = serde_json::to_vec(message) else { return };
        let Ok(length) = u32::try_from(text.len()) else { return };
        self.outgoing.extend(length.to_be_bytes());
        self.outgoing.extend(text);
    }

    /// Says several things so that they arrive together.
    #[cfg(test)]
    pub fn send_at_once(&mut self, messages: &[Message]) {
        for message in messages {
            self.queue(message);
        }
        self.flush();
    }

    /// Sends what there was no room for.
    pub fn flush(&mut self) {
        while !self.outgoing.is_empty() {
            match self.stream.write(&self.outgoing) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => return self.outgoing.clear(),
            }
        }
    }

    /// What has come.
    pub fn receive(&mut self, now: Instant) -> Vec<Message> {
        let mut buffer = [0; 16 * 1024];
        while self.is_open {
            match self.stream.read(&mut buffer) {
                Ok(0) => self.is_open = false,
                Ok(count) => {
                    self.heard = now;
                    self.incoming.extend(&buffer[..count]);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => self.is_open = false,
            }
        }
        let mut messages = Vec::new();
        while let Some(message) = self.next_message() {
            messages.push(message);
        }
        messages
    }

    fn next_message(&mut self) -> Option<Message> {
        let (length, rest) = self.incoming.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        if length > MAX_MESSAGE {
            self.hang_up();
            return None;
        }
        let message = serde_json::from_slice(rest.get(..length)?);
        self.incoming.drain(..4 + length);
        if message.is_err() {
            self.hang_up();
        }
        message.ok()
    }

    fn hang_up(&mut self) {
        self.is_open = false;
        self.incoming.clear();
    }

    /// Whether a ping is due; the next one is so much later.
    pub fn takes_ping(&mut self, interval: Duration, now: Instant) -> bool {
        let is_due = now >= self.ping_at;
        if is_due {
            self.ping_at = now + interval;
        }
        is_due
    }

    /// When a ping is due.
    pub fn ping_at(&self) -> Instant {
        self.ping_at
    }

    /// Says that nothing more will come, and waits until the other end has heard all and hangs up.
    /// A socket that is closed with something unread takes back what it has sent.
    pub fn part(mut self, until: Instant) {
        self.flush();
        let quiet = |stream: &TcpStream| -> io::Result<()> {
            stream.shutdown(Shutdown::Write)?;
            stream.set_nonblocking(false)
        };
        let mut buffer = [0; 4096];
        // An error means that the other end has gone already.
        let mut goes_on = quiet(&self.stream).is_ok();
        while goes_on {
            let left = until.saturating_duration_since(Instant::now());
            goes_on = !left.is_zero()
                && self.stream.set_read_timeout(Some(left)).is_ok()
                && self.stream.read(&mut buffer).is_ok_and(|count| count > 0);
        }
    }
}

/// The number of the interface on which a link-local IPv6 address holds; 0 for all other addresses.
fn scope(address: SocketAddr) -> u32 {
    match address {
        SocketAddr::V6(address) => address.scope_id(),
        SocketAddr::V4(_) => 0,
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use std::net::TcpListener;

    use super::*;

    fn pair() -> (Link, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (Link::new(listener.accept().unwrap().0).unwrap(), stream)
    }

    /// Receives until something has come or the link is closed.
    fn receive(link: &mut Link) -> Vec<Message> {
        loop {
            let messages = link.receive(Instant::now());
            if !messages.is_empty() || !link.is_open() {
                return messages;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn messages_arrive_whole_however_they_are_cut() {
        let (mut ours, stream) = pair();
        let mut theirs = Link::new(stream.try_clone().unwrap()).unwrap();
        let message = Message::Refuse { line: "no".to_owned(), code: 2 };
        theirs.send(&message);
        assert_eq!(receive(&mut ours), std::slice::from_ref(&message));
        let mut raw = stream;
        raw.set_nonblocking(false).unwrap();
        let text = serde_json::to_vec(&message).unwrap();
        raw.write_all(&(text.len() as u32).to_be_bytes()).unwrap();
        raw.write_all(&text[..5]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(ours.receive(Instant::now()), []);
        raw.write_all(&text[5..]).unwrap();
        assert_eq!(receive(&mut ours), [message]);
    }

    #[test]
    fn who_is_no_launcher_is_not_listened_to() {
        for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\0\0\0\x02{}", b"\0\0\0\x00"] {
            let (mut ours, mut stream) = pair();
            stream.write_all(noise).unwrap();
            assert_eq!(receive(&mut ours), []);
            assert!(!ours.is_open());
        }
    }
}
