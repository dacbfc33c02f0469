//! The meeting as a node other than 0 sees it: it calls until it is welcome.

use std::io;
use std::net::{TcpStream, ToSocketAddrs as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use super::cluster::Cluster;
use super::link::Link;
use super::meeting::{FAREWELL, LATECOMERS, Place, Reminder, network, say};
use super::message::{Hello, Message, World};
use super::ping_interval;
use crate::contract::exit_code;
use crate::error::LaunchError;
use crate::requests::Requests;
use crate::sys::{Epoll, Interest};

/// Between two calls to a node 0 that does not answer.
const CALL_AGAIN: Duration = Duration::from_millis(200);

/// The same where a launch is on that has to end first.
const CALL_LATER: Duration = Duration::from_secs(1);

/// The longest wait for one call to be answered.
const CALL: Duration = Duration::from_secs(3);

/// Calls node 0 until this node is welcome. A signal meanwhile is the end, and told to the others.
///
/// # Errors
/// That, or the nodes do not come together.
pub fn join(own: &Hello, place: &Place, requests: &Requests) -> Result<Cluster, LaunchError> {
    let deadline = Instant::now().checked_add(place.patience);
    let mut trouble = String::new();
    let mut reminder = Reminder::new(Instant::now());
    let mut was_put_off = false;
    loop {
        let left = deadline.map_or(CALL, |deadline| deadline.duration_since(Instant::now()));
        if left.is_zero() {
            let line =
                format!("waited {} s (--rdzv-timeout) for {trouble}", place.patience.as_secs_f64());
            return Err(LaunchError::Nodes { line, code: exit_code::NODE_LOST });
        }
        if reminder.is_due(Instant::now()) {
            let patience = place.patience.as_secs_f64();
            say(&format!("waiting for {trouble}; up to {patience} s in all"));
        }
        let Place { addr, port, .. } = place;
        let mut interval = CALL_AGAIN;
        match call(place, left.min(CALL)) {
            Err(error) => {
                trouble = format!("node 0, which does not answer at {addr}:{port}: {error}");
            }
            Ok(mut link) => {
                link.send(&Message::Hello(own.clone()));
                match sit(&mut link, place, requests) {
                    Ok(Answer::Begin(world, rest)) => {
                        return Ok(Cluster::member(
                            world,
                            own.node_rank,
                            link,
                            rest,
                            place.silence,
                        ));
                    }
                    Ok(Answer::Refused { line, code }) => {
                        return Err(LaunchError::Nodes { line, code });
                    }
                    Ok(Answer::Begun) => {
                        if !std::mem::replace(&mut was_put_off, true) {
                            say_put_off(place);
                        }
                        trouble = format!(
                            "the end of the launch at {addr}:{port}, which has begun without this node"
                        );
                        interval = CALL_LATER;
                    }
                    Ok(Answer::Gone) => trouble = format!("node 0, which hung up at {addr}:{port}"),
                    Ok(Answer::Silent) => {
                        trouble = format!("node 0, which has not begun to meet at {addr}:{port}");
                    }
                    Err(error @ LaunchError::Signalled { .. }) => {
                        return Err(leave(&error, |code| {
                            say_no(link, own.node_rank, &own.host, code);
                        }));
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        if let Err(error) = requests.pause(interval.min(left)) {
            return Err(leave(&error, |code| {
                decline(place, &own.host, code, requests);
            }));
        }
    }
}

/// Says that a launch is on. It may be the one before this, whose other nodes still end their workers; or this
/// node is one too many.
fn say_put_off(place: &Place) {
    let Place { addr, port, .. } = place;
    say(&format!(
        "the launch at {addr}:{port} has begun without this node, with all nodes that it has; waiting \
         for its end and for the next one, up to {} s in all",
        place.patience.as_secs_f64()
    ));
}

/// Says why this node does not take part, then tells the others.
fn leave(error: &LaunchError, tell: impl FnOnce(u8)) -> LaunchError {
    let code = error.exit_code();
    say(&error.to_string());
    tell(code);
    LaunchError::Told(code)
}

/// Tells node 0 that this node cannot start, and will exit with `code`: for [`LATECOMERS`] where it is
/// not there, or until a signal comes.
pub fn decline(place: &Place, host: &str, code: u8, requests: &Requests) {
    let until = Instant::now() + LATECOMERS;
    loop {
        if let Ok(link) = call(place, FAREWELL) {
            return say_no(link, place.node_rank, host, code);
        }
        if Instant::now() >= until || requests.pause(CALL_AGAIN).is_err() {
            return;
        }
    }
}

fn say_no(mut link: Link, node_rank: usize, host: &str, code: u8) {
    link.send(&Message::Decline { node_rank, host: host.to_owned(), code });
    link.part(Instant::now() + FAREWELL);
}

/// One call to node 0.
fn call(place: &Place, timeout: Duration) -> io::Result<Link> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    for address in (place.addr.as_str(), place.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, timeout) {
            Ok(stream) => return Link::new(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// How a call ended.
enum Answer {
    /// All are there; and what was said at once behind that: another node's launch may end already.
    Begin(World, Vec<Message>),
    Refused {
        line: String,
        code: u8,
    },
    /// A launch is on.
    Begun,
    /// Node 0 has ended.
    Gone,
    /// It says nothing: it is still busy with its own check, or out of reach.
    Silent,
}

/// Waits at node 0 for the others. How long is node 0's to say.
fn sit(link: &mut Link, place: &Place, requests: &Requests) -> Result<Answer, LaunchError> {
    let mut epoll = Epoll::new().map_err(network())?;
    epoll.add(link.as_fd(), Interest::Read, 0).map_err(network())?;
    requests.watch(&epoll, 1).map_err(network())?;
    let interval = ping_interval(place.silence);
    loop {
        let now = Instant::now();
        let mut messages = link.receive(now).into_iter();
        while let Some(message) = messages.next() {
            match message {
                Message::Welcome(world) => return Ok(Answer::Begin(world, messages.collect())),
                Message::Refuse { line, code } => return Ok(Answer::Refused { line, code }),
                Message::Begun => return Ok(Answer::Begun),
                _ => {}
            }
        }
        // Whoever is welcome hears of a signal as one that runs.
        requests.heed()?;
        if !link.is_open() {
            return Ok(Answer::Gone);
        }
        if link.is_silent(place.silence, now) {
            return Ok(Answer::Silent);
        }
        if link.takes_ping(interval, now) {
            link.send(&Message::Ping { sent_us: 0, is_quiet: false });
        }
        epoll.wait(Some(interval)).map_err(network())?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use std::net::TcpListener;

    use super::*;
    use crate::nodes::cluster::News;
    use crate::nodes::message::Node;

    #[test]
    fn what_comes_in_one_batch_with_the_welcome_is_heard() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let place = Place {
            nnodes: 2,
            node_rank: 1,
            addr: "127.0.0.1".to_owned(),
            port: listener.local_addr().unwrap().port(),
            patience: Duration::from_secs(60),
            silence: Duration::from_secs(60),
        };
        let host = std::thread::spawn(move || {
            let mut link = Link::new(listener.accept().unwrap().0).unwrap();
            let node = |host: &str| Node { host: host.to_owned(), workers: 1 };
            let world = World {
                run_id: "r".to_owned(),
                nodes: vec![node("a"), node("b")],
                master_addr: "127.0.0.1".to_owned(),
                master_port: 1,
            };
            link.send_at_once(&[Message::Welcome(world), Message::Kill]);
            link
        });
        let own = Hello { node_rank: 1, host: "b".to_owned(), workers: 1, terms: Vec::new() };
        let requests = Requests::take_over(None).unwrap();
        let mut cluster = join(&own, &place, &requests).unwrap();
        let due = cluster.deadline();
        assert!(due.is_some_and(|due| due <= Instant::now()), "it need not be waited for");
        assert_eq!(cluster.news(Instant::now()), [News::Kill]);
        drop(host.join().unwrap());
    }
}
