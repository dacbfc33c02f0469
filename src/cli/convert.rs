//! `reranker convert`: from arguments to the job.

use std::io;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};

use super::output::STANDARD;
use crate::config::LabelRange;
use crate::convert::{ConvertOptions, Output, convert, merge};
use crate::data::{RecordForm, SourceRecords};
use crate::error::{Error, Result, tell};

/// Arguments of `convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Records of any form, plain, gzip or zstd; `-` for standard input
    #[arg(long, value_name = "FILE", default_value = "-")]
    input: PathBuf,
    /// Where the records go, compressed where the name ends in .gz or .zst; `-` for standard output
    #[arg(long, value_name = "FILE", default_value = "-")]
    output: PathBuf,
    /// Form of the output
    #[arg(long, value_enum, required_unless_present = "merge")]
    to: Option<RecordFormArg>,
    /// An adapter (directory or hub id) to merge into its base model; --output is the directory of
    /// the whole model, and data is left alone
    #[arg(long, value_name = "MODEL", requires = "output", conflicts_with_all = [
        "input", "to", "label_key", "max_label", "min_label", "positive_from", "gather", "lossy",
    ])]
    merge: Option<String>,
    /// Key of the labels
    #[arg(long, value_name = "KEY", default_value = "label")]
    label_key: String,
    /// Label of positives without scores
    #[arg(long, value_name = "LABEL", default_value_t = 1.0, allow_negative_numbers = true)]
    max_label: f64,
    /// Label of negatives without scores
    #[arg(long, value_name = "LABEL", default_value_t = 0.0, allow_negative_numbers = true)]
    min_label: f64,
    /// The least label of a positive, for pos/neg records of graded labels
    #[arg(long, value_name = "LABEL", allow_negative_numbers = true)]
    positive_from: Option<f64>,
    /// Gather pointwise records by query in memory; without it those of a query have to stand
    /// together
    #[arg(long)]
    gather: bool,
    /// Leave out what the output's form cannot hold, instead of stopping
    #[arg(long)]
    lossy: bool,
}

/// The forms of records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RecordFormArg {
    /// {"query", "content", "label"}: a document a line
    Pointwise,
    /// {"query", "hits": [{"content", "label"}]}: a query a line
    Grouped,
    /// {"query", "pos", "neg"}, with scores where labels need them
    Posneg,
}

impl From<RecordFormArg> for RecordForm {
    fn from(form: RecordFormArg) -> Self {
        match form {
            RecordFormArg::Pointwise => Self::Pointwise,
            RecordFormArg::Grouped => Self::Grouped,
            RecordFormArg::Posneg => Self::PosNeg,
        }
    }
}

/// Converts records, or merges an adapter.
///
/// # Errors
/// What reading, converting or writing reports.
pub(super) fn run(args: &ConvertArgs) -> Result<()> {
    match (&args.merge, args.to) {
        (Some(adapter), _) => merge_adapter(adapter, &args.output),
        (None, Some(form)) => convert_records(args, form),
        (None, None) => Err(Error::Usage("--to or --merge is missing".into())),
    }
}

/// An adapter and its base model to one model directory.
fn merge_adapter(adapter: &str, target: &Path) -> Result<()> {
    if target == Path::new(STANDARD) {
        return Err(Error::Usage("--merge writes a directory; name it by --output".into()));
    }
    let base = merge(adapter, target)?;
    tell(format_args!("merged {adapter} into {base}: {}", target.display()));
    Ok(())
}

fn convert_records(args: &ConvertArgs, form: RecordFormArg) -> Result<()> {
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
    if args.output != Path::new(STANDARD) && args.output.is_dir() {
        let message = "is a directory, expected a file".to_owned();
        return Err(Error::File { path: args.output.clone(), message });
    }
    let records = if args.input == Path::new(STANDARD) {
        let name = Path::new("<stdin>");
        SourceRecords::from_reader(io::stdin(), name, &args.label_key, labels)?
    } else {
        SourceRecords::open(&args.input, &args.label_key, labels)?
    };
    let mut output = Output::create(&args.output)?;
    let report = convert(records, &options, &mut |line| output.line(line));
    let done = report.and_then(|report| output.finish().map(|()| report));
    match done {
        // `| head` has seen enough: a good end.
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(error),
        Ok(report) => {
            tell(report);
            Ok(())
        }
    }
}
