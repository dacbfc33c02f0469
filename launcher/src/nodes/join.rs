//! The meeting as a node other than 0 sees it: it calls until it is welcome.

use std::io;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use super::call::Call;
use super::cluster::Cluster;
use super::link::Link;
use super::meeting::{FAREWELL, LATECOMERS, Place, Reminder, network, say};
use super::message::{Hello, Message, World};
use super::{PING, ping_interval};
use crate::contract::exit_code;
use crate::error::LaunchError;
use crate::requests::Requests;
use crate::sys::{Epoll, Interest};

/// Between two calls to a node 0 that does not answer.
const CALL_AGAIN: Duration = Duration::from_millis(200);

/// The same where a launch is on that has to end first.
const CALL_LATER: Duration = Duration::from_secs(1);

/// The longest wait for one address to answer.
const CALL: Duration = Duration::from_secs(3);

/// Calls node 0 until this node is welcome. A signal meanwhile is the end, and told to the others.
///
/// # Errors
/// That, or the nodes do not come together.
pub fn join(own: &Hello, place: &Place, requests: &Requests) -> Result<Cluster, LaunchError> {
    let Place { addr, port, .. } = place;
    let deadline = Instant::now().checked_add(place.patience);
    let patience = place.patience.as_secs_f64();
    let mut reminder = Reminder::new(Instant::now());
    let (mut calling, mut trouble) = (None, None);
    let mut was_put_off = false;
    loop {
        let left = deadline.map_or(CALL, |deadline| deadline.duration_since(Instant::now()));
        let trouble_now = || trouble.clone().unwrap_or_else(|| unanswered(calling.as_ref(), place));
        if left.is_zero() {
            let line = format!("waited {patience} s (--rdzv-timeout) for {}", trouble_now());
            return Err(LaunchError::Nodes { line, code: exit_code::NODE_LOST });
        }
        if reminder.is_due(Instant::now()) {
            say(&format!("waiting for {}; up to {patience} s in all", trouble_now()));
        }
        let called = reach(&mut calling, place, left, requests).map_err(|error| {
            leave(&error, |code| {
                decline(place, &own.host, code, requests);
            })
        })?;
        let mut interval = CALL_AGAIN;
        match called {
            None => continue,
            Some(Err(error)) => {
                trouble = Some(format!("node 0, which does not answer at {addr}:{port}: {error}"));
            }
            Some(Ok(mut link)) => {
                link.send(&Message::Hello(own.clone()));
                let node = own.node_rank;
                trouble = Some(match sit(&mut link, place, requests) {
                    Ok(Answer::Begin(mut world, rest)) => {
                        world.reach_on(link.interface());
                        return Ok(Cluster::member(world, node, link, rest, place.silence));
                    }
                    Ok(Answer::Refused { line, code }) => {
                        return Err(LaunchError::Nodes { line, code });
                    }
                    Ok(Answer::Begun) => {
                        if !std::mem::replace(&mut was_put_off, true) {
                            say_put_off(place);
                        }
                        interval = CALL_LATER;
                        let at = format!("the launch at {addr}:{port}");
                        format!("the end of {at}, which has begun without this node")
                    }
                    Ok(Answer::Gone) => format!("node 0, which hung up at {addr}:{port}"),
                    Ok(Answer::Silent) => {
                        format!("node 0, which has not begun to meet at {addr}:{port}")
                    }
                    Err(error @ LaunchError::Signalled { .. }) => {
                        return Err(leave(&error, |code| {
                            say_no(link, place, &own.host, code);
                        }));
                    }
                    Err(error) => return Err(error),
                });
            }
        }
        requests.pause(interval.min(left)).map_err(|error| {
            leave(&error, |code| {
                decline(place, &own.host, code, requests);
            })
        })?;
    }
}

/// Begins a call, or goes on with the one that is on its way; `None` as long as it is.
fn reach(
    calling: &mut Option<Call>,
    place: &Place,
    left: Duration,
    requests: &Requests,
) -> Result<Option<io::Result<Link>>, LaunchError> {
    let call = match calling.take().map_or_else(|| Call::begin(place, left.min(CALL)), Ok) {
        Ok(call) => call,
        Err(error) => return Ok(Some(Err(error))),
    };
    if call.is_through(left.min(PING), requests)? {
        return Ok(Some(call.answer()));
    }
    *calling = Some(call);
    Ok(None)
}

/// Whom the first call is waiting for.
fn unanswered(calling: Option<&Call>, place: &Place) -> String {
    let Place { addr, port, .. } = place;
    match calling {
        Some(call) if !call.has_found() => format!("node 0, whose address is not found: {addr}"),
        _ => format!("node 0, which does not answer at {addr}:{port}"),
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
    let mut calling = None;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        match reach(&mut calling, place, left, requests) {
            Ok(Some(Ok(link))) => return say_no(link, place, host, code),
            Ok(_) if !left.is_zero() => {}
            _ => return,
        }
        if calling.is_none() && requests.pause(CALL_AGAIN).is_err() {
            return;
        }
    }
}

fn say_no(mut link: Link, place: &Place, host: &str, code: u8) {
    let (host, run_id) = (host.to_owned(), place.run_id.clone());
    link.send(&Message::Decline { node_rank: place.node_rank, host, run_id, code });
    link.part(Instant::now() + FAREWELL);
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
            run_id: String::new(),
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
