//! The event loop's dealings with the launchers of other nodes: what they say becomes events, what
//! happens here is told to them.

use std::io;
use std::time::Instant;

use super::Supervisor;
use crate::error::LaunchError;
use crate::lifecycle::{Cause, Event, Order};
use crate::nodes::cluster::News;
use crate::nodes::message::{Ending, Part};
use crate::plan::Rendezvous;
use crate::report;

impl Supervisor {
    /// Takes an event in, and lets the other nodes know what follows from one of this node's own.
    pub(super) fn decide(&mut self, event: Event, now: Instant) -> Option<Order> {
        let (before, was_called_off) = (self.lifecycle.cause(), self.lifecycle.called_off());
        let order = self.lifecycle.on(event, now);
        let Some(cluster) = &mut self.cluster else { return order };
        let is_ours = !matches!(
            event,
            Event::PeerEnds(_) | Event::PeerKills | Event::Settled { .. } | Event::AllGone { .. }
        );
        let after = self.lifecycle.cause();
        if let Some(cause) = after.filter(|_| is_ours && after != before) {
            cluster.ends(cause, now);
        }
        let called_off = self.lifecycle.called_off();
        if let Some(by) = called_off.filter(|_| is_ours && called_off != was_called_off) {
            cluster.ends(by, now);
        }
        let is_asked = matches!(event, Event::Signalled(_) | Event::PreemptionAsked(_));
        if is_asked && order == Some(Order::Kill) {
            cluster.kill();
        }
        order
    }

    /// What the other nodes have said since, or not said.
    pub(super) fn hear_others(&mut self, now: Instant) {
        let Some(cluster) = &mut self.cluster else { return };
        for news in cluster.news(now) {
            match news {
                News::Ending(ending) => self.on_ending(ending, now),
                News::Kill => drop(self.tell(Event::PeerKills, now)),
            }
        }
    }

    fn on_ending(&mut self, ending: Ending, now: Instant) {
        if self.lifecycle.is_running() {
            if matches!(ending.cause, Cause::Hang { .. }) {
                self.locate(now);
            } else {
                self.announce_ending(ending);
            }
        }
        self.tell(Event::PeerEnds(ending.cause), now);
    }

    /// Says at once why the workers of this node end.
    fn announce_ending(&mut self, ending: Ending) {
        let running = self.attempt.running();
        let Some(cluster) = self.cluster.as_ref().filter(|_| running > 0) else { return };
        let what = match ending.cause {
            Cause::NodeLost { node } => format!("{} is lost", cluster.world().name(node)),
            cause => format!("{}: {}", cluster.world().name(ending.node), report::brief(cause)),
        };
        let running = report::workers(running);
        let then = match ending.cause {
            Cause::Preempted { signal: Some(_) } => format!("asking {running} to save"),
            Cause::Preempted { signal: None } => format!("waiting for {running} to save"),
            _ => format!("ending {running}"),
        };
        self.output.say(&format!("{what}; {then}"));
    }

    /// A hang is one only if no node's workers make progress: node 0 sees all.
    pub(super) fn look_for_hang_of_all(&mut self, is_stuck: bool, now: Instant) {
        let is_done = self.attempt.running() == 0;
        let Some(cluster) = &mut self.cluster else { return };
        cluster.set_quiet(is_stuck || is_done);
        if cluster.hangs() {
            self.locate(now);
            self.tell(Event::Hung { rank: None }, now);
        }
    }

    /// Says where this node's workers are, and keeps it for the conclusion.
    fn locate(&mut self, now: Instant) {
        let (positions, lines) = self.attempt.positions(now);
        self.positions = positions;
        for line in lines {
            self.output.say(&line);
        }
    }

    /// Whether nothing is left of the attempt, on any node.
    pub(super) fn is_over(&mut self) -> io::Result<bool> {
        if !self.attempt.is_gone() {
            return Ok(false);
        }
        if self.cluster.is_none() {
            return Ok(true);
        }
        if !self.is_part_told {
            self.drain()?;
            let part = self.part();
            self.cluster.iter_mut().for_each(|cluster| cluster.is_gone(part.clone()));
            self.is_part_told = true;
        }
        let Some(cluster) = &mut self.cluster else { return Ok(true) };
        let named = self.options.master_port;
        let last = cluster.rendezvous().port;
        // Where none is to be had rank 0 will say why.
        let port =
            || Rendezvous::on_this_host(named).map_or(named.unwrap_or(last), |free| free.port);
        Ok(cluster.settle(self.options.hang_timeout, port).is_some())
    }

    /// What the attempt came to on this node.
    fn part(&mut self) -> Part {
        let record = self.attempt.record(self.lifecycle.cause(), |_| true);
        Part {
            step: self.attempt.newest_step(),
            has_saved: self.lifecycle.has_saved(),
            is_incomplete: self.lifecycle.is_incomplete(),
            was_stopped: self.lifecycle.was_stopped(),
            is_abandoned: self.lifecycle.is_abandoned(),
            positions: std::mem::take(&mut self.positions),
            reason: report::reason(&record),
        }
    }

    /// What all nodes know of the attempt that is over becomes what this one knows: why it ended, in
    /// lines for the user, and the newest step.
    pub(super) fn take_settlement(&mut self) -> (Option<Vec<String>>, Option<u64>) {
        let settlement = self.cluster.as_ref().and_then(|cluster| cluster.settlement().cloned());
        let Some(settlement) = settlement else { return (None, self.attempt.newest_step()) };
        let event = Event::Settled {
            cause: settlement.cause,
            has_saved: settlement.has_saved,
            was_stopped: settlement.was_stopped,
            is_final: settlement.is_final,
            called_off: settlement.called_off,
        };
        self.tell(event, Instant::now());
        (Some(settlement.told), settlement.step)
    }

    /// Where the workers meet in the attempt of this number, which begins.
    pub(super) fn next_rendezvous(&mut self, number: u32) -> Result<Rendezvous, LaunchError> {
        self.is_part_told = false;
        match &mut self.cluster {
            Some(cluster) => Ok(cluster.begin(number)),
            None => Rendezvous::once_more(self.options.master_port),
        }
    }
}
