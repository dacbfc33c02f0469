//! A [`Dataset`] under construction: records in, sections and a report out.

use std::collections::{BTreeMap, HashMap};

use super::encode::{EncodedRecord, Encoder, LineError, QueryKey, RecordBatch};
use super::load::LoadOptions;
use super::record::RecordError;
use super::report::{DropReason, Dropped, LabelHistogram, LoadReport, dropped_list};
use super::store::{Bytes, Checksum, Place, Sink, TableSink, record};
use super::{Dataset, DatasetKind, PAIR_BYTES, Pair};
use crate::error::{Error, Result};

/// The sections, by name, as they lie on the disk.
pub(super) type Sections = BTreeMap<String, Checksum>;

/// The names of the sections of queries, documents, pairs and groups; a table has one more, of its
/// entries' ends.
pub(super) const QUERIES: &str = "queries";
pub(super) const DOCUMENTS: &str = "documents";
pub(super) const PAIRS: &str = "pairs";
pub(super) const GROUPS: &str = "groups";

/// Numbers of queries by their keys: about 30 bytes a query. In parts, so that growing never
/// needs both the old and the new table in full.
struct Interner {
    parts: Vec<HashMap<QueryKey, u32>>,
}

impl Interner {
    const PARTS: usize = 64;

    fn new() -> Self {
        Self { parts: vec![HashMap::new(); Self::PARTS] }
    }

    /// The number of a query, which is `next` if it is new.
    fn number(&mut self, key: QueryKey, next: u32) -> u32 {
        *self.parts[key.part(Self::PARTS)].entry(key).or_insert(next)
    }
}

/// Which pair goes into which group; of grouped data only.
#[derive(Default)]
struct Grouping {
    /// The group of each pair, in file order.
    of_pair: Vec<u32>,
    /// Pairs in each group.
    sizes: Vec<u32>,
    /// For single-document records: the group of each query.
    gathered: HashMap<u32, u32>,
}

impl Grouping {
    fn add(&mut self, query: u32, is_single: bool, documents: usize) {
        let next = self.sizes.len() as u32;
        let group = if is_single { *self.gathered.entry(query).or_insert(next) } else { next };
        if group == next {
            self.sizes.push(0);
        }
        self.sizes[group as usize] += documents as u32;
        self.of_pair.extend(std::iter::repeat_n(group, documents));
    }

    /// The ends of the groups, counted in pairs.
    fn ends(&self) -> impl Iterator<Item = u32> {
        self.sizes.iter().scan(0, |end, &size| {
            *end += size;
            Some(*end)
        })
    }

    /// The pairs in the order of their groups, or `None` where the file has them so.
    fn order(&self) -> Option<Vec<u32>> {
        if self.of_pair.is_sorted() {
            return None;
        }
        let mut next: Vec<u32> =
            self.ends().zip(&self.sizes).map(|(end, &size)| end - size).collect();
        let mut order = vec![0; self.of_pair.len()];
        for (pair, &group) in self.of_pair.iter().enumerate() {
            order[next[group as usize] as usize] = pair as u32;
            next[group as usize] += 1;
        }
        Some(order)
    }
}

/// Takes record batches in file order.
pub(super) struct Builder<'a> {
    options: &'a LoadOptions,
    place: Place,
    kind: Option<DatasetKind>,
    interner: Interner,
    queries: TableSink,
    documents: TableSink,
    pairs: Sink,
    grouping: Grouping,
    records: usize,
    dropped: BTreeMap<DropReason, Dropped>,
    empty_documents: Tally,
    repeated_documents: Tally,
    implied_labels: Tally,
}

/// A count and the line of the first.
#[derive(Default)]
struct Tally {
    count: usize,
    first_line: u32,
}

impl Tally {
    fn add(&mut self, count: usize, line: u32) {
        if self.count == 0 {
            self.first_line = line;
        }
        self.count += count;
    }

    /// `what` with its count and line, if there were any.
    fn note(&self, what: &str) -> Option<String> {
        let Self { count, first_line } = self;
        (*count > 0).then(|| format!("{count} {what} (first at line {first_line})"))
    }
}

/// A data set, what was seen on the way, and its sections on the disk.
pub(super) type Built = (Dataset, LoadReport, Sections);

impl<'a> Builder<'a> {
    pub(super) fn new(options: &'a LoadOptions, encoder: &Encoder, place: &Place) -> Result<Self> {
        let [query_form, document_form] = encoder.forms;
        Ok(Self {
            options,
            place: place.clone(),
            kind: options.kind,
            interner: Interner::new(),
            queries: TableSink::new(place, QUERIES, query_form)?,
            documents: TableSink::new(place, DOCUMENTS, document_form)?,
            pairs: Sink::new(place, PAIRS)?,
            grouping: Grouping::default(),
            records: 0,
            dropped: BTreeMap::new(),
            empty_documents: Tally::default(),
            repeated_documents: Tally::default(),
            implied_labels: Tally::default(),
        })
    }

    /// Records taken so far.
    pub(super) fn records(&self) -> usize {
        self.records
    }

