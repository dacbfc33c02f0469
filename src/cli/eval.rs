//! `reranker eval`: from arguments to the job.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use rr_launch::contract::WorkerEnv;
use serde_json::Value;

use super::model::ModelArgs;
use super::output::{STANDARD, is_same_file, print, write};
use crate::comm::{Communicator, join_hosts};
use crate::convert::Output;
use crate::data::Dataset;
use crate::error::{Error, Result};
use crate::eval::{self, Evaluation, Measure, trec};
use crate::metrics::Gain;

/// Arguments of `eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// Model directory or hub id (repeatable: side by side)
    #[arg(long, value_name = "MODEL", required_unless_present_any = ["bm25", "run"])]
    model: Vec<PathBuf>,
    /// Grouped data, or pointwise data that is gathered by query
    #[arg(long, value_name = "FILE", required_unless_present = "run")]
    data: Option<PathBuf>,
    /// Key of the labels
    #[arg(long, value_name = "KEY", default_value = "label")]
    label_key: String,
    /// Rank by BM25 as well
    #[arg(long)]
    bm25: bool,
    /// A ranking in TREC's form, in place of models and data (repeatable)
    #[arg(long, value_name = "FILE", requires = "qrels",
          conflicts_with_all = ["model", "data", "label_key", "bm25", "write_run", "write_qrels"])]
    run: Vec<PathBuf>,
    /// Judgements in TREC's form, for --run
    #[arg(long, value_name = "FILE", requires = "run")]
    qrels: Option<PathBuf>,
    /// Count a judged query that a run lacks as 0, instead of leaving it out
    #[arg(long, requires = "run")]
    complete: bool,
    /// The cut-offs of nDCG, MRR and Recall
    #[arg(long, value_name = "K,K..", value_delimiter = ',', default_value = "10")]
    k: Vec<usize>,
    /// What a relevant document is worth to nDCG; by default linear for --run, else exponential
    #[arg(long, value_enum)]
    gain: Option<GainArg>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Also write the figures of every query, a JSON line each; `-` for standard output
    #[arg(long, value_name = "FILE")]
    per_query: Option<PathBuf>,
    /// Write the ranking, which has to be one, in TREC's form; `-` for standard output
    #[arg(long, value_name = "FILE")]
    write_run: Option<PathBuf>,
    /// Write the labels in TREC's form; `-` for standard output
    #[arg(long, value_name = "FILE")]
    write_qrels: Option<PathBuf>,
    #[command(flatten)]
    options: ModelArgs,
}

/// The gains of nDCG.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum GainArg {
    /// 2 to the power of the label, less 1
    Exponential,
    /// The label itself, as in TREC's own tool
    Linear,
}

/// Ranks and measures.
///
/// # Errors
/// What reading or scoring reports.
pub(super) fn run(args: &EvalArgs) -> Result<()> {
    let env = WorkerEnv::from_env().map_err(|error| Error::Usage(error.to_string()))?;
    if args.k.contains(&0) {
        return Err(Error::Usage("--k holds 0, expected whole numbers from 1".into()));
    }
    let rankings = args.model.len() + usize::from(args.bm25);
    if args.write_run.is_some() && rankings != 1 {
        return Err(Error::Usage(format!(
            "--write-run writes one ranking, but there are {rankings}; give one --model, or --bm25 \
             alone"
        )));
    }
    if let Some(name) = args.repeated() {
        return Err(Error::Usage(format!(
            "two rankings would be called {name}, expected a name of its own for each"
        )));
    }
    let standard = Path::new(STANDARD);
    if let Some((flag, _)) = args.inputs().find(|(_, path)| *path == standard) {
        return Err(Error::Usage(format!(
            "{flag} - is standard input, which eval does not read; name a file (./- where it is \
             called so)"
        )));
    }
    match (&args.data, &args.qrels) {
        (Some(data), _) => {
            let comm = join_hosts(&env, args.options.timeout)?;
            let outcome = models(args, &env, data, comm.as_ref()).and_then(|measured| {
                comm.leave()?;
                Ok(measured)
            });
            if outcome.is_err() {
                // The others, who may fail for want of this rank, must not be taken for the cause.
                std::mem::forget(comm);
            }
            report(args, &env, &outcome?)
        }
        (None, Some(qrels)) => {
            if env.rank != 0 {
                return Ok(());
            }
            args.check_outputs()?;
            let named = |path: &PathBuf| Ok((path.display().to_string(), trec::read_run(path)?));
            let runs = args.run.iter().map(named).collect::<Result<Vec<_>>>()?;
            let qrels = trec::read_qrels(qrels)?;
            let evaluation =
                trec::evaluate(&runs, &qrels, args.measure(Gain::Linear), args.complete)?;
            report(args, &env, &Measured { evaluation, run: None })
        }
        (None, None) => Err(Error::Usage("--data is missing".into())),
    }
}

