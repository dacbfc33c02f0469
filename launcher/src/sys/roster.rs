//! Process groups in memory that processes share.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Pid, map_words, memory_file};

/// The process groups of a launch, in memory that the launcher shares with its guardian. To enter one is
/// a store and no system call, so that the guardian sleeps while workers start: a message would wake it
/// for each, on cores that are busy starting the next.
#[derive(Debug, Clone, Copy)]
pub struct Roster {
    /// Process ids; 0 where there is none.
    places: &'static [AtomicU64],
}

impl Roster {
    /// An empty one, which lasts as long as this process and is shared with all that it forks.
    ///
    /// # Errors
    /// What the system says.
    pub fn new(places: usize) -> io::Result<Self> {
        let file = memory_file(c"rr-roster")?;
        file.set_len((places * size_of::<u64>()) as u64)?;
        Ok(Self { places: map_words(&file, places)? })
    }

    /// Enters a group; false where all places are taken. Async-signal-safe.
    pub fn enter(self, group: Pid) -> bool {
        self.exchange(0, number(group))
    }

    /// Strikes a group off: its number may come to mean another one.
    pub fn strike(self, group: Pid) {
        self.exchange(number(group), 0);
    }

    /// The groups that are entered.
    pub fn groups(self) -> impl Iterator<Item = Pid> {
        let numbers = self.places.iter().map(|place| place.load(Ordering::SeqCst));
        numbers.filter_map(|number| Pid::try_from(number).ok().filter(|&group| group > 0))
    }

    /// Puts `new` in the first place that holds `old`.
    fn exchange(self, old: u64, new: u64) -> bool {
        let put = |place: &AtomicU64| {
            place.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        };
        self.places.iter().any(put)
    }
}

/// As it stands in a place.
fn number(group: Pid) -> u64 {
    debug_assert!(group > 1, "no group of a worker: {group}");
    u64::from(group.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_come_and_go_and_a_full_roster_says_so() {
        let roster = Roster::new(2).expect("memory for two");
        assert_eq!(roster.groups().count(), 0);
        assert!(roster.enter(71) && roster.enter(72) && !roster.enter(73));
        roster.strike(71);
        roster.strike(70);
        assert_eq!(roster.groups().collect::<Vec<_>>(), [72]);
        assert!(roster.enter(74));
        assert_eq!(roster.groups().collect::<Vec<_>>(), [74, 72]);
    }
}
