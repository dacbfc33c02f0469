//! `reranker score`: from arguments to the job.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use rr_launch::contract::WorkerEnv;

use super::commands::heed_preemption;
use super::model::ModelArgs;
use super::output::{STANDARD, Sink, is_same_file};
use crate::atomic::whole_file;
use crate::comm::{Communicator, Solo, join_hosts};
use crate::convert::Compression;
use crate::data::{InputChunks, InputFormat};
use crate::error::{Error, Result, tell};
use crate::score::{CrossEncoder, Earlier, FileJob, Progress, score_stream};

/// The least time between two drawings of the status line.
const REDRAW: Duration = Duration::from_millis(200);

/// Arguments of `score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Model directory or hub id
    #[arg(long, value_name = "MODEL")]
    model: PathBuf,
    /// Pairs to score, `-` for standard input: TSV, or JSON lines with query and content, hits, or
    /// pos and neg
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Form of the input; by default from its name, JSON lines where that does not say
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Where the scores go, `-` for standard output: a JSON line for each pair, in order. A file
    /// appears whole, and the same command goes on where a killed one was; not so one that is
    /// compressed, by its name in .gz or .zst
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Repeat the texts in the output
    #[arg(long)]
    echo: bool,
    #[command(flatten)]
    options: ModelArgs,
}

/// The forms of scoring input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FormatArg {
    /// {"query": …, "content": …} a line, or a record of several documents
    Jsonl,
    /// query, a tab, content
    Tsv,
}

/// Scores pairs: from a file to a plain file by any number of ranks so that it can go on after a kill,
/// and otherwise as a stream.
///
/// # Errors
/// What reading, scoring or writing reports.
pub(super) fn run(args: &ScoreArgs) -> Result<()> {
    let env = WorkerEnv::from_env().map_err(|error| Error::Usage(error.to_string()))?;
    let format = match args.format {
        Some(FormatArg::Tsv) => InputFormat::Tsv,
        None if is_tsv(&args.input) => InputFormat::Tsv,
        Some(FormatArg::Jsonl) | None => InputFormat::JsonLines,
    };
    let named = |path: &Path| (path != Path::new(STANDARD)).then(|| path.to_owned());
    let (input, output) = (named(&args.input).filter(|path| path.is_file()), named(&args.output));
    if input.as_ref().is_some_and(|input| is_same_file(&args.output, input)) {
        return Err(Error::Usage(format!(
            "--output {} is the input, which scores would replace; name another file",
            args.output.display()
        )));
    }
    let plain = output.filter(|output| Compression::of(output).is_none());
    if let (Some(input), Some(output)) = (input, plain.and_then(|output| whole_file(&output))) {
        let job = FileJob { input, format, output, echo: args.echo };
        return score_file(args, &env, &job);
    }
    if env.world_size > 1 {
        return Err(Error::Usage(format!(
            "{} workers share a file of pairs and write one file of scores: give both --input FILE \
             and --output FILE, without .gz or .zst",
            env.world_size
        )));
    }
    let chunks = if args.input == Path::new(STANDARD) {
        InputChunks::from_reader(io::stdin(), "<stdin>", format)?
    } else {
        InputChunks::open(&args.input, format)?
    };
    ModelArgs::settle([&args.model], &env, &Solo)?;
    let model = args.options.load(&args.model, &env)?;
    let mut sink = Sink::open(&args.output)?;
    score_stream(&model, chunks, &args.options.score_options(), args.echo, |scored| {
        sink.line(&serde_json::to_string(scored).unwrap_or_default())
    })?;
    sink.finish()
}

fn score_file(args: &ScoreArgs, env: &WorkerEnv, job: &FileJob) -> Result<()> {
    let parent = job.output.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(Err(source)) = parent.map(Path::metadata) {
        return Err(Error::Io { path: job.output.clone(), action: "create", source });
    }
    heed_preemption()?;
    let comm = join_hosts(env, args.options.timeout)?;
    let outcome = score_ranks(args, env, job, comm.as_ref());
    if outcome.is_err() {
        // The others, who may fail for want of this rank, must not be taken for the cause.
        std::mem::forget(comm);
    }
    outcome
}

