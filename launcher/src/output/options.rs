//! What the command line says about the output.

use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;

use clap::ValueEnum;

use super::Template;

/// Where the workers' lines go, and in what form.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// What lines of text begin with.
    pub prefix: Template,
    /// Whose lines the console shows.
    pub show: Show,
    /// The form of a line.
    pub format: Format,
    /// Where the files are.
    pub log_dir: Option<PathBuf>,
}

/// The form of a line, on the console and in files.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// As the worker wrote it, behind the prefix.
    #[default]
    Text,
    /// A JSON object: `time`, `rank`, `stream`, `line`.
    Json,
}

/// Whose lines the console shows. Files have all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Show {
    /// Everybody's.
    #[default]
    All,
    /// Nobody's, but the last ones of the rank that fails first, in the report.
    Failed,
    /// Those of these ranks.
    Ranks(Vec<RangeInclusive<usize>>),
}

impl Show {
    /// Whether lines of this rank are shown.
    pub fn shows(&self, rank: usize) -> bool {
        match self {
            Self::All => true,
            Self::Failed => false,
            Self::Ranks(ranks) => ranks.iter().any(|range| range.contains(&rank)),
        }
    }

    /// The highest rank that is named.
    pub fn highest(&self) -> Option<usize> {
        match self {
            Self::All | Self::Failed => None,
            Self::Ranks(ranks) => ranks.iter().map(|range| *range.end()).max(),
        }
    }
}

impl FromStr for Show {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "all" => return Ok(Self::All),
            "failed" => return Ok(Self::Failed),
            _ => {}
        }
        let range = |part: &str| {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
            (first <= last).then_some(first..=last)
        };
        let ranks = text.split(',').map(range).collect::<Option<Vec<_>>>();
        ranks
            .map(Self::Ranks)
            .ok_or_else(|| "expected ranks such as 0,3 or 0-3, `failed`, or `all`".to_owned())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test may end with a panic")]

    use super::*;

    #[test]
    fn ranks_are_listed_or_not() {
        let shown = |text: &str| {
            let show: Show = text.parse().unwrap();
            (0..6).filter(|&rank| show.shows(rank)).collect::<Vec<_>>()
        };
        assert_eq!(shown("all"), [0, 1, 2, 3, 4, 5]);
        assert!(shown("failed").is_empty());
        assert_eq!(shown("0, 3"), [0, 3]);
        assert_eq!(shown("1-2,5"), [1, 2, 5]);
        assert_eq!("1-2,9,0".parse::<Show>().unwrap().highest(), Some(9));
        for text in ["", "x", "0,", "-1", "3-1", "1-2-3", "all,0"] {
            assert!(text.parse::<Show>().is_err(), "{text}");
        }
    }
}
