//! What a load found, for a person to read.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::DatasetKind;

/// Why a record was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum DropReason {
    /// A line longer than 64 MiB.
    LineTooLong,
    /// Bytes that are not UTF-8.
    NotUtf8,
    /// A line that is not JSON.
    BrokenJson,
    /// A value of another type than expected, or a line that is no object.
    WrongType,
    /// A query or document key that is not there.
    MissingKey,
    /// A label that is not there.
    MissingLabel,
    /// A label that is NaN, infinite or too large for 32 bits.
    LabelNotFinite,
    /// A pointwise label outside `min_label` to `max_label`.
    LabelOutOfRange,
    /// A query without text.
    EmptyQuery,
    /// A record whose list of documents is empty.
    NoDocuments,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LineTooLong => "line too long",
            Self::NotUtf8 => "not UTF-8",
            Self::BrokenJson => "broken JSON",
            Self::WrongType => "wrong type",
            Self::MissingKey => "missing key",
            Self::MissingLabel => "missing label",
            Self::LabelNotFinite => "label not finite",
            Self::LabelOutOfRange => "label out of range",
            Self::EmptyQuery => "empty query",
            Self::NoDocuments => "no documents",
        })
    }
}

/// Records dropped for one reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// How many.
    pub count: usize,
    /// One-based line of the first.
    pub first_line: u32,
}

/// How often each label occurs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum LabelHistogram {
    /// Up to [`LabelHistogram::MAX_DISTINCT`] distinct values: each with its count, ascending. None
    /// where labels were not read.
    Values(Vec<(f32, usize)>),
    /// More than that: counts in equal bins between the smallest and the largest label.
    Bins {
        /// The smallest label.
        min: f32,
        /// The largest label.
        max: f32,
        /// Counts, lowest bin first.
        counts: [usize; 10],
    },
}

impl LabelHistogram {
    /// The most distinct values that are counted one by one.
    pub const MAX_DISTINCT: usize = 20;

    /// Counts labels.
    #[must_use]
    pub fn of(labels: impl Iterator<Item = f32> + Clone) -> Self {
        let mut values: HashMap<u32, usize> = HashMap::new();
        for label in labels.clone() {
            // Adding 0 turns -0 into 0, so that both are one value.
            *values.entry((label + 0.0).to_bits()).or_default() += 1;
            if values.len() > Self::MAX_DISTINCT {
                return Self::binned(labels);
            }
        }
        let mut values: Vec<_> =
            values.into_iter().map(|(bits, count)| (f32::from_bits(bits), count)).collect();
        values.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self::Values(values)
    }

    fn binned(labels: impl Iterator<Item = f32> + Clone) -> Self {
        let (min, max) =
            labels.clone().fold((f32::MAX, f32::MIN), |(a, b), label| (a.min(label), b.max(label)));
        let width = (f64::from(max) - f64::from(min)) / 10.0;
        let mut counts = [0; 10];
        for label in labels {
            let bin = ((f64::from(label) - f64::from(min)) / width) as usize;
            counts[bin.min(9)] += 1;
        }
        Self::Bins { min, max, counts }
    }
}

impl fmt::Display for LabelHistogram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Values(values) if values.is_empty() => f.write_str("not read"),
            Self::Values(values) => {
                let shown: Vec<_> =
                    values.iter().map(|(v, n)| format!("{v} x {}", grouped(*n))).collect();
                f.write_str(&shown.join(", "))
            }
            Self::Bins { min, max, counts } => {
                let shown: Vec<_> = counts.iter().map(|&n| grouped(n)).collect();
                write!(f, "{min} to {max} in ten bins: {}", shown.join(" "))
            }
        }
    }
}