fn score_ranks(
    args: &ScoreArgs,
    env: &WorkerEnv,
    job: &FileJob,
    comm: &dyn Communicator,
) -> Result<()> {
    let checked = job.check(comm)?;
    ModelArgs::settle([&args.model], env, comm)?;
    let model: CrossEncoder = args.options.load(&args.model, env)?;
    let options = args.options.score_options();
    let (store, earlier) = job.open(&model, checked, &options, comm)?;
    let kept = match earlier {
        Earlier::Scores(scores) => scores,
        Earlier::Nothing => 0,
        Earlier::OtherJob(keys) => {
            if env.rank == 0 {
                tell(format_args!(
                    "note: {} held scores of another job ({} differs), so all is scored anew",
                    store.dir().display(),
                    keys.join(", ")
                ));
            }
            0
        }
    };
    let mut status = Status::new(env);
    let report = |progress| status.draw(progress);
    let pairs = job.run(&model, store, checked.chunks, &options, report)?;
    if let Some(pairs) = pairs {
        let scored = pairs - kept;
        let rate = scored as f64 / status.started.elapsed().as_secs_f64().max(1e-9);
        let kept = if kept > 0 { format!(", {kept} of them before") } else { String::new() };
        status.clear();
        tell(format_args!(
            "{}: {pairs} pairs scored{kept}; {rate:.1} pairs/s",
            args.output.display()
        ));
    }
    Ok(())
}

/// A line on rank 0's terminal that is drawn over itself.
struct Status {
    started: Instant,
    drawn: Instant,
    ranks: usize,
    /// What ends the line: on a terminal the rest is cleared, the launcher does it by itself. None
    /// where nothing is drawn.
    end: Option<&'static str>,
}

impl Status {
    fn new(env: &WorkerEnv) -> Self {
        let end = match (io::stderr().is_terminal(), env.progress) {
            _ if env.rank != 0 => None,
            (true, _) => Some("\x1b[K\r"),
            (false, true) => Some("\r"),
            (false, false) => None,
        };
        let now = Instant::now();
        Self { started: now, drawn: now, ranks: env.world_size, end }
    }

    fn draw(&mut self, Progress { due, done, pairs }: Progress) {
        let Some(end) = self.end.filter(|_| self.drawn.elapsed() >= REDRAW) else { return };
        self.drawn = Instant::now();
        let elapsed = self.started.elapsed().as_secs_f64();
        // Ranks have like parts.
        let rate = pairs as f64 * self.ranks as f64 / elapsed.max(1e-9);
        let left = (elapsed * (due - done) as f64 / done.max(1) as f64) as u64;
        let (percent, minutes, seconds) = (100 * done / due.max(1), left / 60, left % 60);
        let text = format!("scored {percent}%  {rate:.1} pairs/s  {minutes}:{seconds:02} left");
        // Whoever closed stderr does not want to see it.
        let _ = io::stderr().write_all(format!("{text}{end}").as_bytes());
    }

    fn clear(&self) {
        if self.end == Some("\x1b[K\r") {
            let _ = io::stderr().write_all(b"\x1b[2K");
        }
    }
}

/// `pairs.tsv`, `pairs.tsv.gz` and the like.
fn is_tsv(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').skip(1).any(|part| part.eq_ignore_ascii_case("tsv"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tsv_by_name() {
        for (name, expected) in [
            ("pairs.tsv", true),
            ("a/pairs.TSV.gz", true),
            ("pairs.jsonl", false),
            ("tsv", false),
            ("-", false),
        ] {
            assert_eq!(is_tsv(Path::new(name)), expected, "{name}");
        }
    }
}
