//! The launch that a run's workers belong to, and whether an attempt before theirs has begun to train in
//! the output directory.
//!
//! A launch is known by who starts its workers. Its identifier is no name: `--run-id` and `--rdzv-id` are
//! often the same every night. Nor are the nodes asked one by one: torchrun counts restarts on each for
//! itself, and another node may have rank 0 the next time. So the ranks say it together, and rank 0 judges.

use std::path::{Path, PathBuf};

use rr_launch::contract::{WorkerEnv, vars};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::output::RUNS;
use crate::atomic::{remove_file, write_synced};
use crate::comm::{Communicator, Reduction, reduce_values};
use crate::config::Plan;
use crate::error::Result;

/// Names, inside the directory of logs, the launch whose run was the last to begin here.
const MARK: &str = ".launch";

/// This start of a run: what it is to do, with how many workers, and in which launch.
pub(super) struct Attempt<'a> {
    pub(super) plan: &'a Plan,
    pub(super) world_size: usize,
    /// Of these, the workers on this machine.
    pub(super) local_world_size: usize,
    pub(super) launch: Launch,
}

impl<'a> Attempt<'a> {
    /// As all ranks know it, which call this together.
    ///
    /// # Errors
    /// [`crate::Error::Comm`] from `comm`.
    pub(super) fn meet(plan: &'a Plan, env: &WorkerEnv, comm: &dyn Communicator) -> Result<Self> {
        let world_size = comm.world_size();
        // Whoever started each rank, and restarts behind them all.
        let mut said = vec![-1.0; world_size + 1];
        said[comm.rank()] = starter(env).map_or(-1.0, f64::from);
        said[world_size] = f64::from(env.restart_count);
        reduce_values(comm, &mut said, Reduction::Max)?;
        let is_restart = said.pop() > Some(0.0);
        let starters = said.into_iter().filter(|&starter| starter >= 0.0);
        let starters = starters.map(|starter| starter as u32).collect();
        let launch = Launch::new(plan, env, starters, is_restart);
        Ok(Self { plan, world_size, local_world_size: env.local_world_size, launch })
    }

    /// As this process knows it by itself.
    pub(super) fn alone(plan: &'a Plan, world_size: usize, local_world_size: usize) -> Self {
        Self { plan, world_size, local_world_size, launch: Launch::alone(plan) }
    }
}

/// What an output directory keeps of a launch.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Mark {
    /// What the user or the launcher has called it.
    id: String,
    /// What its checkpoints say.
    name: String,
    /// Checksums of those who started the workers of its last attempt.
    starters: Vec<u32>,
}

impl Mark {
    fn path(plan: &Plan) -> PathBuf {
        plan.saving.output_dir.join(RUNS).join(MARK)
    }

    fn read(plan: &Plan) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(Self::path(plan)).ok()?).ok()
    }
}

/// The launch of an attempt.
#[derive(Debug, Clone)]
pub(super) struct Launch {
    /// None where nobody says who has started the workers.
    mark: Option<Mark>,
    /// Whether an earlier attempt of it has begun to train in the output directory.
    pub(super) has_begun: bool,
}

impl Launch {
    fn new(plan: &Plan, env: &WorkerEnv, starters: Vec<u32>, is_restart: bool) -> Self {
        let (Some(id), Some(first)) = (id(env), starters.first()) else {
            return Self { mark: None, has_begun: false };
        };
        let is_own = |mark: &Mark| mark.starters.iter().any(|one| starters.contains(one));
        let before = Mark::read(plan).filter(|mark| is_restart && is_own(mark));
        let has_begun = before.is_some();
        let name = before.map_or_else(|| format!("{id} {first:08x}"), |mark| mark.name);
        let mut starters = starters;
        starters.sort_unstable();
        starters.dedup();
        Self { mark: Some(Mark { id: id.to_owned(), name, starters }), has_begun }
    }

    /// As this process knows it by itself.
    pub(super) fn alone(plan: &Plan) -> Self {
        let Ok(env) = WorkerEnv::from_env() else { return Self { mark: None, has_begun: false } };
        Self::new(plan, &env, starter(&env).into_iter().collect(), env.restart_count > 0)
    }

    /// What checkpoints say of it, null where nobody has started the workers.
    pub(super) fn name(&self) -> Value {
        self.mark.as_ref().map_or(Value::Null, |mark| json!(mark.name))
    }

    /// Notes that an attempt of it begins to train.
    ///
    /// # Errors
    /// [`crate::Error::Io`] when that cannot be written.
    pub(super) fn note(&self, plan: &Plan) -> Result<()> {
        let path = Mark::path(plan);
        match &self.mark {
            Some(mark) => write_synced(&path, json!(mark).to_string().as_bytes()),
            None if path.exists() => remove_file(&path),
            None => Ok(()),
        }
    }
}

/// Whether the ranks may find, once they have met, that their launch has begun here before.
pub(super) fn may_have_begun(plan: &Plan, env: &WorkerEnv) -> bool {
    Mark::read(plan).is_some_and(|mark| Some(&*mark.id) == id(env))
}

/// What a launch is called.
pub(super) fn id(env: &WorkerEnv) -> Option<&str> {
    env.run_id.as_deref().filter(|id| !id.is_empty())
}

/// A checksum of who has started this worker and will start it again: the same over all attempts of a
/// launch, and another in every other launch.
fn starter(env: &WorkerEnv) -> Option<u32> {
    let id = id(env)?;
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let starter = variable(vars::RR_LAUNCHER)
        .or_else(|| torchrun_dir(Path::new(&variable(vars::TORCHELASTIC_ERROR_FILE)?)))
        .unwrap_or_else(parent);
    Some(crc32fast::hash(format!("{id} {starter}").as_bytes()))
}

/// The directory that torchrun makes on each node for a launch, with a random part in its name: what is
/// around `attempt_0/1/error.json`. Other than its process it is seen through scripts and containers that
/// stand between.
fn torchrun_dir(error_file: &Path) -> Option<String> {
    let is_attempt = |path: &&Path| {
        path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("attempt_"))
    };
    Some(error_file.ancestors().find(is_attempt)?.parent()?.display().to_string())
}

/// The process that has started this one, and when it began itself: numbers are given again, and in
/// containers always the same.
fn parent() -> String {
    let id = std::os::unix::process::parent_id();
    let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
    // Field 22, counted from behind the second one, a name that may hold anything.
    let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
    format!("{id} {}", fields.nth(19).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launch_of_torchrun_is_known_by_its_directory() {
        let of = |file: &str| torchrun_dir(Path::new(file));
        let dir = Some("/tmp/torchelastic_ab/none_cd".to_owned());
        assert_eq!(of("/tmp/torchelastic_ab/none_cd/attempt_0/1/error.json"), dir);
        assert_eq!(of("/tmp/torchelastic_ab/none_cd/attempt_3/0/error.json"), dir);
        assert_eq!(of("/tmp/error.json"), None);
    }

    #[test]
    fn a_parent_has_a_beginning() {
        let parent = parent();
        let [id, began] = parent.split(' ').collect::<Vec<_>>()[..] else { panic!("{parent}") };
        assert!(id.parse::<u32>().is_ok() && began.parse::<u64>().is_ok(), "{parent}");
    }
}
