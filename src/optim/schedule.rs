//! Linear warm-up, constant, half cosine to zero (transformers' warmup-stable-decay schedule with
//! cosine decay and no minimum).

/// The learning-rate factor of every optimizer step of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    total: usize,
    warmup: usize,
    stable: usize,
    /// How many steps further in it a run is than the number of its steps says.
    ahead: isize,
}

impl Schedule {
    /// A schedule of `total` steps; warm-up and stable last `int(proportion * total)` steps.
    ///
    /// # Panics
    /// When the proportions are not in `[0, 1]` with a sum of at most 1 (the plan checks them).
    #[must_use]
    pub fn new(total: usize, warmup_proportion: f64, stable_proportion: f64) -> Self {
        assert!(
            warmup_proportion >= 0.0
                && stable_proportion >= 0.0
                && warmup_proportion + stable_proportion <= 1.0 + 1e-9,
            "warm-up {warmup_proportion} and stable {stable_proportion} must sum to at most 1"
        );
        let part = |proportion: f64| (proportion * total as f64) as usize;
        Self { total, warmup: part(warmup_proportion), stable: part(stable_proportion), ahead: 0 }
    }

    /// The schedule of a run that has taken `done` steps, perhaps of another size, and has `left` steps
    /// to go: the rate goes by the data that is used up, and is 0 at its end, not before and not later.
    ///
    /// # Panics
    /// When more steps are left than it has.
    #[must_use]
    pub fn resumed(self, done: usize, left: usize) -> Self {
        assert!(left <= self.total, "{left} steps are left of {}", self.total);
        Self { ahead: (self.total - left) as isize - done as isize, ..self }
    }

    /// Number of optimizer steps.
    #[must_use]
    pub fn total(&self) -> usize {
        self.total.saturating_add_signed(-self.ahead)
    }

    /// The factor for the step with this index, counted from 0; 0 from `total` on.
    #[must_use]
    pub fn factor(&self, step: usize) -> f64 {
        let step = step.saturating_add_signed(self.ahead);
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let decay_start = self.warmup + self.stable;
        if step < decay_start {
            return 1.0;
        }
        if step >= self.total {
            return 0.0;
        }
        let progress = (step - decay_start) as f64 / (self.total - decay_start).max(1) as f64;
        0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_without_steps_has_no_factor_to_divide_by() {
        assert_eq!(Schedule::new(0, 0.1, 0.0).factor(0), 0.0);
    }

    #[test]
    fn a_run_of_other_steps_is_where_its_data_is() {
        let schedule = Schedule::new(40, 0.1, 0.2);
        assert_eq!(schedule.resumed(10, 30), schedule);
        // Ten of twenty steps twice as large: half of the data.
        let smaller = schedule.resumed(10, 20);
        assert_eq!((smaller.total(), smaller.factor(10)), (30, schedule.factor(20)));
        assert!(smaller.factor(29) > 0.0 && smaller.factor(30) == 0.0);
        // Twenty of eighty that are half as large: a quarter of it.
        let larger = schedule.resumed(20, 30);
        assert_eq!((larger.total(), larger.factor(20)), (50, schedule.factor(10)));
        assert_eq!(schedule.resumed(7, 0).total(), 7);
    }

    #[test]
    fn warm_up_starts_at_zero_and_stable_follows() {
        let schedule = Schedule::new(10, 0.2, 0.3);
        let factors: Vec<f64> = (0..6).map(|step| schedule.factor(step)).collect();
        assert_eq!(factors, [0.0, 0.5, 1.0, 1.0, 1.0, 1.0]);
        assert!(schedule.factor(9) > 0.0 && schedule.factor(9) < 0.1);
    }
}