/// What there is to report.
struct Measured {
    evaluation: Evaluation,
    /// The one ranking in TREC's form, where it is asked for.
    run: Option<String>,
}

/// BM25 and every model on grouped data, one after the other. What can be wrong with any of them, or
/// with where results go, is found before the first is run.
fn models(
    args: &EvalArgs,
    env: &WorkerEnv,
    data: &Path,
    comm: &dyn Communicator,
) -> Result<Measured> {
    if env.rank == 0 {
        args.check_outputs()?;
    }
    ModelArgs::settle(&args.model, env, comm)?;
    args.model.iter().try_for_each(|dir| args.options.examine(dir))?;
    let dataset = eval::load(data, &args.label_key)?;
    if let (Some(path), 0) = (&args.write_qrels, env.rank) {
        write(path, &trec::qrels_lines(&dataset)?)?;
    }
    let mut evaluation = Evaluation::new(args.measure(Gain::Exponential));
    let mut run = None;
    let mut add = |name: &str, dataset: &Dataset, scores: &[f32]| -> Result<()> {
        evaluation.push(eval::rank(evaluation.row(name), dataset, scores)?);
        run = args.write_run.as_ref().map(|_| trec::run_lines(dataset, scores, name));
        Ok(())
    };
    if args.bm25 {
        add("bm25", &dataset, &eval::bm25_scores(&dataset))?;
    }
    for dir in &args.model {
        let model = args.options.load(dir, env)?;
        let options = args.options.score_options();
        // One model needs no name; several are told apart by where they came from.
        let path = dir.display().to_string();
        let scores =
            eval::model_scores(&model, &dataset, &options, comm).map_err(|error| match error {
                Error::Training(reason) => Error::Training(format!("{path}: {reason}")),
                other => other,
            })?;
        add(if args.model.len() == 1 { "model" } else { &path }, &dataset, &scores)?;
    }
    Ok(Measured { evaluation, run })
}

impl EvalArgs {
    /// A name that two rankings would share, of which JSON could hold only one.
    fn repeated(&self) -> Option<std::path::Display<'_>> {
        let bm25 = self.bm25.then_some(Path::new("bm25"));
        let mut names = HashSet::new();
        let all = self.model.iter().chain(&self.run).map(PathBuf::as_path).chain(bm25);
        (self.model.len() + self.run.len() > 1)
            .then(|| all.into_iter().find(|name| !names.insert(*name)).map(Path::display))?
    }

    /// The files that are read, by their flags.
    fn inputs(&self) -> impl Iterator<Item = (&'static str, &PathBuf)> {
        let read = [("--data", &self.data), ("--qrels", &self.qrels)];
        let read = read.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?)));
        read.chain(self.run.iter().map(|path| ("--run", path)))
    }

    /// Whether results can be written where they are to go, which nothing is read from, nor other results
    /// written to.
    fn check_outputs(&self) -> Result<()> {
        let mut taken: Vec<_> = self.inputs().collect();
        let outputs = [
            ("--per-query", &self.per_query),
            ("--write-run", &self.write_run),
            ("--write-qrels", &self.write_qrels),
        ];
        for (flag, path) in
            outputs.into_iter().filter_map(|(flag, path)| Some((flag, path.as_ref()?)))
        {
            if let Some((other, _)) = taken.iter().find(|(_, other)| is_same_file(path, other)) {
                return Err(Error::Usage(format!(
                    "{flag} {} is the file of {other} too, which it would replace; name another file",
                    path.display()
                )));
            }
            Output::check(path)?;
            taken.push((flag, path));
        }
        Ok(())
    }

    fn measure(&self, default: Gain) -> Measure {
        let gain = match self.gain {
            None => default,
            Some(GainArg::Exponential) => Gain::Exponential,
            Some(GainArg::Linear) => Gain::Linear,
        };
        Measure { cutoffs: self.k.clone(), gain }
    }
}

/// Rank 0 prints and writes what was asked for. The figures come last on standard output, but before
/// any file: whatever becomes of that, they are not lost.
fn report(args: &EvalArgs, env: &WorkerEnv, measured: &Measured) -> Result<()> {
    if env.rank != 0 {
        return Ok(());
    }
    let Measured { evaluation, run } = measured;
    let lines = || evaluation.per_query().iter().map(Value::to_string).collect::<Vec<_>>();
    let per_query = args.per_query.as_ref().map(|_| lines().join("\n"));
    let outputs = [(&args.write_run, run), (&args.per_query, &per_query)];
    let outputs =
        outputs.into_iter().filter_map(|(path, text)| Some((path.as_ref()?, text.as_ref()?)));
    let (standard, files): (Vec<_>, Vec<_>) =
        outputs.partition(|(path, _)| *path == Path::new(STANDARD));
    standard.into_iter().try_for_each(|(path, text)| write(path, text))?;
    if args.json { print(&evaluation.to_json().to_string()) } else { print(&evaluation.table()) }?;
    files.into_iter().try_for_each(|(path, text)| write(path, text))
}
