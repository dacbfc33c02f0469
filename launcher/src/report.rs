//! What the launcher says at the end of an attempt: a pure function of its record.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::contract::error_file::WorkerError;
use crate::lifecycle::{Cause, Exit};
use crate::restarts::Verdict;
use crate::summary::{AttemptRecord, RankRecord};
use crate::sys;

/// Records of two ranks that are nearer than this say nothing about which was first: the times are
/// counted from the start of each, and one rank starts a little after the other.
const SAME_MOMENT: Duration = Duration::from_millis(50);

/// Why an attempt ended (on another node too: then `told` says it), how the ranks of this one that
/// are not to blame ended, and what follows; nothing where all is well.
pub fn lines(
    record: &AttemptRecord,
    told: Option<&[String]>,
    verdict: Verdict,
    max_restarts: u32,
) -> Vec<String> {
    let Some(cause) = record.cause else { return Vec::new() };
    let mut lines = told.map_or_else(|| reason(record), <[String]>::to_vec);
    if matches!(cause, Cause::Failure { .. } | Cause::Hang { .. }) {
        if told.is_some() && matches!(cause, Cause::Hang { .. }) {
            lines.extend(reason(record));
        }
        lines.extend(others(record, |rank| Some(rank.rank) != cause.rank()));
    }
    // Where no rank has saved it goes without saying.
    let any_saved = record.ranks.iter().any(|rank| rank.exit == Some(Exit::PREEMPTED));
    if matches!(cause, Cause::Preempted { .. }) && (any_saved || told.is_some()) {
        lines.extend(others(record, |rank| !is_done_or_saved(rank)));
    }
    match verdict {
        Verdict::End => {}
        Verdict::Restart(number) => {
            let all = workers(record.ranks.len());
            lines.push(format!("restarting {all} (restart {number} of {max_restarts})"));
        }
        Verdict::Exhausted => {
            lines.push(format!("no restart: --max-restarts {max_restarts} is used up"));
        }
        Verdict::NoProgress => lines.push(
            "no restart: the last 3 came no further; starting again would end the same way"
                .to_owned(),
        ),
        Verdict::CalledOff(by) => lines.push(format!("no restart: {}", brief(by))),
    }
    lines
}

/// Why an attempt ended, in this node's words: with the last lines of the rank to blame, where that is
/// one of its own.
pub fn reason(record: &AttemptRecord) -> Vec<String> {
    match record.cause {
        Some(Cause::Failure { rank, .. } | Cause::Hang { rank: Some(rank) }) => blame(record, rank),
        Some(cause @ Cause::Preempted { .. }) => {
            let saved = record.ranks.iter().any(|rank| rank.exit == Some(Exit::PREEMPTED));
            let all = record.ranks.iter().all(is_done_or_saved);
            let saved = match (saved, all) {
                (true, true) => Saved::Fully,
                (true, false) => Saved::Partly,
                (false, _) => Saved::Nothing,
            };
            vec![preempted(cause, &saved)]
        }
        Some(Cause::Hang { rank: None }) | None => Vec::new(),
        Some(cause) => vec![brief(cause)],
    }
}

/// What workers that were asked to save have saved.
pub enum Saved {
    /// A checkpoint.
    Fully,
    /// Some were ended before they were done.
    Partly,
    /// Nothing.
    Nothing,
}

/// A request to save, and what came of it.
pub fn preempted(cause: Cause, saved: &Saved) -> String {
    let what = match saved {
        Saved::Fully => "saved a checkpoint",
        Saved::Partly => "not all workers have saved",
        Saved::Nothing => "no worker saved",
    };
    format!("{}; {what}", brief(cause))
}

fn is_done_or_saved(rank: &RankRecord) -> bool {
    [Some(Exit::Code(0)), Some(Exit::PREEMPTED)].contains(&rank.exit)
}

/// A cause in a few words.
pub fn brief(cause: Cause) -> String {
    match cause {
        Cause::Failure { rank, exit } => format!("rank {rank} {exit}"),
        Cause::Hang { .. } => "no progress".to_owned(),
        Cause::Signal(signal) => format!("ended by {}", sys::signal_name(signal)),
        Cause::Preempted { signal } => {
            let by = signal.map_or(String::new(), |s| format!(" by {}", sys::signal_name(s)));
            format!("preempted{by}")
        }
        Cause::OutputClosed => "ended because nobody reads the output any more".to_owned(),
        Cause::NodeLost { node } => format!("node {node} is lost"),
        Cause::LauncherFailed { code } => {
            format!("its launcher cannot go on: exit code {code}; see its output")
        }
    }
}