/// The outcome of a load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LoadReport {
    /// The file.
    pub path: PathBuf,
    /// How its records are used.
    pub kind: DatasetKind,
    /// Records used.
    pub records: usize,
    /// Pairs in them.
    pub pairs: usize,
    /// Distinct queries.
    pub queries: usize,
    /// Groups; 0 for pointwise data.
    pub groups: usize,
    /// The labels as the losses use them.
    pub labels: LabelHistogram,
    /// Records dropped because `skip_bad_records` was set, by reason.
    pub dropped: BTreeMap<DropReason, Dropped>,
    /// Things worth a look that are not errors.
    pub notes: Vec<String>,
}

impl LoadReport {
    /// All records dropped.
    #[must_use]
    pub fn dropped_total(&self) -> usize {
        self.dropped.values().map(|dropped| dropped.count).sum()
    }
}

impl fmt::Display for LoadReport {
    /// A few lines, without a line end after the last.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} records, {} pairs, {} queries",
            self.path.display(),
            grouped(self.records),
            grouped(self.pairs),
            grouped(self.queries)
        )?;
        match self.kind {
            DatasetKind::Pointwise => f.write_str(", pointwise")?,
            DatasetKind::Grouped => write!(f, ", {} groups", grouped(self.groups))?,
        }
        write!(f, "\n  labels: {}", self.labels)?;
        if !self.dropped.is_empty() {
            let total = grouped(self.dropped_total());
            write!(f, "\n  dropped {total} records: {}", dropped_list(&self.dropped))?;
        }
        self.notes.iter().try_for_each(|note| write!(f, "\n  note: {note}"))
    }
}

/// `2 broken JSON (first at line 7), 1 empty query (first at line 9)`.
pub(crate) fn dropped_list(dropped: &BTreeMap<DropReason, Dropped>) -> String {
    let shown: Vec<_> = dropped
        .iter()
        .map(|(why, d)| format!("{} {why} (first at line {})", grouped(d.count), d.first_line))
        .collect();
    shown.join(", ")
}

/// A count with commas between thousands.
pub(crate) fn grouped(count: usize) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_labels_are_counted_one_by_one() {
        let histogram = LabelHistogram::of([1.0, 0.0, -0.0, 0.5, 0.0].into_iter());
        assert_eq!(histogram, LabelHistogram::Values(vec![(0.0, 3), (0.5, 1), (1.0, 1)]));
        assert_eq!(histogram.to_string(), "0 x 3, 0.5 x 1, 1 x 1");
    }

    #[test]
    fn many_labels_are_binned() {
        let histogram = LabelHistogram::of((0..=100_u8).map(f32::from));
        let LabelHistogram::Bins { min, max, counts } = histogram else { panic!("not binned") };
        assert_eq!((min, max), (0.0, 100.0));
        assert_eq!(counts, [10, 10, 10, 10, 10, 10, 10, 10, 10, 11]);
    }

    #[test]
    fn thousands_are_set_apart() {
        for (count, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(count), text);
        }
    }

    #[test]
    fn the_report_reads_well() {
        let dropped = BTreeMap::from([
            (DropReason::EmptyQuery, Dropped { count: 1, first_line: 9 }),
            (DropReason::BrokenJson, Dropped { count: 1200, first_line: 7 }),
        ]);
        let report = LoadReport {
            path: "train.jsonl".into(),
            kind: DatasetKind::Grouped,
            records: 1500,
            pairs: 15_000,
            queries: 1499,
            groups: 1500,
            labels: LabelHistogram::Values(vec![(0.0, 14_000), (1.0, 1000)]),
            dropped,
            notes: vec!["3 empty documents".to_owned()],
        };
        let lines = [
            "train.jsonl: 1,500 records, 15,000 pairs, 1,499 queries, 1,500 groups",
            "  labels: 0 x 14,000, 1 x 1,000",
            "  dropped 1,201 records: 1,200 broken JSON (first at line 7), \
             1 empty query (first at line 9)",
            "  note: 3 empty documents",
        ];
        assert_eq!(report.to_string(), lines.join("\n"));
    }
}
