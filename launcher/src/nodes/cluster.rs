//! The launchers of a run while their workers run. Node 0 passes on what one of them says, keeps
//! the [`Pool`], and says what an attempt came to. A node that hangs up or is silent is lost.

use std::collections::VecDeque;
use std::io;
use std::net::TcpListener;
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use super::link::Link;
use super::meeting;
use super::message::{Ending, Message, Part, Settlement, World};
use super::ping_interval;
use super::pool::Pool;
use crate::attempt::Token;
use crate::lifecycle::Cause;
use crate::plan::{Rendezvous, Standing};
use crate::sys::{Epoll, Interest};

/// How long node 0 waits in the end until all have heard what the run came to.
const FAREWELL: Duration = Duration::from_secs(1);

/// What another node has to say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum News {
    /// The workers have to end.
    Ending(Ending),
    /// At once.
    Kill,
}

/// This node among the others.
pub struct Cluster {
    /// This node's number.
    node: usize,
    /// All nodes.
    world: World,
    attempt: u32,
    /// By node; node 0 has one to each, the others one to node 0.
    links: Vec<Option<Link>>,
    /// Puts latecomers off on node 0.
    listener: Option<TcpListener>,
    /// What was received and waits for its turn.
    inbox: VecDeque<(usize, Message)>,
    pool: Pool,
    settlement: Option<Settlement>,
    clock: Clock,
    silence: Duration,
    /// By node, whether nothing moves there.
    quiet: Vec<bool>,
}

impl Cluster {
    /// Node 0, with the links to nodes 1, 2 and so on.
    pub fn hub(world: World, links: Vec<Link>, listener: TcpListener, silence: Duration) -> Self {
        let links = std::iter::once(None).chain(links.into_iter().map(Some)).collect();
        Self { listener: Some(listener), ..Self::new(world, 0, links, silence) }
    }

    /// Another node, with its link to node 0 and what that has said already.
    pub fn member(
        world: World,
        node: usize,
        link: Link,
        said: Vec<Message>,
        silence: Duration,
    ) -> Self {
        let mut links: Vec<Option<Link>> = world.nodes.iter().map(|_| None).collect();
        links[0] = Some(link);
        let inbox = said.into_iter().map(|message| (0, message)).collect();
        Self { inbox, ..Self::new(world, node, links, silence) }
    }

    fn new(world: World, node: usize, links: Vec<Option<Link>>, silence: Duration) -> Self {
        let nodes = world.nodes.len();
        let clock =
            Clock { start: Instant::now(), offset_us: (node == 0).then_some(0), best_us: i64::MAX };
        Self {
            node,
            world,
            attempt: 0,
            links,
            listener: None,
            inbox: VecDeque::new(),
            pool: Pool::new(nodes),
            settlement: None,
            clock,
            silence,
            quiet: vec![false; nodes],
        }
    }

    /// Where this node's workers stand among all.
    pub fn standing(&self) -> Standing {
        Standing {
            node: self.node,
            nodes: self.world.nodes.len(),
            first_rank: self.world.first_rank(self.node),
            world_size: self.world.workers(),
        }
    }

    /// All nodes.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Where the workers of the first attempt meet.
    pub fn rendezvous(&self) -> Rendezvous {
        Rendezvous { addr: self.world.master_addr.clone(), port: self.world.master_port }
    }

    fn is_hub(&self) -> bool {
        self.node == 0
    }

    /// Watches the connections.
    pub fn watch(&self, epoll: &Epoll) -> io::Result<()> {
        for (node, link) in self.links.iter().enumerate() {
            if let Some(link) = link {
                epoll.add(link.as_fd(), Interest::Read, Token::Node(node).pack())?;
            }
        }
        match &self.listener {
            Some(listener) => epoll.add(listener.as_fd(), Interest::Read, Token::Caller.pack()),
            None => Ok(()),
        }
    }

    /// Somebody calls who is late, or one too many, or early for the next launch.
    pub fn refuse_caller(&self) {
        self.listener.iter().for_each(meeting::put_off);
    }

    /// Reads what a node has sent.
    pub fn read(&mut self, node: usize, now: Instant) {
        if let Some(link) = &mut self.links[node] {
            let messages = link.receive(now);
            self.inbox.extend(messages.into_iter().map(|message| (node, message)));
        }
    }

