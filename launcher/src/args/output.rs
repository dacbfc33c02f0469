//! Flags about the workers' output.

use std::path::PathBuf;

use crate::output::{Format, Options, Show, Template};

/// The flags about the workers' output.
#[derive(Debug, clap::Args)]
pub struct OutputArgs {
    /// Write each rank's output and a summary there
    ///
    /// DIR/attempt-A/rank-R.log has what rank R wrote to stdout and stderr, in the order in which it
    /// came; A is 0, and one more after each restart. DIR/launch.log has the lines of all ranks with
    /// their prefix, and the launcher's own. DIR/launch.json is the summary. Files that are there
    /// already are appended to: give each launch a directory of its own to keep them apart. Of a
    /// progress bar (lines ended by a carriage return) files have a sample every 10 seconds and the
    /// last state. If the disk is full the job goes on and the files lack lines, which is said once.
    #[arg(long, value_name = "DIR")]
    pub log_dir: Option<PathBuf>,
    /// On the console: all, failed, 0,3 [default: all]
    ///
    /// Ranks are listed as in `0,3` or `0-3`. With `failed` the console shows nothing but the last lines of the rank that fails first. The files of --log-dir
    /// have everything whatever is shown.
    #[arg(long, value_name = "RANKS", default_value = "all", hide_default_value = true)]
    pub show: Show,
    /// Begins each line [default: "[{rank}] "]
    ///
    /// On the console and in launch.log. It may hold `{rank}`, `{local_rank}`, `{host}`, `{time}` and
    /// `{stream}`; `{{` and `}}` stand for braces. The time is UTC and that at which the launcher has
    /// read the line.
    #[arg(long, value_name = "TEXT", default_value = "[{rank}] ", hide_default_value = true)]
    pub prefix: Template,
    /// Lines as text or json [default: text]
    ///
    /// On the console and in all log files. With `json` each line is an object with the keys time,
    /// rank, stream and line; what is no UTF-8 becomes U+FFFD. A JSON line of the launcher itself has the rank null and
    /// the stream `launcher`.
    #[arg(
        long,
        value_enum,
        value_name = "FORMAT",
        default_value = "text",
        hide_default_value = true,
        hide_possible_values = true
    )]
    pub log_format: Format,
}

impl OutputArgs {
    /// What they ask for.
    pub(crate) fn options(&self) -> Options {
        Options {
            prefix: self.prefix.clone(),
            show: self.show.clone(),
            format: self.log_format,
            log_dir: self.log_dir.clone(),
        }
    }
}