    /// Takes a batch; a bad record is an error, or counted when bad records are skipped.
    pub(super) fn take(&mut self, batch: RecordBatch) -> Result<()> {
        self.kind = self.kind.or(batch.kind);
        for (line, record) in batch.records {
            match record {
                Ok(record) => self.push(record, line, &batch.texts)?,
                Err(LineError::Failed(error)) => return Err(error),
                Err(LineError::Bad(error)) if self.options.skip_bad_records => {
                    let first = Dropped { count: 0, first_line: line };
                    self.dropped.entry(error.reason).or_insert(first).count += 1;
                }
                Err(LineError::Bad(RecordError { message, .. })) => {
                    let path = self.options.path.clone();
                    return Err(Error::Data { path, line: line as usize, message });
                }
            }
        }
        Ok(())
    }

    fn push(&mut self, record: EncodedRecord, line: u32, texts: &[u8]) -> Result<()> {
        self.records += 1;
        if u32::try_from(self.documents.len() + record.documents.len()).is_err() {
            return Err(self.file_error(format!("more than {} pairs, split the file", u32::MAX)));
        }
        let next = self.queries.len() as u32;
        let query = self.interner.number(record.key, next);
        if query == next {
            self.queries.push(&texts[record.query.place], record.query.estimate)?;
        }
        if self.kind == Some(DatasetKind::Grouped) {
            self.grouping.add(query, record.is_single, record.documents.len());
        }
        self.empty_documents.add(record.empty_documents, line);
        self.repeated_documents.add(record.repeated_documents, line);
        self.implied_labels.add(usize::from(record.implied_labels), line);
        for (document, label) in record.documents {
            let pair = Pair { query, document: self.documents.len() as u32, label, line };
            self.documents.push(&texts[document.place], document.estimate)?;
            self.pairs.write(&pair.to_bytes())?;
        }
        Ok(())
    }

    fn file_error(&self, message: String) -> Error {
        Error::File { path: self.options.path.clone(), message }
    }

    pub(super) fn finish(self) -> Result<Built> {
        let Some(kind) = self.kind.filter(|_| self.records > 0) else {
            return Err(self.file_error(if self.dropped.is_empty() {
                "holds no records, expected one JSON object a line".to_owned()
            } else {
                format!("no usable record is left; dropped {}", dropped_list(&self.dropped))
            }));
        };
        let notes = self.notes();
        let mut sections = Sections::new();
        let pairs = gather(self.pairs, &self.grouping, &self.place, &mut sections)?;
        let mut groups = Sink::new(&self.place, GROUPS)?;
        for end in self.grouping.ends() {
            groups.write(&end.to_le_bytes())?;
        }
        let (groups, checksum) = groups.finish()?;
        sections.insert(GROUPS.to_owned(), checksum);
        let mut table = |name: &str, table: TableSink| {
            let (table, [ends, contents]) = table.finish()?;
            sections.extend([(format!("{name}.ends"), ends), (name.to_owned(), contents)]);
            Ok::<_, Error>(table)
        };
        let (queries, documents) =
            (table(QUERIES, self.queries)?, table(DOCUMENTS, self.documents)?);
        let path = self.options.path.clone();
        let dataset = Dataset { path, kind, queries, documents, pairs, groups };
        let report = LoadReport {
            path: dataset.path.clone(),
            kind,
            records: self.records,
            pairs: dataset.pair_count(),
            queries: dataset.query_count(),
            groups: dataset.group_count(),
            labels: match self.options.label_key {
                Some(_) => LabelHistogram::of(dataset.pairs().map(|pair| pair.label)),
                None => LabelHistogram::Values(Vec::new()),
            },
            dropped: self.dropped,
            notes,
        };
        Ok((dataset, report, sections))
    }

    fn notes(&self) -> Vec<String> {
        let gathered = self.grouping.gathered.len();
        let (max, min) = (self.options.label_max, self.options.label_min);
        let implied = format!(
            "records with lists without scores, whose labels are max_label {max} and min_label {min}"
        );
        let notes = [
            (gathered > 0)
                .then(|| format!("pointwise records gathered by query into {gathered} groups")),
            self.empty_documents.note("documents are empty"),
            self.repeated_documents.note("documents come again in their record with another label"),
            self.implied_labels.note(&implied),
        ];
        notes.into_iter().flatten().collect()
    }
}

/// The finished section of pairs, put in the order of their groups where the file has another.
fn gather(
    pairs: Sink,
    grouping: &Grouping,
    place: &Place,
    sections: &mut Sections,
) -> Result<Bytes> {
    let (mut bytes, mut checksum) = pairs.finish()?;
    if let Some(order) = grouping.order() {
        let name = format!("{PAIRS}.gathered");
        let mut gathered = Sink::new(place, &name)?;
        for pair in order {
            gathered.write(record::<PAIR_BYTES>(&bytes, pair as usize))?;
        }
        (bytes, checksum) = gathered.finish()?;
        if let Place::Directory(dir) = place {
            let target = dir.join(PAIRS);
            std::fs::rename(dir.join(name), &target).map_err(|source| Error::Io {
                path: target,
                action: "rename to",
                source,
            })?;
        }
    }
    sections.insert(PAIRS.to_owned(), checksum);
    Ok(bytes)
}