    /// Sends pings, notices who is lost, and returns what the others say. What belongs to the next
    /// attempt is left for later.
    pub fn news(&mut self, now: Instant) -> Vec<News> {
        let mut news = Vec::new();
        while self.settlement.is_none()
            && let Some((node, message)) = self.inbox.pop_front()
        {
            news.extend(self.take_in(node, message, now));
        }
        if self.settlement.is_some() {
            return news;
        }
        for node in 0..self.links.len() {
            let is_quiet = self.quiet[self.node];
            let Some(link) = &mut self.links[node] else { continue };
            link.flush();
            if !link.is_open() || link.is_silent(self.silence, now) {
                news.push(News::Ending(self.lose(node, now)));
            } else if self.node != 0 && link.takes_ping(ping_interval(self.silence), now) {
                let sent_us = self.clock.own(now);
                link.send(&Message::Ping { sent_us, is_quiet });
            }
        }
        news
    }

    fn take_in(&mut self, node: usize, message: Message, now: Instant) -> Option<News> {
        match message {
            Message::Ping { sent_us, is_quiet } => {
                self.quiet[node] = is_quiet;
                let pong = Message::Pong { sent_us, clock_us: self.clock.own(now) };
                self.links[node].as_mut()?.send(&pong);
            }
            // 0 was sent before the start, by no clock.
            Message::Pong { sent_us: 0, .. } => {}
            Message::Pong { sent_us, clock_us } => self.clock.learn(sent_us, clock_us, now),
            Message::Ending(mut ending) => {
                let is_asked = matches!(
                    ending.cause,
                    Cause::Signal(_) | Cause::Preempted { .. } | Cause::OutputClosed
                );
                if ending.attempt != self.attempt && !is_asked {
                    return None;
                }
                ending.attempt = self.attempt;
                ending.at_us = ending.at_us.or(self.clock.hubs(now));
                self.pool.ends(ending);
                self.broadcast(&Message::Ending(ending));
                return Some(News::Ending(ending));
            }
            Message::Kill => {
                self.broadcast(&Message::Kill);
                return Some(News::Kill);
            }
            Message::Gone { attempt, part } if attempt == self.attempt => {
                self.pool.is_gone(node, part);
            }
            Message::Settled(settlement) => self.settlement = Some(settlement),
            // It was told to end in the moment in which it became welcome.
            Message::Decline { code, .. } => {
                let (attempt, cause) = (self.attempt, Cause::LauncherFailed { code });
                let ending = Ending { attempt, node, cause, at_us: None };
                return self.take_in(node, Message::Ending(ending), now);
            }
            // Those of the meeting, and of an attempt that is over.
            _ => {}
        }
        None
    }

    /// A node is lost; the time is when it was last there. To the others, node 0 is all there is.
    fn lose(&mut self, node: usize, now: Instant) -> Ending {
        let link = self.links[node].take();
        let last = link.map_or(now, |link| if link.is_open() { link.heard() } else { now });
        if self.is_hub() {
            self.pool.loses(node);
        } else {
            let others = (0..self.world.nodes.len()).filter(|&other| other != self.node);
            others.for_each(|other| self.pool.loses(other));
        }
        let (attempt, at_us) = (self.attempt, self.clock.hubs(last));
        let ending = Ending { attempt, node, cause: Cause::NodeLost { node }, at_us };
        self.pool.ends(ending);
        self.broadcast(&Message::Ending(ending));
        ending
    }

    /// From node 0 to all.
    fn broadcast(&mut self, message: &Message) {
        if self.is_hub() {
            self.links.iter_mut().flatten().for_each(|link| link.send(message));
        }
    }

    /// To all: through node 0.
    fn tell(&mut self, message: &Message) {
        self.links.iter_mut().flatten().for_each(|link| link.send(message));
    }

    /// This node's workers end before they are done, for a cause of this node's own.
    pub fn ends(&mut self, cause: Cause, now: Instant) {
        let (attempt, node, at_us) = (self.attempt, self.node, self.clock.hubs(now));
        let ending = Ending { attempt, node, cause, at_us };
        self.pool.ends(ending);
        self.tell(&Message::Ending(ending));
    }

    /// The user wants everybody killed.
    pub fn kill(&mut self) {
        self.tell(&Message::Kill);
    }

    /// Whether this node's workers make no progress.
    pub fn set_quiet(&mut self, is_quiet: bool) {
        self.quiet[self.node] = is_quiet;
    }

    /// Whether this is node 0, and no node's workers make progress.
    pub fn hangs(&self) -> bool {
        self.is_hub() && self.quiet.iter().all(|&quiet| quiet)
    }

