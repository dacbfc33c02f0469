//! How far a download is: a bar on a terminal, otherwise a line now and then.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::error::tell;

/// The least time between two lines.
const INTERVAL: Duration = Duration::from_secs(10);

/// The progress of one file, on stderr.
pub(super) enum Progress {
    Bar(ProgressBar),
    Lines { name: String, done: u64, total: u64, told: Instant },
}

impl Progress {
    /// Begins `name` of `total` bytes.
    pub(super) fn new(name: String, total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            tell(format_args!("fetching {name}, {}", HumanBytes(total)));
            return Self::Lines { name, done: 0, total, told: Instant::now() };
        }
        let style = ProgressStyle::with_template(
            "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        let bar = ProgressBar::new(total).with_message(name);
        Self::Bar(bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }

    /// The file has `bytes` now.
    pub(super) fn at(&mut self, bytes: u64) {
        match self {
            Self::Bar(bar) => bar.set_position(bytes),
            Self::Lines { name, done, total, told } => {
                *done = bytes;
                if told.elapsed() >= INTERVAL {
                    *told = Instant::now();
                    tell(format_args!(
                        "fetching {name}, {} of {}",
                        HumanBytes(*done),
                        HumanBytes(*total)
                    ));
                }
            }
        }
    }

    /// Tells of trouble that does not end the download.
    pub(super) fn say(&self, message: &str) {
        match self {
            Self::Bar(bar) => bar.println(message),
            Self::Lines { .. } => tell(message),
        }
    }
}
