//! Loading, and what is said of input that cannot be loaded.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;

use super::super::report::{DropReason, Dropped, dropped_list};
use super::super::{Content, Pair};
use super::*;

fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn load_with(bytes: &[u8], change: impl FnOnce(&mut LoadOptions)) -> Result<(Dataset, LoadReport)> {
    let file = file(bytes);
    let mut options = LoadOptions::new(file.path());
    change(&mut options);
    Dataset::load(&options)
}

fn load(text: &str, kind: DatasetKind) -> (Dataset, LoadReport) {
    load_with(text.as_bytes(), |options| {
        options.kind = Some(kind);
        options.label_max = 2.0;
    })
    .unwrap()
}

/// The message after the path.
fn message(error: &Error, path_of: &str) -> String {
    let text = error.to_string();
    text.split_once(path_of).map_or(text.clone(), |(_, rest)| rest.to_owned())
}

/// `(query, content, label, line)` of every pair.
fn rows(dataset: &Dataset) -> Vec<(&str, &str, f32, u32)> {
    let row = |pair: Pair| {
        let (query, document) = dataset.texts(&pair).unwrap();
        (query, document, pair.label, pair.line)
    };
    dataset.pairs().map(row).collect()
}

const POINTWISE: &str = "{\"query\": \" a \", \"content\": \"x \", \"label\": 2}\n\n\
     {\"query\": \"b\", \"content\": \"y\", \"label\": 0.5, \"extra\": null}\r\n\
     {\"query\": \"a\", \"content\": \"z\", \"label\": 0}";
const GROUPED: &str = "{\"query\": \"a\", \"hits\": [{\"content\": \"x\", \"label\": 2}, \
     {\"content\": \"y\", \"label\": 0}]}\n\
     {\"query\": \"a\", \"hits\": [{\"content\": \"z\", \"label\": 1}]}\n";
const POS_NEG: &str = "{\"query\": \"a\", \"pos\": [\"x\"], \"neg\": [\"y\", \"z\"]}\n\
     {\"query\": \"b\", \"pos\": [\"x\"], \"neg\": [\"y\"], \"pos_scores\": [1], \
     \"neg_scores\": [0.5]}\n{\"query\": \"c\", \"pos\": [\"x\"], \"pos_scores\": null}\n";

#[test]
fn pointwise_records_as_pointwise() {
    let (dataset, report) = load(POINTWISE, DatasetKind::Pointwise);
    assert_eq!(rows(&dataset), [("a", "x", 1.0, 1), ("b", "y", 0.25, 3), ("a", "z", 0.0, 4)]);
    assert!(matches!(dataset.query(1), Content::Text("b")));
    assert!(dataset.group_count() == 0 && report.notes.is_empty());
    assert_eq!((report.records, report.pairs, report.queries), (3, 3, 2));
    assert_eq!(dataset.pairs().map(|pair| pair.query).collect::<Vec<_>>(), [0, 1, 0]);
}

#[test]
fn pointwise_records_as_grouped_are_gathered_by_query_with_raw_labels() {
    let (dataset, report) = load(POINTWISE, DatasetKind::Grouped);
    assert_eq!(rows(&dataset), [("a", "x", 2.0, 1), ("a", "z", 0.0, 4), ("b", "y", 0.5, 3)]);
    assert_eq!(dataset.groups().collect::<Vec<_>>(), [0..2, 2..3]);
    assert_eq!(report.notes, ["pointwise records gathered by query into 2 groups"]);
}

#[test]
fn grouped_records_as_both() {
    let (dataset, report) = load(GROUPED, DatasetKind::Grouped);
    assert_eq!(rows(&dataset), [("a", "x", 2.0, 1), ("a", "y", 0.0, 1), ("a", "z", 1.0, 2)]);
    assert_eq!(dataset.groups().collect::<Vec<_>>(), [0..2, 2..3]);
    assert_eq!(dataset.group(1), 2..3);
    assert_eq!((report.groups, report.queries), (2, 1));
    let (dataset, _) = load(GROUPED, DatasetKind::Pointwise);
    assert_eq!(rows(&dataset), [("a", "x", 1.0, 1), ("a", "y", 0.0, 1), ("a", "z", 0.5, 2)]);
    assert_eq!(dataset.group_count(), 0);
}