    /// Nothing of this node's part of the attempt is left.
    pub fn is_gone(&mut self, part: Part) {
        if !self.is_hub() {
            self.tell(&Message::Gone { attempt: self.attempt, part: part.clone() });
        }
        self.pool.is_gone(self.node, part);
    }

    /// What the attempt came to, once nothing is left of it anywhere. `find_port` is asked for the
    /// port of the next one.
    pub fn settle(
        &mut self,
        hang_timeout: Option<Duration>,
        find_port: impl FnOnce() -> u16,
    ) -> Option<&Settlement> {
        if self.settlement.is_none() && self.pool.is_complete() {
            let hang_s = hang_timeout.unwrap_or_default().as_secs_f64();
            let settlement = self.pool.settle(&self.world, hang_s, find_port());
            self.broadcast(&Message::Settled(settlement.clone()));
            self.settlement = Some(settlement);
        }
        self.settlement()
    }

    /// What the attempt came to, where that is known.
    pub fn settlement(&self) -> Option<&Settlement> {
        self.settlement.as_ref()
    }

    /// The next attempt begins; where its workers meet.
    pub fn begin(&mut self, attempt: u32) -> Rendezvous {
        let nodes = self.world.nodes.len();
        if let Some(settlement) = self.settlement.take() {
            self.world.master_port = settlement.next_port;
        }
        self.attempt = attempt;
        (self.pool, self.quiet) = (Pool::new(nodes), vec![false; nodes]);
        self.rendezvous()
    }

    /// When there is something to do without an event.
    pub fn deadline(&self) -> Option<Instant> {
        if self.settlement.is_none() && !self.inbox.is_empty() {
            return Some(Instant::now());
        }
        let links = self.links.iter().flatten();
        let silences = links.clone().filter_map(|link| link.heard().checked_add(self.silence));
        let pings = links.filter(|_| !self.is_hub()).map(Link::ping_at);
        silences.chain(pings).min()
    }

    /// This node's launcher cannot go on, and exits with `code`: the others hear of it, and end with it
    /// too.
    pub fn gives_up(mut self, code: u8) {
        let now = Instant::now();
        self.ends(Cause::LauncherFailed { code }, now);
        self.links.into_iter().flatten().for_each(|link| link.part(now + FAREWELL));
    }

    /// The end: node 0 waits until the others have heard it.
    pub fn part(self) {
        if self.is_hub() {
            let until = Instant::now() + FAREWELL;
            self.links.into_iter().flatten().for_each(|link| link.part(until));
        }
    }
}

/// Node 0's clock as this node sees it: the difference of the two, from the round trip that took
/// the least time.
#[derive(Debug)]
struct Clock {
    start: Instant,
    offset_us: Option<i64>,
    /// That round trip, in microseconds.
    best_us: i64,
}

impl Clock {
    /// This node's clock, in microseconds.
    fn own(&self, now: Instant) -> i64 {
        let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
        match now.checked_duration_since(self.start) {
            Some(after) => micros(after),
            None => -micros(self.start.duration_since(now)),
        }
    }

    /// Node 0's.
    fn hubs(&self, now: Instant) -> Option<i64> {
        self.offset_us.map(|offset| self.own(now) + offset)
    }

    fn learn(&mut self, sent_us: i64, clock_us: i64, now: Instant) {
        let now_us = self.own(now);
        let trip = now_us - sent_us;
        // The two drift apart, so that an old measurement counts less and less.
        self.best_us = self.best_us.saturating_add(self.best_us / 16 + 1);
        if trip <= self.best_us {
            self.best_us = trip;
            self.offset_us = Some(clock_us - (sent_us + trip / 2));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_quickest_round_trip_tells_the_other_clock() {
        let start = Instant::now();
        let mut clock = Clock { start, offset_us: None, best_us: i64::MAX };
        let at = |us: u64| start + Duration::from_micros(us);
        assert_eq!(clock.hubs(at(5)), None);
        clock.learn(0, 1_000_500, at(1000));
        assert_eq!(clock.hubs(at(2000)), Some(1_002_000));
        clock.learn(2000, 1_004_900, at(5000));
        assert_eq!(clock.hubs(at(2000)), Some(1_002_000), "a slow one tells less");
        clock.learn(6000, 1_006_150, at(6100));
        assert_eq!(clock.hubs(at(6100)), Some(1_006_200));
    }
}