/// "1 worker", "2 workers".
pub fn workers(count: usize) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} worker{plural}")
}

/// The rank to blame, its last lines, and who was done before.
fn blame(record: &AttemptRecord, rank: usize) -> Vec<String> {
    let Some(worker) = record.ranks.iter().find(|worker| worker.rank == rank) else {
        return Vec::new();
    };
    let (Some(exit), Some(after)) = (worker.exit, worker.elapsed) else { return Vec::new() };
    let ending = match &worker.log {
        _ if worker.last_lines.is_empty() => "it wrote nothing".to_owned(),
        Some(log) => format!("its last lines (all are in {}):", log.display()),
        None => "its last lines:".to_owned(),
    };
    let reason =
        if worker.oom_killed { ": the kernel's out-of-memory killer ended it" } else { "" };
    let (pid, seconds) = (worker.pid, after.as_secs_f64());
    let mut lines =
        vec![format!("rank {rank} (pid {pid}) {exit}{reason} after {seconds:.1} s; {ending}")];
    lines.extend(worker.last_lines.iter().map(|line| format!("| {line}")));
    lines.extend(worker.error.iter().map(|error| {
        format!("rank {rank} recorded, {}: {}", after_start(error), error.headline())
    }));
    lines.extend(failed_before(record, worker, after));
    let is_done =
        |other: &&RankRecord| other.exit == Some(Exit::Code(0)) && other.elapsed < worker.elapsed;
    let done: Vec<usize> = record.ranks.iter().filter(is_done).map(|other| other.rank).collect();
    if !done.is_empty() {
        lines.push(format!("before that, with code 0, ended rank {}", ranges(&done)));
    }
    lines
}

/// The rank whose exception was recorded first, if that was clearly before the rank to blame recorded
/// one, or ended: a rank may wait in an exit handler for peers that fail over its silence.
fn failed_before(record: &AttemptRecord, blamed: &RankRecord, ended: Duration) -> Option<String> {
    let its_time = blamed.error.as_ref().map_or(ended, |error| error.after);
    let errors = record.ranks.iter().filter_map(|rank| Some((rank, rank.error.as_ref()?)));
    let (first, error) = errors.min_by_key(|(_, error)| error.after)?;
    (error.after + SAME_MOMENT < its_time).then(|| {
        let (rank, when, text) = (first.rank, after_start(error), error.headline());
        format!("before that, {when}, rank {rank} recorded an exception: {text}")
    })
}

fn after_start(error: &WorkerError) -> String {
    format!("{:.1} s after its start", error.after.as_secs_f64())
}

/// How the ranks that `are_meant` ended, a line for each way: `ranks 0, 2-7 were killed by
/// SIGTERM`.
fn others(record: &AttemptRecord, are_meant: impl Fn(&RankRecord) -> bool) -> Vec<String> {
    let mut ways: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for other in record.ranks.iter().filter(|rank| are_meant(rank)) {
        let way = other.exit.map_or("could not be killed".to_owned(), |exit| exit.to_string());
        let way = if other.oom_killed { format!("{way}, out of memory") } else { way };
        ways.entry(way).or_default().push(other.rank);
    }
    let line = |(way, ranks): (String, Vec<usize>)| match ranks.as_slice() {
        [rank] => format!("rank {rank} {way}"),
        _ => format!("ranks {} {}", ranges(&ranks), way.replacen("was ", "were ", 1)),
    };
    ways.into_iter().map(line).collect()
}