#[test]
fn lists_of_positives_and_negatives_as_both() {
    let (dataset, _) = load(POS_NEG, DatasetKind::Grouped);
    let labels: Vec<f32> = dataset.pairs().map(|pair| pair.label).collect();
    assert_eq!(labels, [2.0, 0.0, 0.0, 1.0, 0.5, 2.0]);
    assert_eq!(dataset.groups().collect::<Vec<_>>(), [0..3, 3..5, 5..6]);
    let (dataset, _) = load(POS_NEG, DatasetKind::Pointwise);
    let labels: Vec<f32> = dataset.pairs().map(|pair| pair.label).collect();
    assert_eq!(labels, [1.0, 0.0, 0.0, 0.5, 0.25, 1.0]);
}

#[test]
fn the_report_names_what_may_surprise() {
    let text = "{\"query\": \"a\", \"hits\": [{\"content\": \"x\", \"label\": 1}, \
                {\"content\": \"x\", \"label\": 1}]}\n\
                {\"query\": \"b\", \"hits\": [{\"content\": \"x\", \"label\": 1}, \
                {\"content\": \" x\", \"label\": 0}, {\"content\": \" \", \"label\": 0}]}\n\
                {\"query\": \"c\", \"pos\": [\"y\"], \"neg\": [\"y\", \"\"]}\n\
                {\"query\": \"d\", \"pos\": [\"y\"], \"pos_scores\": [0.5]}\n";
    for kind in [DatasetKind::Grouped, DatasetKind::Pointwise] {
        let notes = load(text, kind).1.notes;
        assert_eq!(
            notes,
            [
                "2 documents are empty (first at line 2)",
                "2 documents come again in their record with another label (first at line 2)",
                "1 records with lists without scores, whose labels are max_label 2 and min_label 0 \
                 (first at line 3)",
            ]
        );
    }
}

#[test]
fn the_kind_comes_from_the_first_record() {
    for (text, kind) in [
        (POINTWISE, DatasetKind::Pointwise),
        (GROUPED, DatasetKind::Grouped),
        (POS_NEG, DatasetKind::Grouped),
    ] {
        let (dataset, report) =
            load_with(text.as_bytes(), |options| options.label_max = 2.0).unwrap();
        assert_eq!((dataset.kind, report.kind), (kind, kind));
    }
}

/// As RAG-Retrieval labels them: positives 1 and negatives 0 without scores, whatever the range.
#[test]
fn positives_and_negatives_are_single_pairs_where_that_is_asked_for() {
    let labels = |text: &str| {
        let as_pairs = |options: &mut LoadOptions| {
            (options.label_min, options.label_max) = (1.0, 3.0);
            options.pos_neg = DatasetKind::Pointwise;
        };
        let (dataset, _) = load_with(text.as_bytes(), as_pairs).unwrap();
        (dataset.kind, dataset.pairs().map(|pair| pair.label).collect::<Vec<_>>())
    };
    let text = r#"{"query": "a", "pos": ["x", "y"], "pos_scores": [3, 1.5], "neg": ["z"]}
                  {"query": "b", "pos": ["x"], "neg": ["y"], "neg_scores": [2]}
                  {"query": "c", "hits": [{"content": "x", "label": 2}]}"#;
    assert_eq!(labels(text), (DatasetKind::Pointwise, vec![1.0, 0.25, 0.0, 1.0, 0.5, 0.5]));
    // A record with hits says that they are a group.
    assert_eq!(labels(text.lines().last().unwrap()), (DatasetKind::Grouped, vec![2.0]));
}

