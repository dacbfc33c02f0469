//! Caches: equal to what they are made of, found again, built once, never trusted when damaged.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;

use super::super::{Content, Pair};
use super::*;

/// Tokens are the characters' code points; counts how many texts it was given.
#[derive(Debug, Default)]
struct Characters {
    queries: AtomicUsize,
    documents: AtomicUsize,
    wide: bool,
}

impl Encode for Characters {
    fn query(&self, text: &str) -> Result<Vec<u32>> {
        self.queries.fetch_add(1, Ordering::Relaxed);
        Ok(text.chars().map(u32::from).collect())
    }

    fn document(&self, text: &str) -> Result<Vec<u32>> {
        self.documents.fetch_add(1, Ordering::Relaxed);
        match text {
            "untokenizable" => Err(Error::Training("the tokenizer refuses it".to_owned())),
            _ => Ok(text.chars().map(u32::from).collect()),
        }
    }

    fn max_id(&self) -> u32 {
        if self.wide { 0x10_ffff } else { 0xffff }
    }

    fn fingerprint(&self) -> u64 {
        u64::from(self.wide)
    }
}

/// A data file and its caches.
struct Case {
    dir: TempDir,
    characters: Arc<Characters>,
    options: LoadOptions,
}

impl Case {
    fn new(data: &str, kind: DatasetKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train.jsonl");
        fs::write(&path, data).unwrap();
        let options = LoadOptions { kind: Some(kind), label_max: 2.0, ..LoadOptions::new(path) };
        Self { dir, characters: Arc::new(Characters::default()), options }
    }

    fn cache(&self) -> CacheOptions {
        let encoder = Arc::clone(&self.characters) as _;
        CacheOptions { dir: Some(self.dir.path().join("cache")), encoder, document_texts: false }
    }

    fn open(&self) -> Result<(Dataset, LoadReport)> {
        Dataset::open(&self.options, &self.cache())
    }

    fn tokenized(&self) -> usize {
        self.characters.documents.load(Ordering::Relaxed)
    }

    /// The directories of caches, and everything else beside them.
    fn entries(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let entries = fs::read_dir(self.dir.path().join("cache")).unwrap();
        entries.map(|entry| entry.unwrap().path()).partition(|path| path.is_dir())
    }
}

/// 500 queries that come again and again with 6 documents each, 3,000 lines of several batches.
fn pointwise() -> String {
    let line = |i: usize| {
        let document = "学习 word ".repeat(i % 7);
        let label = i % 3;
        format!(
            "{{\"query\": \"q{}\", \"content\": \"{document}{i}\", \"label\": {label}}}\n",
            i % 500
        )
    };
    (0..3000).map(line).collect()
}

fn grouped() -> String {
    let line = |i: usize| {
        let hit = |j: usize| format!("{{\"content\": \"d{i} {j}\", \"label\": {}}}", j % 2);
        let hits: Vec<_> = (0..=i % 4).map(hit).collect();
        format!("{{\"query\": \"q{i}\", \"hits\": [{}]}}\n", hits.join(", "))
    };
    (0..1000).map(line).collect()
}

fn characters_of(content: Content<'_>) -> String {
    match content {
        Content::Text(text) => text.to_owned(),
        Content::Tokens(tokens) => tokens.to_vec().into_iter().filter_map(char::from_u32).collect(),
    }
}

/// Everything that training sees of a data set, as far as a cache can tell.
fn rows(dataset: &Dataset) -> Vec<(String, String, f32, u32, u32)> {
    let row = |(number, pair): (usize, Pair)| {
        let cost = dataset.cost(number as u32, 512);
        let (query, document) = (dataset.query(pair.query), dataset.document(&pair));
        (characters_of(query), characters_of(document), pair.label, pair.line, cost)
    };
    dataset.pairs().enumerate().map(row).collect()
}