/// `0, 2-4, 9`: numbers in order, neighbours drawn together.
pub fn ranges(ranks: &[usize]) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for &rank in ranks {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == rank => *last = rank,
            _ => runs.push((rank, rank)),
        }
    }
    let text = |&(first, last): &(usize, usize)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    };
    runs.iter().map(text).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(cause: Cause, exits: &[Exit]) -> AttemptRecord {
        let rank = |(rank, &exit): (usize, &Exit)| RankRecord {
            rank,
            pid: 100,
            exit: Some(exit),
            oom_killed: false,
            elapsed: Some(Duration::from_secs(if exit == Exit::Code(0) { 1 } else { 2 })),
            step: Some(3),
            phase: None,
            log: None,
            stacks: None,
            error: None,
            last_lines: vec!["x".to_owned()],
        };
        AttemptRecord {
            restart: 0,
            cause: Some(cause),
            elapsed: Duration::from_secs(2),
            ranks: exits.iter().enumerate().map(rank).collect(),
        }
    }

    #[test]
    fn ranks_that_ended_alike_share_a_line() {
        let term = Exit::Signal(libc::SIGTERM);
        let cause = Cause::Failure { rank: 1, exit: Exit::Code(3) };
        let attempt = record(cause, &[term, Exit::Code(3), term, term, Exit::Code(0)]);
        assert_eq!(
            lines(&attempt, None, Verdict::Restart(1), 2),
            [
                "rank 1 (pid 100) exited with code 3 after 2.0 s; its last lines:",
                "| x",
                "before that, with code 0, ended rank 4",
                "rank 4 exited with code 0",
                "ranks 0, 2-3 were killed by SIGTERM (exit code 143)",
                "restarting 5 workers (restart 1 of 2)",
            ]
        );
        let called_off = lines(&attempt, None, Verdict::CalledOff(Cause::Signal(15)), 2);
        assert_eq!(called_off[5], "no restart: ended by SIGTERM");
        let hang = record(Cause::Hang { rank: None }, &[term, term]);
        let expected = ["ranks 0-1 were killed by SIGTERM (exit code 143)"];
        assert_eq!(lines(&hang, None, Verdict::End, 0), expected);
    }

    #[test]
    fn an_exception_recorded_before_the_first_end_is_told() {
        let (failed, cause) = (Exit::Code(1), Cause::Failure { rank: 1, exit: Exit::Code(1) });
        let mut attempt = record(cause, &[failed, failed]);
        let error = |text: &str, millis| {
            let (message, after) = (text.to_owned(), Duration::from_millis(millis));
            Some(WorkerError { message, traceback: None, after })
        };
        attempt.ranks[1].error = error("RuntimeError: peer gone\nframe", 1900);
        attempt.ranks[0].error = error("ValueError: bad", 1880);
        let said = |attempt: &AttemptRecord| lines(attempt, None, Verdict::End, 0)[2..].to_vec();
        let own = "rank 1 recorded, 1.9 s after its start: RuntimeError: peer gone";
        let other = "rank 0 exited with code 1";
        assert_eq!(said(&attempt), [own, other], "20 ms apart");
        attempt.ranks[0].error = error("ValueError: bad", 900);
        let before =
            "before that, 0.9 s after its start, rank 0 recorded an exception: ValueError: bad";
        assert_eq!(said(&attempt), [own, before, other]);
        attempt.ranks[1].error = None;
        assert_eq!(said(&attempt), [before, other], "compared with its end");
    }

    #[test]
    fn what_another_node_has_told_comes_first() {
        let term = Exit::Signal(libc::SIGTERM);
        let cause = Cause::Failure { rank: 7, exit: Exit::Code(3) };
        let told = ["node 1 (b): rank 7 exited with code 3".to_owned(), "| x".to_owned()];
        assert_eq!(
            lines(&record(cause, &[term, term]), Some(&told), Verdict::End, 0),
            [&told[0], &told[1], "ranks 0-1 were killed by SIGTERM (exit code 143)"]
        );
        let lost = record(Cause::NodeLost { node: 1 }, &[term]);
        let told = ["node 1 (b) is lost".to_owned()];
        assert_eq!(lines(&lost, Some(&told), Verdict::End, 0), told);
    }

    #[test]
    fn a_victim_of_the_out_of_memory_killer_is_called_so() {
        let killed = Exit::Signal(libc::SIGKILL);
        let mut attempt = record(Cause::Failure { rank: 0, exit: killed }, &[killed]);
        attempt.ranks[0].oom_killed = true;
        let said = lines(&attempt, None, Verdict::Exhausted, 2);
        assert!(said[0].contains("(exit code 137): the kernel's out-of-memory killer"), "{said:?}");
        assert_eq!(
            said.last().map(String::as_str),
            Some("no restart: --max-restarts 2 is used up")
        );
    }

    #[test]
    fn a_preemption_says_whether_a_checkpoint_was_saved() {
        let cause = Cause::Preempted { signal: Some(libc::SIGUSR1) };
        let saved = record(cause, &[Exit::PREEMPTED, Exit::PREEMPTED]);
        let expected = ["preempted by SIGUSR1; saved a checkpoint"];
        assert_eq!(lines(&saved, None, Verdict::End, 0), expected);
        let killed = Exit::Signal(libc::SIGKILL);
        let partly = record(cause, &[Exit::PREEMPTED, killed, Exit::Code(0), killed]);
        let expected = [
            "preempted by SIGUSR1; not all workers have saved",
            "ranks 1, 3 were killed by SIGKILL (exit code 137)",
        ];
        assert_eq!(lines(&partly, None, Verdict::End, 0), expected);
        let lost = record(cause, &[killed]);
        assert_eq!(lines(&lost, None, Verdict::End, 0), ["preempted by SIGUSR1; no worker saved"]);
    }
}
