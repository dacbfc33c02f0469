//! The dynamic loss scale of fp16 training (Micikevicius et al., "Mixed precision training", 2018):
//! small gradients would vanish in fp16, so the loss is multiplied by the largest factor under
//! which none overflows.

use serde::{Deserialize, Serialize};

/// Steps without an overflow after which the scale grows.
const GROWTH_INTERVAL: usize = 2000;
const GROWTH: f64 = 2.0;
const BACKOFF: f64 = 0.5;

/// The scale and what moves it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    scale: f64,
    good_steps: usize,
    skipped: usize,
}

impl Default for LossScale {
    fn default() -> Self {
        Self { scale: 65536.0, good_steps: 0, skipped: 0 }
    }
}

impl LossScale {
    /// What the loss is multiplied by.
    #[must_use]
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Steps that were skipped because a gradient overflowed.
    #[must_use]
    pub fn skipped(&self) -> usize {
        self.skipped
    }

    /// A step's gradients were all finite, or not. Every rank sees the same reduced gradients, so
    /// all move their scale alike.
    pub fn record(&mut self, finite: bool) {
        if !finite {
            self.scale *= BACKOFF;
            self.good_steps = 0;
            self.skipped += 1;
            return;
        }
        self.good_steps += 1;
        if self.good_steps == GROWTH_INTERVAL {
            self.scale *= GROWTH;
            self.good_steps = 0;
        }
    }

    /// Whether the scale has shrunk so far that the loss itself must be wrong.
    #[must_use]
    pub fn exhausted(&self) -> bool {
        self.scale < 1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overflows_halve_and_two_thousand_good_steps_double() {
        let mut scale = LossScale::default();
        scale.record(false);
        assert_eq!((scale.scale(), scale.skipped()), (32768.0, 1));
        for _ in 0..1999 {
            scale.record(true);
        }
        assert_eq!(scale.scale(), 32768.0);
        scale.record(true);
        assert_eq!(scale.scale(), 65536.0);
        for _ in 0..17 {
            scale.record(false);
        }
        assert!(scale.exhausted());
    }
}