#[test]
fn a_cache_holds_what_memory_would_and_is_read_from_then_on() {
    for (data, kind) in [
        (pointwise(), DatasetKind::Pointwise),
        (pointwise(), DatasetKind::Grouped),
        (grouped(), DatasetKind::Grouped),
        (grouped(), DatasetKind::Pointwise),
        // A record with all its hits between two single ones of the same query.
        (
            "{\"query\": \"a\", \"content\": \"x\", \"label\": 0}\n\
             {\"query\": \"a\", \"hits\": [{\"content\": \"y\", \"label\": 1}]}\n\
             {\"query\": \"b\", \"content\": \"\", \"label\": 1}\n\
             {\"query\": \"a\", \"content\": \"z\", \"label\": 2}\n"
                .to_owned(),
            DatasetKind::Grouped,
        ),
    ] {
        for wide in [false, true] {
            let mut case = Case::new(&data, kind);
            case.characters = Arc::new(Characters { wide, ..Characters::default() });
            let (plain, plain_report) = Dataset::load(&case.options).unwrap();
            for _ in 0..2 {
                let (dataset, report) = case.open().unwrap();
                assert!(!wide || case.tokenized() == plain.pair_count(), "built once");
                assert_eq!(rows(&dataset), rows(&plain));
                assert!(dataset.groups().eq(plain.groups()));
                assert_eq!((dataset.kind, &report), (plain.kind, &plain_report));
                assert!(matches!(dataset.document(&dataset.pair(0)), Content::Tokens(_)));
            }
            let (caches, others) = case.entries();
            assert_eq!((caches.len(), others.len()), (1, 1), "{caches:?} {others:?}");
        }
    }
}

#[test]
fn documents_to_be_augmented_stay_texts() {
    let case = Case::new(&grouped(), DatasetKind::Grouped);
    let cache = CacheOptions { document_texts: true, ..case.cache() };
    for _ in 0..2 {
        let (dataset, _) = Dataset::open(&case.options, &cache).unwrap();
        let pair = dataset.pair(1);
        assert!(matches!(dataset.document(&pair), Content::Text("d1 0")));
        assert!(matches!(dataset.query(pair.query), Content::Tokens(_)));
    }
    case.open().unwrap();
    assert_eq!(case.entries().0.len(), 2, "a cache for each form");
}

#[test]
fn another_file_or_setting_is_another_cache_and_a_changed_file_replaces_its_own() {
    let mut case = Case::new(&pointwise(), DatasetKind::Pointwise);
    case.open().unwrap();
    case.options.label_max = 4.0;
    assert_eq!(case.open().unwrap().0.pair(2).label, 0.5);
    assert_eq!(case.entries().0.len(), 2);
    let (before, _) = case.open().unwrap();
    fs::write(&case.options.path, "{\"query\": \"q\", \"content\": \"d\", \"label\": 4}\n")
        .unwrap();
    let (after, _) = case.open().unwrap();
    assert_eq!((after.pair_count(), after.pair(0).label), (1, 1.0));
    assert_eq!(case.entries().0.len(), 2);
    assert_eq!(rows(&before).len(), 3000, "what is mapped stays when it is replaced");
}

