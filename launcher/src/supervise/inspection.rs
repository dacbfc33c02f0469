//! The event loop's look at workers that hang, before they end.

use std::time::Instant;

use super::Supervisor;
use crate::hang;
use crate::lifecycle::Event;
use crate::stacks::Collection;

impl Supervisor {
    /// Begins to take stacks: of all workers into their files, or of the one to blame for the console.
    pub(super) fn inspect(&mut self) {
        if self.options.stack_timeout.is_zero() {
            return;
        }
        let mut subjects = self.attempt.subjects();
        // With other nodes, that of a worker which waits for theirs would tell nothing.
        let any = || subjects.first().map(|first| first.rank).filter(|_| self.cluster.is_none());
        let suspect = hang::suspect(&self.positions).or_else(any);
        subjects.retain(|subject| subject.file.is_some() || Some(subject.rank) == suspect);
        subjects.sort_by_key(|subject| Some(subject.rank) != suspect);
        self.collection = Some(Collection::new(subjects, self.plan.launcher_id()));
    }

    /// Goes on with it, until there is nothing more to take.
    pub(super) fn tend_inspection(&mut self, now: Instant) {
        if !self.lifecycle.is_inspecting() {
            return;
        }
        let is_complete = match &mut self.collection {
            Some(collection) => collection.advance(&self.guardian),
            None => true,
        };
        if is_complete || self.attempt.running() == 0 {
            self.tell(Event::Inspected, now);
        }
    }

    /// Ends it, and says what was found.
    pub(super) fn end_inspection(&mut self) {
        let Some(collection) = self.collection.take() else { return };
        let findings = collection.finish(self.options.stack_timeout, &self.guardian);
        for line in findings.lines {
            self.output.say(&line);
        }
        self.attempt.stacks = findings.files;
    }
}
