//! From parsed arguments to jobs.

use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};

use rr_launch::contract::{LaunchPlan, WorkerEnv};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::time::ChronoUtc;

use super::{
    CheckArgs, Cli, Command, ConvertArgs, DeviceArg, EvalArgs, FormatArg, ModelArgs, PlanArgs,
    ScoreArgs,
};
use crate::config::LabelRange;
use crate::convert::{self, ConvertOptions, Output};
use crate::data::{InputFormat, InputPair, InputPairs, SourceRecords};
use crate::error::{Error, Result};
use crate::score::{CrossEncoder, ScoreOptions, score_stream};
use crate::torch_ext::runtime;
use crate::{eval, train};

/// Does what the command line asks for.
///
/// # Errors
/// What the job reports; [`Error::exit_code`] tells the process's exit code.
pub fn run(cli: &Cli) -> Result<()> {
    match &cli.command {
        Command::Train(args) => train(args),
        Command::Check(args) => check(args),
        Command::Score(args) => score(args),
        Command::Eval(args) => evaluate(args),
        Command::Convert(args) => convert(args),
    }
}

fn train(args: &PlanArgs) -> Result<()> {
    let env = WorkerEnv::from_env().map_err(|error| Error::Usage(error.to_string()))?;
    start_log(env.rank);
    // Every line of this worker carries its rank, also those of its libraries.
    let _rank = tracing::info_span!("worker", rank = env.rank).entered();
    train::run(&args.plan(Some(env.world_size), args.device)?, &env)
}