/// Keys of other forms are as good as any other key beside a text, and `null` as good as no key.
#[test]
fn a_text_as_content_makes_a_record_pointwise() {
    for more in [
        r#""hits": 12"#,
        r#""pos": "NOUN""#,
        r#""neg": ["other"]"#,
        r#""hits": [{"content": "other", "label": 1}]"#,
        r#""hits": null, "pos": null"#,
    ] {
        let record = format!(r#"{{"query": "q", "content": "d", "label": 1, {more}}}"#);
        let (dataset, report) = load_with(record.as_bytes(), |_| {}).unwrap();
        assert_eq!(
            (report.kind, rows(&dataset)),
            (DatasetKind::Pointwise, vec![("q", "d", 1.0, 1)])
        );
        let (dataset, _) = load(&record, DatasetKind::Grouped);
        assert_eq!(rows(&dataset), [("q", "d", 1.0, 1)], "{more}");
    }
    let text = r#"{"query": "a", "content": null, "hits": [{"content": "x", "label": 1}], "pos": null}
                  {"query": "b", "content": "y", "label": 0, "hits": null, "pos": null}
                  {"query": "c", "content": null, "hits": null, "pos": ["z"]}
                  {"query": "d", "pos": null, "neg": ["v"], "pos_scores": NaN, "neg_scores": null}
                  {"query": "e", "pos": ["w"], "neg": NaN, "pos_scores": NaN}"#;
    let expected = vec![
        ("a", "x", 1.0, 1),
        ("b", "y", 0.0, 2),
        ("c", "z", 1.0, 3),
        ("d", "v", 0.0, 4),
        ("e", "w", 1.0, 5),
    ];
    let (dataset, report) = load_with(text.as_bytes(), |_| {}).unwrap();
    assert_eq!((report.kind, rows(&dataset)), (DatasetKind::Grouped, expected));
}

/// Python writes these where nobody looks; only where a label is read they are refused.
#[test]
fn words_for_no_number_do_no_harm_in_keys_that_are_ignored() {
    for (more, ok) in [
        (r#""meta": NaN"#, true),
        (r#""meta": [{"a": -Infinity, "b": ["NaN \" Infinity", Infinity]}], "hits": NaN"#, true),
        (r#""meta": NaNs"#, false),
    ] {
        let record = format!(r#"{{"query": "q", "content": "NaN \"", "label": 1, {more}}}"#);
        let loaded = load_with(record.as_bytes(), |_| {});
        match loaded {
            Ok((dataset, _)) => {
                assert_eq!((rows(&dataset), ok), (vec![("q", "NaN \"", 1.0, 1)], true), "{more}");
            }
            Err(error) => assert!(!ok && error.to_string().contains("broken JSON at"), "{error}"),
        }
    }
    let unread = r#"{"query": "q", "content": "d", "label": NaN}"#;
    load_with(unread.as_bytes(), |options| options.label_key = None).unwrap();
    // Behind a word columns are still those of the line.
    let broken = r#"{"query": "q", "meta": NaN, "content": }"#;
    let error = load_with(broken.as_bytes(), |_| {}).unwrap_err();
    assert!(error.to_string().contains("broken JSON at column 40: "), "{error}");
}

/// Python writes a text that was cut within an emoji so; only where such a text is read it is refused.
#[test]
fn half_a_surrogate_pair_does_no_harm_in_keys_that_are_ignored() {
    for more in
        [r#""meta": "\ud83d""#, r#""meta": [{"\ude00a": "\\\ud83d\ud83d\ude00 \" NaN", "b": NaN}]"#]
    {
        let record = format!(r#"{{"query": "q", "content": "\ud83d\ude00", "label": 1, {more}}}"#);
        let (dataset, _) = load_with(record.as_bytes(), |_| {}).unwrap();
        assert_eq!(rows(&dataset), [("q", "\u{1f600}", 1.0, 1)], "{more}");
    }
    for (record, expected) in [
        (
            r#"{"query": "a \ud83d", "content": "d", "label": 1}"#,
            "\"query\" is a text with half a surrogate pair, expected a string",
        ),
        (
            r#"{"query": "q", "content": "\ude00", "label": 1, "hits": [{"content": "d"}]}"#,
            "\"content\" is a text with half a surrogate pair, expected a string",
        ),
        (
            r#"{"query": "q", "hits": ["\ude00"]}"#,
            "\"hits[0]\" is a text with half a surrogate pair, expected an object",
        ),
        (r#"{"query": "q", "meta": "\ud83d", "content": }"#, "broken JSON at column 45: "),
        (r#""\ud83d""#, "a text with half a surrogate pair, expected one JSON object a line"),
    ] {
        let error = load_with(record.as_bytes(), |_| {}).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn compressed_files_are_known_by_their_first_bytes() {
    let plain = load(POINTWISE, DatasetKind::Pointwise).0;
    let (first, rest) = POINTWISE.split_at(30);
    let gzip = |text: &str| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    // Several members or frames one after another are one file.
    let gz = [gzip(first), gzip(rest)].concat();
    let frame = |text: &str| zstd::encode_all(text.as_bytes(), 1).unwrap();
    let zst = [frame(first), frame(rest)].concat();
    for bytes in [&gz, &zst] {
        let (dataset, _) = load_with(bytes, |options| options.label_max = 2.0).unwrap();
        assert_eq!(rows(&dataset), rows(&plain));
    }
    for bytes in [&gz[..gz.len() - 12], &zst[..zst.len() - 3]] {
        let file = file(bytes);
        let error = Dataset::load(&LoadOptions { label_max: 2.0, ..LoadOptions::new(file.path()) })
            .unwrap_err();
        let text = message(&error, &file.path().display().to_string());
        assert!(text.starts_with(": cannot read on after line "), "{text}");
        assert_eq!(error.exit_code(), 2);
    }
}

/// The second line of a file, and what is said of it after the line number.
type BadLine = (&'static [u8], &'static str);

const BAD_POINTWISE: &[BadLine] = &[
    (
        br#"{"query": "q" "content"}"#,
        "broken JSON at column 15: expected `,` or `}`; expected one object a line",
    ),
    (
        br#"{"query": "q"#,
        "broken JSON at column 12: EOF while parsing a string; expected one object a line",
    ),
    (b"{} {}", "broken JSON at column 4: trailing characters; expected one object a line"),
    (b"[1]", "a list, expected one JSON object a line"),
    (b"{\"query\": \"\xff\"}", "not UTF-8 at byte 12 of the line, expected UTF-8"),
    (b"\xff\xfe{", "begins with a UTF-16 byte order mark, expected UTF-8"),
    (
        br#"{"content": "d", "label": 1}"#,
        r#"no "query" (keys found: "content", "label"), expected a string there"#,
    ),
    (b"{}", r#"no "query" (no keys found), expected a string there"#),
    (br#"{"query": " \n", "content": "d", "label": 1}"#, r#""query" is empty, expected text"#),
    (
        br#"{"query": "q", "label": 1}"#,
        r#"no documents (keys found: "label", "query"), expected "content", "hits", or "pos" and "neg""#,
    ),
    (br#"{"query": "q", "content": null, "label": 1}"#, r#""content" is null, expected a string"#),
    (br#"{"query": 7, "content": "d", "label": 1}"#, r#""query" is a number, expected a string"#),
    (
        br#"{"query": "q", "content": "d", "score": 1}"#,
        r#"no "label" (keys found: "content", "query", "score"), expected a number there or another label key"#,
    ),
    (
        br#"{"query": "q", "content": "d", "label": "1"}"#,
        r#""label" is a string, expected a number"#,
    ),
    (
        br#"{"query": "q", "content": "d", "label": 3}"#,
        r#""label" is 3, expected 0 to 1 (min_label, max_label)"#,
    ),
    (
        br#"{"query": "q", "content": "d", "label": -0.5}"#,
        r#""label" is -0.5, expected 0 to 1 (min_label, max_label)"#,
    ),
    (
        br#"{"query": "q", "content": "d", "label": NaN}"#,
        "NaN at column 41, expected a finite number",
    ),
    (
        br#"{"query": "q", "content": "d", "label": -Infinity}"#,
        "-Infinity at column 41, expected a finite number",
    ),
    (
        br#"{"query": "q", "hits": [{"content": "d", "label": 1}, NaN]}"#,
        "\"hits[1]\" is not a number, expected an object",
    ),
    (
        br#"{"query": "q", "content": NaN, "label": 1}"#,
        "\"content\" is not a number, expected a string",
    ),
    (br"NaN", "not a number, expected one JSON object a line"),
    (
        br#"{"query": "q", "content": "d", "label": 1e999}"#,
        "broken JSON at column 45: number out of range; expected one object a line",
    ),
];

const BAD_GROUPED: &[BadLine] = &[
    (
        br#"{"query": "q", "hits": [{"content": "d", "label": 1e300}]}"#,
        r#""hits[0].label" is 1e300, expected a number that 32 bits can hold"#,
    ),
    (br#"{"query": "q", "hits": []}"#, r#""hits" is empty, expected {"content", "label"} in it"#),
    (br#"{"query": "q", "hits": {}}"#, r#""hits" is an object, expected a list"#),
    (
        br#"{"query": "q", "hits": [{"content": "d", "label": 1}, 5]}"#,
        r#""hits[1]" is a number, expected an object"#,
    ),
    (
        br#"{"query": "q", "hits": [{"content": [], "label": 1}]}"#,
        r#""hits[0].content" is a list, expected a string"#,
    ),
    (
        br#"{"query": "q", "hits": [{"content": "d"}]}"#,
        r#"no "hits[0].label" (keys found: "content"), expected a number there or another label key"#,
    ),
    (
        br#"{"query": "q", "pos": [], "neg": []}"#,
        r#""pos" and "neg" are empty, expected at least one text"#,
    ),
    (br#"{"query": "q", "pos": "d"}"#, r#""pos" is a string, expected a list"#),
    (br#"{"query": "q", "pos": [true]}"#, r#""pos[0]" is a boolean, expected a string"#),
    (
        br#"{"query": "q", "pos": ["d"], "pos_scores": [1, 2]}"#,
        r#""pos_scores" has 2 entries, expected 1 as in "pos""#,
    ),
    (
        br#"{"query": "q", "neg": ["d"], "pos_scores": [1]}"#,
        r#""pos_scores" has 1 entries, expected 0 as in "pos""#,
    ),
    (
        br#"{"query": "q", "pos": ["d"], "neg": ["e"], "neg_scores": [null]}"#,
        r#""neg_scores[0]" is null, expected a number"#,
    ),
    (
        br#"{"query": "q", "pos": ["d"], "pos_scores": 1}"#,
        r#""pos_scores" is a number, expected a list"#,
    ),
];

fn bad_lines() -> impl Iterator<Item = (DatasetKind, BadLine)> {
    let pointwise = BAD_POINTWISE.iter().map(|&bad| (DatasetKind::Pointwise, bad));
    pointwise.chain(BAD_GROUPED.iter().map(|&bad| (DatasetKind::Grouped, bad)))
}

const GOOD_LINE: &[u8] = b"{\"query\": \"q\", \"content\": \"d\", \"label\": 1}\n";

#[test]
fn bad_records_are_named_with_file_and_line() {
    for (kind, (line, expected)) in bad_lines() {
        let file = file(&[GOOD_LINE, line, b"\n", GOOD_LINE].concat());
        let options = LoadOptions { kind: Some(kind), ..LoadOptions::new(file.path()) };
        let error = Dataset::load(&options).unwrap_err();
        let path = file.path().display();
        assert_eq!(error.to_string(), format!("{path}:2: {expected}"));
        assert_eq!(error.exit_code(), 2);
        let options = LoadOptions { skip_bad_records: true, ..options };
        let (dataset, report) = Dataset::load(&options).unwrap();
        assert_eq!((dataset.pair_count(), report.dropped_total()), (2, 1), "{expected}");
        let dropped: Vec<_> = report.dropped.into_values().collect();
        assert_eq!(dropped, [Dropped { count: 1, first_line: 2 }]);
    }
}

#[test]
fn skipped_records_are_counted_by_reason() {
    let lines: Vec<_> = bad_lines().map(|(_, (line, _))| line).collect();
    let all = [lines.join(&b'\n'), b"\n".to_vec(), GOOD_LINE.to_vec()].concat();
    let (_, report) = load_with(&all, |options| {
        options.kind = Some(DatasetKind::Pointwise);
        options.skip_bad_records = true;
    })
    .unwrap();
    // The label 1e300 of a hit is out of range when read as pointwise.
    let text = "4 broken JSON (first at line 1)";
    assert!(dropped_list(&report.dropped).contains(text), "{report}");
    assert_eq!(report.dropped[&DropReason::LabelNotFinite].count, 2);
    assert_eq!(report.dropped[&DropReason::LabelOutOfRange].count, 3);
    assert_eq!(report.dropped_total(), lines.len());
}

#[test]
fn an_endless_line_is_a_bad_record() {
    let long = vec![b' '; (64 << 20) + 1];
    let file = file(&[&long, &b"\n"[..], GOOD_LINE].concat());
    let mut options = LoadOptions::new(file.path());
    let error = Dataset::load(&options).unwrap_err().to_string();
    let expected = "the line is over 64 MiB long, expected one record a line";
    assert_eq!(error, format!("{}:1: {expected}", file.path().display()));
    options.skip_bad_records = true;
    let (dataset, report) = Dataset::load(&options).unwrap();
    assert_eq!((dataset.pair(0).line, report.dropped_total()), (2, 1));
}

#[test]
fn files_without_a_usable_record_are_errors() {
    for (bytes, expected) in [
        (&b""[..], ": holds no records, expected one JSON object a line"),
        (b"\n \r\n", ": holds no records, expected one JSON object a line"),
        (
            b"\n{}\n[]",
            ": no usable record is left; dropped 1 wrong type (first at line 3), 1 missing key (first at line 2)",
        ),
    ] {
        let file = file(bytes);
        let mut options = LoadOptions::new(file.path());
        options.skip_bad_records = true;
        let error = Dataset::load(&options).unwrap_err();
        assert_eq!(message(&error, &file.path().display().to_string()), expected);
        assert_eq!(error.exit_code(), 2);
    }
}

#[test]
fn a_missing_file_a_directory_and_an_empty_label_range_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.jsonl");
    let error = Dataset::load(&LoadOptions::new(&missing)).unwrap_err();
    let start = format!("{}: cannot open: No such file", missing.display());
    assert!(error.to_string().starts_with(&start), "{error}");
    let error = Dataset::load(&LoadOptions::new(dir.path())).unwrap_err();
    assert!(error.to_string().contains("cannot read: Is a directory"), "{error}");
    let error = load_with(GOOD_LINE, |options| options.label_max = 0.0).unwrap_err();
    let expected = "the label range 0 to 0 is empty, expected max_label above min_label";
    assert_eq!(error.to_string(), expected);
}
