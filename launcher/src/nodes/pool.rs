//! What the nodes' parts of an attempt come to: pure. Kept by node 0.

use super::message::{Ending, Part, Settlement, World};
use crate::hang::{self, Position};
use crate::lifecycle::Cause;
use crate::report::{self, Saved};

/// What is known of an attempt on all nodes.
#[derive(Debug)]
pub struct Pool {
    /// What is left of nothing, by node.
    parts: Vec<Option<Part>>,
    /// Nodes that are lost; nothing more will come from them.
    lost: Vec<bool>,
    endings: Vec<Ending>,
}

impl Pool {
    /// Nothing is known yet of so many nodes.
    pub fn new(nodes: usize) -> Self {
        Self { parts: vec![None; nodes], lost: vec![false; nodes], endings: Vec::new() }
    }

    /// Workers end before they are done.
    pub fn ends(&mut self, ending: Ending) {
        self.endings.push(ending);
    }

    /// Nothing of a node's part is left.
    pub fn is_gone(&mut self, node: usize, part: Part) {
        self.parts[node] = Some(part);
    }

    /// Nothing more will come from a node.
    pub fn loses(&mut self, node: usize) {
        self.lost[node] = true;
    }

    /// Whether nothing is left on any node.
    pub fn is_complete(&self) -> bool {
        self.parts.iter().zip(&self.lost).all(|(part, lost)| part.is_some() || *lost)
    }

    /// The first cause, by the clock of node 0. A worker that failed while the others saved counts
    /// for more than the request to save.
    fn first(&self) -> Option<Ending> {
        let time = |ending: &&Ending| self.time(ending);
        let earliest =
            |endings: &mut dyn Iterator<Item = &Ending>| endings.min_by_key(time).copied();
        let first = earliest(&mut self.endings.iter())?;
        if !matches!(first.cause, Cause::Preempted { .. }) {
            return Some(first);
        }
        let is_failure = |ending: &&Ending| {
            matches!(
                ending.cause,
                Cause::Failure { .. } | Cause::NodeLost { .. } | Cause::LauncherFailed { .. }
            )
        };
        earliest(&mut self.endings.iter().filter(is_failure)).or(Some(first))
    }

    /// When workers ended, by the clock of node 0.
    fn time(&self, ending: &Ending) -> i64 {
        // Of a node that does not know node 0's clock yet, only the loss of node 0 has no time: what that
        // has said was before.
        let at = |ending: &Ending| ending.at_us.unwrap_or(i64::MAX);
        let Cause::NodeLost { node } = ending.cause else { return at(ending) };
        // As was what any node has said: its clock is known to within the time that a message takes.
        let is_said = |said: &&Ending| said.node == node && said.cause != ending.cause;
        self.endings.iter().filter(is_said).map(at).fold(at(ending), i64::max)
    }

    /// Whether workers were asked to save, and then one failed.
    fn was_asked_before(&self, first: Ending) -> bool {
        let asked = |ending: &Ending| {
            ending.at_us <= first.at_us && matches!(ending.cause, Cause::Preempted { .. })
        };
        matches!(first.cause, Cause::Failure { .. }) && self.endings.iter().any(asked)
    }

    /// What has asked for the end of the job after that.
    fn request_after(&self, first: Ending) -> Option<Cause> {
        let asks = |cause| {
            matches!(
                cause,
                Cause::Signal(_) | Cause::Preempted { signal: Some(_) } | Cause::OutputClosed
            )
        };
        let requests = self.endings.iter().filter(|ending| **ending != first && asks(ending.cause));
        requests.min_by_key(|ending| ending.at_us).map(|ending| ending.cause)
    }

