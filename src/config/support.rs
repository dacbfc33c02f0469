//! What the engine cannot do yet, in one table.
//!
//! A setting that is legal but not built must never be ignored in silence: the run would report
//! numbers for something else than was asked. A row leaves the table when its feature lands.

use super::plan::Plan;
use crate::error::Result;

/// One thing that is refused.
struct Refusal {
    /// The setting's name in the plan, whose place the error names.
    key: &'static str,
    /// Whether the plan asks for it; what it asks for, in words.
    asks: fn(&Plan) -> Option<String>,
    /// What can be done instead.
    instead: &'static str,
}

const REFUSALS: &[Refusal] = &[Refusal {
    key: "num_labels",
    asks: |plan| (plan.model.num_labels != 1).then(|| plan.model.num_labels.to_string()),
    instead: "use 1: a reranker gives one score per pair",
}];

/// Refuses the first thing in `plan` that the engine cannot do yet.
///
/// # Errors
/// One line with the position of the setting and what to use instead.
pub fn check(plan: &Plan) -> Result<()> {
    for refusal in REFUSALS {
        if let Some(asked) = (refusal.asks)(plan) {
            let message = format!("{asked} is not supported yet; {}", refusal.instead);
            return Err(plan.error(refusal.key, message));
        }
    }
    Ok(())
}
