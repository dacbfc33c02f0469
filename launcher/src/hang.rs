//! Whether anybody still makes progress, and whom the others wait for: pure, of heartbeats and
//! times that it is given.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::contract::heartbeat::Beat;

/// What one running worker last said: `None` before its first heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Its rank.
    pub rank: usize,
    /// Its last heartbeat.
    pub beat: Option<Beat>,
    /// Whether a signal or a debugger has stopped it.
    pub is_stopped: bool,
}

/// Watches the heartbeats of one attempt.
///
/// The job hangs when no heartbeat of any worker has changed for the whole timeout: workers that
/// train together soon all wait for one that is stuck, and one that is slow alone (saving, reading)
/// holds the others up without being stuck.
#[derive(Debug)]
pub struct Monitor {
    timeout: Duration,
    looked: Instant,
    /// The last heartbeats, and since when they have stood.
    beats: BTreeMap<usize, (Beat, Instant)>,
    /// For how long nothing has changed.
    idle: Duration,
}

impl Monitor {
    /// Nothing for `timeout` is a hang; the workers start `now`.
    pub fn new(timeout: Duration, now: Instant) -> Self {
        Self { timeout, looked: now, beats: BTreeMap::new(), idle: Duration::ZERO }
    }

    fn interval(&self) -> Duration {
        (self.timeout / 8).clamp(Duration::from_millis(20), Duration::from_secs(1))
    }

    /// When to look next.
    pub fn due(&self) -> Instant {
        self.looked + self.interval()
    }

    /// Takes in the heartbeats of the workers that run; returns whether the job hangs. A job of
    /// which no worker has ever reported does not know of heartbeats, and never hangs.
    pub fn look(&mut self, running: Vec<(usize, Option<Beat>)>, now: Instant) -> bool {
        // A launcher that was itself stopped has not seen what happened meanwhile.
        let most = 2 * self.interval();
        let passed = now.duration_since(self.looked).min(most);
        self.looked = now;
        let before = self.beats.len();
        let mut changed = false;
        let mut beats = BTreeMap::new();
        for (rank, beat) in running {
            let Some(beat) = beat else { continue };
            let since = match self.beats.remove(&rank) {
                Some((last, since)) if last == beat => since,
                _ => {
                    changed = true;
                    now
                }
            };
            beats.insert(rank, (beat, since));
        }
        changed |= beats.len() != before;
        self.beats = beats;
        self.idle =
            if changed || self.beats.is_empty() { Duration::ZERO } else { self.idle + passed };
        self.idle >= self.timeout
    }

    /// For how long a worker has been where it is.
    pub fn standing(&self, rank: usize, now: Instant) -> Option<Duration> {
        self.beats.get(&rank).map(|(_, since)| now.duration_since(*since))
    }
}

/// The worker that the others seem to wait for: one that is stopped, else one that has never
/// reported, else the one least far of those that do not wait for others, else the only one that
/// is behind.
pub fn suspect(workers: &[Position]) -> Option<usize> {
    let first = |found: &dyn Fn(&Position) -> bool| {
        workers.iter().find(|worker| found(worker)).map(|worker| worker.rank)
    };
    let working = workers
        .iter()
        .filter_map(|worker| Some((worker.beat.as_ref()?, worker.rank)))
        .filter(|(beat, _)| !beat.waits)
        .min_by_key(|(beat, rank)| (beat.step, *rank));
    let behind = || {
        let step = |worker: &Position| worker.beat.as_ref().map(|beat| beat.step);
        let least = workers.iter().filter_map(step).min()?;
        let mut hindmost = workers.iter().filter(|worker| step(worker) == Some(least));
        match (hindmost.next(), hindmost.next()) {
            (Some(worker), None) if workers.len() > 1 => Some(worker.rank),
            _ => None,
        }
    };
    first(&|worker| worker.is_stopped)
        .or_else(|| first(&|worker| worker.beat.is_none()))
        .or_else(|| working.map(|(_, rank)| rank))
        .or_else(behind)
}

/// Who waits for whom, among so many running workers that made no progress for `seconds`.
pub fn verdict(suspect: Option<usize>, running: usize, seconds: f64) -> String {
    let whom = match suspect {
        _ if running < 2 => String::new(),
        Some(rank) => format!("; the others wait for rank {rank}"),
        None => "; all wait for each other".to_owned(),
    };
    format!("no progress for {seconds} s{whom}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(8);

    fn beat(step: u64, waits: bool) -> Beat {
        Beat { step, waits, phase: if waits { "all_reduce" } else { "computing" }.to_owned() }
    }

    #[test]
    fn a_job_hangs_when_nobody_moves() {
        let mut now = Instant::now();
        let mut monitor = Monitor::new(TIMEOUT, now);
        let mut look = |monitor: &mut Monitor, steps: &[Option<u64>]| {
            now += Duration::from_secs(1);
            let beats = steps.iter().map(|step| step.map(|step| beat(step, true)));
            monitor.look(beats.enumerate().collect(), now)
        };
        for step in 1..30 {
            assert!(!look(&mut monitor, &[Some(5), Some(step)]), "rank 1 moves");
        }
        let still = (0..7).all(|_| !look(&mut monitor, &[Some(5), Some(29)]));
        assert!(still, "not yet");
        assert!(look(&mut monitor, &[Some(5), Some(29)]));
        assert!(!look(&mut monitor, &[Some(5)]), "rank 1 has ended: give the others time");
        assert!((0..100).all(|_| !look(&mut monitor, &[None, None])), "nobody reports");
    }

    #[test]
    fn a_launcher_that_was_stopped_blames_nobody() {
        let now = Instant::now();
        let mut monitor = Monitor::new(TIMEOUT, now);
        assert!(!monitor.look(vec![(0, Some(beat(1, false)))], now));
        let later = now + 100 * TIMEOUT;
        assert!(!monitor.look(vec![(0, Some(beat(1, false)))], later));
        assert_eq!(monitor.standing(0, later), Some(100 * TIMEOUT));
    }

    fn at(rank: usize, beat: Option<Beat>) -> Position {
        Position { rank, beat, is_stopped: false }
    }

    #[test]
    fn the_one_that_the_others_wait_for() {
        let waits = |rank| at(rank, Some(beat(7, true)));
        assert_eq!(suspect(&[waits(0), waits(1)]), None);
        assert_eq!(suspect(&[waits(0), at(1, Some(beat(7, false))), waits(2)]), Some(1));
        assert_eq!(suspect(&[at(0, Some(beat(8, false))), at(1, Some(beat(7, false)))]), Some(1));
        assert_eq!(suspect(&[waits(0), at(1, None)]), Some(1));
        let stopped = Position { is_stopped: true, ..waits(2) };
        assert_eq!(suspect(&[waits(0), at(1, Some(beat(7, false))), stopped]), Some(2));
        assert_eq!(suspect(&[waits(0), at(1, Some(beat(6, true)))]), Some(1));
        assert_eq!(suspect(&[waits(0)]), None);
    }
}