/// Rank 0 tells what happens; the others only what is wrong. `RUST_LOG` decides otherwise.
fn start_log(rank: usize) {
    let default = if rank == 0 { "info" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_timer(ChronoUtc::new("%FT%TZ".to_owned()))
        .with_writer(|| LogLine(io::stderr()))
        .with_target(false)
        .with_ansi(false)
        .init();
}

/// Log lines on stderr. On a terminal each first clears what a status line left there.
struct LogLine(io::Stderr);

impl Write for LogLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.0.is_terminal() {
            self.0.write_all(b"\x1b[2K")?;
        }
        self.0.write_all(line)?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn check(args: &CheckArgs) -> Result<()> {
    start_log(0);
    let device = args.gpus.map(|_| DeviceArg::Cuda).or(args.plan.device);
    let plan = args.plan.plan(args.gpus.or(args.nproc), device)?;
    train::check_output(&plan)?;
    let workers = plan.parallel.processes.unwrap_or(1);
    if args.for_launch {
        // rr-launch starts the workers of one machine.
        train::check_machines(&plan, workers, workers)?;
    }
    let inputs = train::Inputs::load(&plan, workers)?;
    train::check_resume(&plan, &inputs, workers)?;
    train::check_trackers(&plan)?;
    if args.for_launch {
        let launch = LaunchPlan {
            processes: plan.parallel.processes,
            device: plan.parallel.device.map(|device| device.to_string()),
            gpu_ids: plan.parallel.gpu_ids.clone(),
            text: plan.describe(),
        };
        return print(&serde_json::to_string(&launch).unwrap_or_default());
    }
    let mut lines = vec![plan.describe().trim_end().to_owned()];
    lines.extend(plan.notices.iter().map(|notice| format!("note: {notice}")));
    lines.push(inputs.describe(&plan, workers)?);
    print(&lines.join("\n"))
}

/// The model, once options that cannot work are refused: before any output is opened.
fn load_model(dir: &Path, args: &ModelArgs) -> Result<CrossEncoder> {
    if args.batch_size == 0 {
        return Err(Error::Usage("--batch-size is 0, expected at least 1".into()));
    }
    let device = runtime::device(args.device.map(Into::into), 0)?;
    let model = CrossEncoder::with_prompt(dir, device, args.prompt.as_deref())?;
    model.checked_max_len(args.max_len)?;
    if let Some(prompt) = model.assumed_prompt() {
        eprintln!(
            "note: {} is a language model without a score head; asked by the prompt {} (--prompt)",
            dir.display(),
            prompt.name
        );
    }
    if !model.initialised().is_empty() {
        eprintln!(
            "note: {} has no {}; random values stand in, so its scores mean nothing yet",
            dir.display(),
            model.initialised().join(", ")
        );
    }
    Ok(model)
}

impl ModelArgs {
    fn score_options(&self) -> ScoreOptions {
        ScoreOptions { batch_size: self.batch_size, max_len: self.max_len, normalize: true }
    }
}

fn score(args: &ScoreArgs) -> Result<()> {
    let format = match args.format {
        Some(FormatArg::Tsv) => InputFormat::Tsv,
        None if is_tsv(&args.input) => InputFormat::Tsv,
        Some(FormatArg::Jsonl) | None => InputFormat::JsonLines,
    };
    let pairs: Box<dyn Iterator<Item = Result<InputPair>> + Send> = if args.input == Path::new("-")
    {
        let stdin: Box<dyn BufRead + Send> = Box::new(BufReader::new(io::stdin()));
        Box::new(InputPairs::new(stdin, "<stdin>", format))
    } else {
        Box::new(InputPairs::open(&args.input, format)?)
    };
    let model = load_model(&args.model, &args.options)?;
    let mut sink = Sink::open(&args.output)?;
    score_stream(&model, pairs, &args.options.score_options(), args.echo, |scored| {
        let line = serde_json::to_string(scored).unwrap_or_default();
        sink.line(&line)
    })?;
    sink.flush()
}

/// `pairs.tsv`, `pairs.tsv.gz` and the like.
fn is_tsv(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.split('.').skip(1).any(|part| part.eq_ignore_ascii_case("tsv"))
}

fn evaluate(args: &EvalArgs) -> Result<()> {
    let dataset = eval::load(&args.data, &args.label_key)?;
    let model = args.model.as_deref().map(|dir| load_model(dir, &args.options)).transpose()?;
    let options = args.options.score_options();
    let evaluation = eval::evaluate(model.as_ref(), &dataset, &options, args.bm25)?;
    if args.json { print(&evaluation.to_json().to_string()) } else { print(&evaluation.table()) }
}

fn convert(args: &ConvertArgs) -> Result<()> {
    let form = match (&args.merge, args.to) {
        (Some(adapter), _) => return merge(adapter, &args.output),
        (None, Some(form)) => form,
        (None, None) => return Err(Error::Usage("--to or --merge is missing".into())),
    };
    let labels = LabelRange { min: args.min_label, max: args.max_label };
    if labels.min >= labels.max || !(labels.max - labels.min).is_finite() {
        return Err(Error::Usage(format!(
            "--max-label is {} and --min-label {}, expected --max-label above --min-label",
            labels.max, labels.min
        )));
    }
    let options = ConvertOptions {
        to: form.into(),
        label_key: args.label_key.clone(),
        labels,
        positive_from: args.positive_from,
        gather: args.gather,
        lossy: args.lossy,
    };
    let records = if args.input == Path::new("-") {
        let name = Path::new("<stdin>");
        SourceRecords::from_reader(io::stdin(), name, &args.label_key, labels)?
    } else {
        SourceRecords::open(&args.input, &args.label_key, labels)?
    };
    let mut output = Output::create(&args.output)?;
    let report = convert::convert(records, &options, &mut |line| output.line(line));
    let done = report.and_then(|report| output.finish().map(|()| report));
    match done {
        // `| head` has seen enough: a good end.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(error),
        Ok(report) => {
            eprintln!("{report}");
            Ok(())
        }
    }
}

/// An adapter and its base model to one model directory.
fn merge(adapter: &str, target: &Path) -> Result<()> {
    if target == Path::new("-") {
        return Err(Error::Usage("--merge writes a directory; name it by --output".into()));
    }
    let base = convert::merge(adapter, target)?;
    eprintln!("merged {adapter} into {base}: {}", target.display());
    Ok(())
}

/// Where result lines go.
struct Sink {
    path: PathBuf,
    out: Box<dyn Write>,
}

impl Sink {
    fn open(path: &Path) -> Result<Self> {
        let out: Box<dyn Write> = if path == Path::new("-") {
            Box::new(BufWriter::new(io::stdout().lock()))
        } else {
            let file = File::create(path).map_err(|source| Error::Io {
                path: path.to_owned(),
                action: "create",
                source,
            })?;
            Box::new(BufWriter::new(file))
        };
        Ok(Self { path: path.to_owned(), out })
    }

    fn line(&mut self, line: &str) -> Result<()> {
        let written = writeln!(self.out, "{line}");
        self.done(written)
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = self.out.flush();
        self.done(flushed)
    }

    fn done(&self, result: io::Result<()>) -> Result<()> {
        match result {
            // `| head` has seen enough: a good end.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
            result => result.map_err(|source| Error::Io {
                path: self.path.clone(),
                action: "write",
                source,
            }),
        }
    }
}

fn print(text: &str) -> Result<()> {
    let mut sink = Sink::open(Path::new("-"))?;
    sink.line(text.trim_end())?;
    sink.flush()
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

    #[test]
    fn a_plan_is_one_line_for_the_launcher() {
        let plan =
            LaunchPlan { processes: Some(2), device: None, gpu_ids: None, text: "a\nb".to_owned() };
        assert!(!serde_json::to_string(&plan).unwrap_or_default().contains('\n'));
    }
}