    /// What the attempt came to; workers meet at `next_port` if there is another.
    pub fn settle(&self, world: &World, hang_s: f64, next_port: u16) -> Settlement {
        let parts = || self.parts.iter().flatten();
        let first = self.first();
        let (any_saved, is_incomplete) =
            (parts().any(|part| part.has_saved), parts().any(|part| part.is_incomplete));
        let called_off = first.and_then(|first| self.request_after(first));
        let (mut cause, mut told) = (first.map(|first| first.cause), Vec::new());
        if let Some(first) = first {
            told = match first.cause {
                Cause::Hang { .. } => {
                    let positions: Vec<Position> =
                        parts().flat_map(|part| part.positions.iter().cloned()).collect();
                    let rank = hang::suspect(&positions);
                    cause = Some(Cause::Hang { rank });
                    vec![hang::verdict(rank, positions.len(), hang_s)]
                }
                Cause::NodeLost { node } => vec![format!("{} is lost", world.name(node))],
                cause => {
                    let words = self.parts[first.node].as_ref().map(|part| part.reason.as_slice());
                    let mut words = words.unwrap_or_default().to_vec();
                    if words.is_empty() {
                        words.push(report::brief(cause));
                    }
                    if matches!(cause, Cause::Preempted { .. }) && any_saved && is_incomplete {
                        words = vec![report::preempted(cause, &Saved::Partly)];
                    }
                    words[0] = format!("{}: {}", world.name(first.node), words[0]);
                    words
                }
            };
        }
        Settlement {
            cause,
            told,
            step: parts().filter_map(|part| part.step).max(),
            has_saved: any_saved && !is_incomplete,
            was_stopped: parts().any(|part| part.was_stopped),
            is_final: parts().any(|part| part.is_abandoned)
                || self.lost.contains(&true)
                || first.is_some_and(|first| self.was_asked_before(first)),
            called_off,
            next_port,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lifecycle::Exit;
    use crate::nodes::message::Node;

    fn world() -> World {
        let node = |host: &str| Node { host: host.to_owned(), workers: 2 };
        World {
            run_id: "r".to_owned(),
            nodes: vec![node("a"), node("b"), node("c")],
            master_addr: "10.0.0.1".to_owned(),
            master_port: 1,
        }
    }

    fn ending(node: usize, cause: Cause, at_us: i64) -> Ending {
        Ending { attempt: 0, node, cause, at_us: Some(at_us) }
    }

    fn failure(rank: usize) -> Cause {
        Cause::Failure { rank, exit: Exit::Code(3) }
    }

    fn settle(endings: &[Ending], parts: [Part; 3]) -> Settlement {
        let mut pool = Pool::new(3);
        for (node, part) in parts.into_iter().enumerate() {
            assert!(!pool.is_complete());
            pool.is_gone(node, part);
        }
        pool.endings.extend(endings);
        assert!(pool.is_complete());
        pool.settle(&world(), 600.0, 7)
    }

    fn said(line: &str) -> Part {
        Part { reason: vec![line.to_owned(), "| x".to_owned()], ..Part::default() }
    }

    #[test]
    fn the_first_cause_is_the_earliest_not_the_first_to_arrive() {
        let endings = [ending(0, failure(1), 900), ending(1, failure(3), 400)];
        let settled = settle(&endings, [said("rank 1"), said("rank 3 failed"), Part::default()]);
        assert_eq!(settled.cause, Some(failure(3)));
        assert_eq!(settled.told, ["node 1 (b): rank 3 failed", "| x"]);
        assert!(!settled.is_final);
    }

    #[test]
    fn a_failure_while_saving_is_the_cause() {
        let asked = Cause::Preempted { signal: Some(10) };
        let saved = Part { has_saved: true, ..said("preempted") };
        let endings = [ending(2, asked, 1), ending(0, failure(0), 5)];
        let settled = settle(&endings, [said("rank 0"), saved.clone(), Part::default()]);
        assert_eq!((settled.cause, settled.is_final), (Some(failure(0)), true));
        let settled = settle(&endings[..1], [Part::default(), saved, said("preempted by X")]);
        assert_eq!((settled.cause, settled.has_saved), (Some(asked), true));
        assert_eq!(settled.told[0], "node 2 (c): preempted by X");
        let saved = Part { has_saved: true, ..said("preempted; saved a checkpoint") };
        let killed = Part { is_incomplete: true, ..said("preempted; no worker saved") };
        let settled = settle(&endings[..1], [killed, Part::default(), saved]);
        assert_eq!((settled.cause, settled.has_saved), (Some(asked), false));
        assert_eq!(settled.told, ["node 2 (c): preempted by SIGUSR1; not all workers have saved"]);
    }

    #[test]
    fn what_is_asked_for_after_the_first_cause_is_told() {
        let parts = || [said("rank 0"), said("rank 3"), Part::default()];
        let late = [
            ending(0, failure(1), 400),
            ending(1, failure(3), 600),
            ending(2, Cause::Signal(15), 900),
            ending(1, Cause::OutputClosed, 800),
        ];
        let settled = settle(&late, parts());
        assert_eq!((settled.cause, settled.is_final), (Some(failure(1)), false));
        assert_eq!(settled.called_off, Some(Cause::OutputClosed));
        let settled = settle(&late[..2], parts());
        assert_eq!(settled.called_off, None);
        // Workers that save on the TERM that follows a failure were not asked to make room.
        let heard = ending(1, Cause::Preempted { signal: None }, 700);
        let settled = settle(&[late[0], heard], parts());
        assert_eq!((settled.is_final, settled.called_off), (false, None));
    }

    #[test]
    fn a_lost_node_is_not_waited_for_and_ends_all() {
        let mut pool = Pool::new(3);
        pool.is_gone(0, Part { step: Some(4), ..Part::default() });
        pool.is_gone(2, Part { step: Some(9), ..Part::default() });
        pool.loses(1);
        pool.ends(ending(0, Cause::NodeLost { node: 1 }, 5));
        assert!(pool.is_complete());
        let settled = pool.settle(&world(), 600.0, 7);
        assert_eq!(settled.told, ["node 1 (b) is lost"]);
        assert_eq!((settled.step, settled.is_final), (Some(9), true));
    }

    #[test]
    fn what_node_0_has_said_comes_before_its_loss() {
        let mut pool = Pool::new(3);
        pool.is_gone(1, Part::default());
        for node in [0, 2] {
            pool.loses(node);
        }
        let failed = Cause::LauncherFailed { code: 2 };
        pool.ends(ending(0, failed, 5));
        pool.ends(Ending { at_us: None, ..ending(1, Cause::NodeLost { node: 0 }, 0) });
        assert_eq!(pool.settle(&world(), 600.0, 7).cause, Some(failed));
    }

    #[test]
    fn what_a_node_has_said_comes_before_its_loss_whatever_its_clock_says() {
        let mut pool = Pool::new(3);
        for node in [0, 2] {
            pool.is_gone(node, Part::default());
        }
        pool.loses(1);
        let failed = Cause::LauncherFailed { code: 2 };
        pool.ends(ending(1, failed, 5));
        pool.ends(ending(1, Cause::NodeLost { node: 1 }, 4));
        assert_eq!(pool.settle(&world(), 600.0, 7).cause, Some(failed));
    }

    #[test]
    fn all_well_is_no_cause() {
        let settled = settle(&[], [Part::default(), Part::default(), Part::default()]);
        assert_eq!((settled.cause, settled.told.len()), (None, 0));
    }
}
