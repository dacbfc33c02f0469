//! Whether all ranks do the same: with a stale configuration or data file on one host they would train a
//! mixture that nobody asked for, or meet in collectives of different sizes.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::comm::{Communicator, Reduction, reduce_values};
use crate::config::Plan;
use crate::error::{Error, Result};

/// Places in the table that the ranks compare: its size must not depend on what they have. So many that
/// two names hardly share one.
const SLOTS: usize = 8192;

/// Settings that may differ between hosts: where things are (among which a teacher, whose scores are data),
/// and what only rank 0 or the launcher heeds. A device that is asked for comes to what is compared beside
/// these, the one that is used.
const OWN: [&str; 12] = [
    "cache_dir",
    "deepspeed_config_file",
    "device",
    "gpu_ids",
    "model_name_or_path",
    "num_processes",
    "output_dir",
    "overwrite",
    "resume",
    "teacher",
    "train_dataset",
    "val_dataset",
];

/// What the plan says of the work, by name.
pub(super) fn settings(plan: &Plan) -> BTreeMap<String, Value> {
    let json = plan.to_json();
    let mut all = BTreeMap::from([
        ("loss_type".to_owned(), json["loss_type"].clone()),
        ("the version of reranker".to_owned(), json!(env!("CARGO_PKG_VERSION"))),
    ]);
    for section in ["model", "data", "training", "parallel", "saving", "validation"] {
        let settings = json[section].as_object().into_iter().flatten();
        let common = settings.filter(|(name, _)| !OWN.contains(&name.as_str()));
        all.extend(common.map(|(name, value)| (name.clone(), value.clone())));
    }
    all
}

/// Compares `facts` by name over all ranks, which call it together.
///
/// # Errors
/// [`Error::Usage`] on every rank where they are not the same, with what this rank has.
pub(super) fn check(facts: &BTreeMap<String, Value>, comm: &dyn Communicator) -> Result<()> {
    let slot = |name: &str| crc32fast::hash(name.as_bytes()) as usize % SLOTS;
    // The largest and the smallest sum over the ranks, the latter negated; an f64 holds them exactly.
    let mut bounds = vec![0.0; 2 * SLOTS];
    for (name, value) in facts {
        let sum = f64::from(crc32fast::hash(format!("{name}: {value}").as_bytes()));
        bounds[slot(name)] += sum;
        bounds[SLOTS + slot(name)] -= sum;
    }
    reduce_values(comm, &mut bounds, Reduction::Max)?;
    let differs = |slot: usize| bounds[slot] != -bounds[SLOTS + slot];
    if !(0..SLOTS).any(differs) {
        return Ok(());
    }
    let own = facts.iter().filter(|(name, _)| differs(slot(name)));
    let own: Vec<String> = own.map(|(name, value)| format!("{name} is {value} here")).collect();
    let what = if own.is_empty() { "others have what is not here".into() } else { own.join(", ") };
    Err(Error::Usage(format!(
        "rank {}: the ranks were given different things: {what}; give all of them the same \
         configuration, files and kind of device",
        comm.rank()
    )))
}