#[test]
fn damage_anywhere_is_noticed_and_mended() {
    let case = Case::new(&pointwise(), DatasetKind::Grouped);
    let expected = rows(&case.open().unwrap().0);
    let cache = case.entries().0.remove(0);
    let names: Vec<_> = fs::read_dir(&cache).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(names.len(), 7, "{names:?}");
    for path in &names {
        let good = fs::read(path).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [Some(flipped), Some(good[..good.len() - 2].to_vec()), None] {
            match &bad {
                // As another program would: a new file, not the pages of the mapped one.
                Some(bytes) => {
                    fs::remove_file(path).unwrap();
                    fs::write(path, bytes).unwrap();
                }
                None => fs::remove_file(path).unwrap(),
            }
            let encoder = Encoder::tokens(Arc::clone(&case.characters) as _, false);
            let key = Key::new(&case.options, &case.cache(), encoder.forms).unwrap();
            let reason = open(&cache, &key, &case.options).unwrap_err();
            assert!(
                reason.starts_with("damaged: ") || reason.starts_with("not a data"),
                "{reason}"
            );
            let before = case.tokenized();
            assert_eq!(rows(&case.open().unwrap().0), expected);
            assert_eq!(case.tokenized() - before, expected.len());
        }
    }
    fs::remove_dir_all(&cache).unwrap();
    fs::write(&cache, "a file in its place").unwrap();
    for _ in 0..2 {
        assert_eq!(rows(&case.open().unwrap().0), expected);
    }
    assert_eq!(case.entries().1.len(), 1, "the lock, and no leftover");
}

#[test]
fn workers_that_start_together_build_one_cache() {
    let case = Case::new(&pointwise(), DatasetKind::Pointwise);
    let lengths: Vec<usize> = std::thread::scope(|scope| {
        let worker = || scope.spawn(|| case.open().unwrap().0.pair_count());
        let workers: Vec<_> = (0..4).map(|_| worker()).collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    assert_eq!(lengths, [3000; 4]);
    assert_eq!(case.tokenized(), 3000, "one of them tokenized");
}

#[test]
fn a_bad_record_leaves_no_cache() {
    let bad = "{\"query\": \"q\", \"content\": \"d\"}\n";
    let case = Case::new(&(pointwise() + bad), DatasetKind::Pointwise);
    for _ in 0..2 {
        let error = case.open().unwrap_err().to_string();
        let start = format!("{}:3001: no \"label\" ", case.options.path.display());
        assert!(error.starts_with(&start), "{error}");
        assert!(case.entries().0.is_empty());
    }
    let untokenizable = "{\"query\": \"q\", \"content\": \"untokenizable\", \"label\": 1}\n";
    let case = Case::new(&(pointwise() + untokenizable + bad), DatasetKind::Pointwise);
    assert_eq!(case.open().unwrap_err().to_string(), "the tokenizer refuses it");
}

#[test]
fn a_directory_that_cannot_be_written_is_named() {
    let case = Case::new(&grouped(), DatasetKind::Grouped);
    let dir = Some("/proc/self/cache".into());
    let error = Dataset::open(&case.options, &CacheOptions { dir, ..case.cache() }).unwrap_err();
    assert!(error.to_string().starts_with("/proc/self/cache: cannot create the dir"), "{error}");
    assert_eq!(error.exit_code(), 2);
}

#[test]
fn a_full_disk_says_what_to_do() {
    let mut sink =
        super::super::store::Sink::new(&Place::Directory("/dev".into()), "full").unwrap();
    let written = sink.write(&vec![0; 1 << 20]);
    let error = written.and_then(|()| sink.finish().map(|_| ())).unwrap_err().to_string();
    let start = "/dev/full: the disk is full while the data cache is written; make room, or set ";
    assert!(error.starts_with(start), "{error}");
}

#[test]
fn small_files_need_no_cache_and_large_ones_are_told_by_their_size() {
    let case = Case::new(&grouped(), DatasetKind::Grouped);
    let cache = CacheOptions { dir: None, ..case.cache() };
    assert_eq!(cache.directory_for(&case.options.path).unwrap(), None);
    assert_eq!(cache.directory_for(Path::new("none.jsonl")).unwrap(), None);
    for (name, bytes, expected) in [
        ("a.jsonl", LARGE_BYTES, false),
        ("a.jsonl", LARGE_BYTES + 1, true),
        ("a.jsonl.gz", LARGE_COMPRESSED_BYTES, false),
        ("a.jsonl.zst", LARGE_COMPRESSED_BYTES + 1, true),
    ] {
        assert_eq!(is_large(Path::new(name), bytes), expected, "{name} {bytes}");
    }
}
