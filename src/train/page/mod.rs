//! `runs/report.html`: a run on one page that needs nothing beside itself, written anew while the run
//! trains and at its end.
//!
//! The page is a fixed program (`report.html`, `report.css`, `report.js`) and one JSON object, which
//! the program draws. Texts of users go into that object alone, and from there into text nodes.

mod curve;
mod environment;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rr_launch::contract::WorkerEnv;
use serde_json::{Value, json};
use tracing::warn;

use super::inputs::Inputs;
use super::launch::Attempt;
use super::preflight::Preflight;
use super::trackers::{RESUMED_AFTER, figures};
use super::worst::{QueryReport, RankedHit, RankedQuery};
use crate::atomic::StagedFile;
use crate::data::{Content, Dataset};
use crate::error::{Error, Result};
use crate::text::PairTokenizer;
use curve::Curve;

/// The page's file, beside the metrics.
const FILE: &str = "report.html";

/// The time between two writings, except at the beginning.
const PAUSE: Duration = Duration::from_secs(5);

/// At the beginning it is one part in this many of the time since the start.
const EARLY: u32 = 10;

/// Writing takes at most one part in this many of a run's time.
const SHARE: u32 = 100;

/// The most characters of a text on the page.
const TEXT: usize = 1200;

const TEMPLATE: &str = include_str!("report.html");
const STYLE: &str = include_str!("report.css");
const PROGRAM: &str = include_str!("report.js");

/// Where a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    /// It trains.
    Training,
    /// It took all of its steps.
    Finished,
    /// Validations stopped getting better.
    StoppedEarly,
    /// It made room, and goes on when it is started again.
    Preempted,
    /// It failed.
    Failed,
}

impl Status {
    fn name(self) -> &'static str {
        match self {
            Self::Training => "training",
            Self::Finished => "finished",
            Self::StoppedEarly => "stopped early",
            Self::Preempted => "preempted",
            Self::Failed => "failed",
        }
    }
}

/// The page of a run, on rank 0. Dropped before its end, it says that the run failed.
#[derive(Debug)]
pub(super) struct Page {
    path: PathBuf,
    /// What does not change while the run trains, as JSON.
    about: String,
    validation: Option<Arc<Dataset>>,
    tokenizer: Arc<PairTokenizer>,
    status: Status,
    curves: BTreeMap<String, Curve>,
    totals: Totals,
    /// The last line of each type of `metrics.jsonl`.
    last: BTreeMap<String, Value>,
    /// The best validation line, where the plan keeps the best model.
    best: Option<Value>,
    /// How the last validation ranked its queries.
    queries: Value,
    started: Instant,
    written: Instant,
    took: Duration,
    is_broken: bool,
}

/// Sums over the starts of a run, each of which counts from 0.
#[derive(Debug, Default)]
struct Totals {
    /// Steps after which the run was started again.
    resumed_after: Vec<u64>,
    step: u64,
    /// Of earlier starts.
    before: [f64; 3],
    /// Of this one: seconds, pairs, tokens.
    now: [f64; 3],
}

impl Totals {
    fn add(&mut self, line: &Value) {
        let now = ["elapsed_s", "pairs", "tokens"].map(|key| line[key].as_f64().unwrap_or(0.0));
        let from = line[RESUMED_AFTER].as_u64();
        // The line that says it may be one that could not be written.
        if self.step > 0 && (from.is_some() || now[0] < self.now[0]) {
            self.resumed_after.push(from.unwrap_or(self.step));
            self.before = std::array::from_fn(|i| self.before[i] + self.now[i]);
        }
        self.now = now;
        self.step = line["step"].as_u64().unwrap_or(self.step);
    }

    fn to_json(&self) -> Value {
        let [seconds, pairs, tokens] = std::array::from_fn(|i| self.before[i] + self.now[i]);
        json!({
            "step": self.step, "elapsed_s": seconds, "pairs": pairs, "tokens": tokens,
            "resumed_after": self.resumed_after,
        })
    }
}

impl Page {
    /// The page of a run that keeps its metrics in `dir`; `earlier` are the lines of metrics that it
    /// goes on from.
    pub(super) fn new(dir: &Path, earlier: &str, inputs: &Inputs, about: &About<'_>) -> Self {
        let mut page = Self {
            path: dir.join(FILE),
            about: about.to_json().to_string(),
            validation: inputs.validation.clone(),
            tokenizer: Arc::clone(&inputs.tokenizer),
            status: Status::Training,
            curves: BTreeMap::new(),
            totals: Totals::default(),
            last: BTreeMap::new(),
            best: None,
            queries: Value::Null,
            started: Instant::now(),
            written: Instant::now(),
            took: Duration::ZERO,
            is_broken: false,
        };
        for line in earlier.lines().filter_map(|line| serde_json::from_str(line).ok()) {
            page.take(&line);
        }
        page.write();
        page
    }

    /// Takes a line of metrics, and writes the page where the last time is long enough ago.
    pub(super) fn line(&mut self, line: &Value) {
        self.take(line);
        let pause = PAUSE.min(self.started.elapsed() / EARLY);
        if self.written.elapsed() >= pause.max(self.took * SHARE) {
            self.write();
        }
    }

    fn take(&mut self, line: &Value) {
        let kind = line["type"].as_str().unwrap_or_default();
        if let Some(step) = line["step"].as_u64() {
            for (name, figure) in figures(line) {
                self.curves.entry(name).or_default().add(step, figure);
            }
        }
        if kind == "train" {
            self.totals.add(line);
        }
        if line["best"] == true {
            self.best = Some(line.clone());
        }
        self.last.insert(kind.to_owned(), line.clone());
    }

    /// Takes what the validation after `step` steps found of its queries; its line follows.
    pub(super) fn queries(&mut self, step: usize, report: &QueryReport) {
        let Some(data) = &self.validation else { return };
        let worst: Vec<Value> = report.worst.iter().map(|query| self.query(data, query)).collect();
        self.queries = json!({"step": step, "bins": report.bins, "worst": worst});
    }

    fn query(&self, data: &Dataset, query: &RankedQuery) -> Value {
        let pair = data.pair(query.relevant.pair);
        let hit = |hit: &RankedHit| {
            let pair = data.pair(hit.pair);
            json!({
                "rank": hit.rank,
                "score": hit.score,
                "label": pair.label,
                "text": self.text(data.document(&pair)),
            })
        };
        json!({
            "query": self.text(data.query(pair.query)),
            "line": pair.line,
            "ndcg": query.ndcg,
            "hits": query.hits,
            "relevant": hit(&query.relevant),
            "top": query.top.iter().map(hit).collect::<Vec<_>>(),
        })
    }

    /// The text of a query or document, its beginning where it is long. Of a data set that is kept as
    /// tokens it is what the tokenizer makes of them.
    fn text(&self, content: Content<'_>) -> String {
        let text = match content {
            Content::Text(text) => text.to_owned(),
            Content::Tokens(tokens) => {
                let mut ids = tokens.to_vec();
                ids.truncate(TEXT);
                self.tokenizer.decode(&ids)
            }
        };
        match text.char_indices().nth(TEXT) {
            Some((end, _)) => format!("{}…", &text[..end]),
            None => text,
        }
    }

    /// Writes the page for the last time.
    pub(super) fn finish(&mut self, status: Status) {
        self.status = status;
        self.write();
    }

    /// Writes the page; once that fails it is given up: training is worth more.
    fn write(&mut self) {
        if self.is_broken {
            return;
        }
        let started = Instant::now();
        if let Err(error) = self.try_writing() {
            warn!("the report page is not written any more: {error}");
            self.is_broken = true;
        }
        self.written = Instant::now();
        self.took = started.elapsed();
    }

    fn try_writing(&self) -> Result<()> {
        let curves = self.curves.iter().map(|(name, curve)| (name.clone(), curve.to_json()));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |now| now.as_secs_f64());
        let run = json!({
            "status": self.status.name(),
            "written": now,
            "totals": self.totals.to_json(),
            "last": self.last,
            "best": self.best,
            "curves": curves.collect::<serde_json::Map<_, _>>(),
            "queries": self.queries,
        });
        let file = StagedFile::new(&self.path)?;
        let page = fill(&format!("{{\"about\":{},\"run\":{run}}}", self.about));
        file.writer()?.write_all(page.as_bytes()).map_err(|source| Error::Io {
            path: self.path.clone(),
            action: "write",
            source,
        })?;
        file.publish()
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if self.status == Status::Training {
            self.finish(Status::Failed);
        }
    }
}

/// What the page says of a run from its start on.
pub(super) struct About<'a> {
    /// What it is to do.
    pub(super) attempt: &'a Attempt<'a>,
    /// This worker.
    pub(super) env: &'a WorkerEnv,
    /// What was known before it began.
    pub(super) preflight: &'a Preflight,
    /// Where this worker computes.
    pub(super) device: tch::Device,
}

impl About<'_> {
    fn to_json(&self) -> Value {
        let Self { attempt, env, preflight, device } = *self;
        let plan = attempt.plan;
        let origins = plan.origins.iter();
        let name = plan.saving.output_dir.file_name().unwrap_or_default().to_string_lossy();
        json!({
            "name": name,
            "plan": plan.to_json(),
            "origins": origins
                .map(|(key, origin)| (key.clone(), json!(origin.place.to_string())))
                .collect::<serde_json::Map<_, _>>(),
            "notices": plan.notices,
            "preflight": preflight,
            "environment": environment::describe(env, device),
        })
    }
}

/// The page with its data. In JSON `<` stands in texts only, where an escape says the same; without
/// it no text ends the element that holds the data.
fn fill(data: &str) -> String {
    let parts = [("/*style*/", STYLE), ("/*data*/", &data.replace('<', "\\u003c"))];
    let mut page = String::with_capacity(TEMPLATE.len() + STYLE.len() + PROGRAM.len() + data.len());
    let mut rest = TEMPLATE;
    for (mark, part) in parts.into_iter().chain([("/*program*/", PROGRAM)]) {
        let (before, after) = rest.split_once(mark).unwrap_or((rest, ""));
        page.extend([before, part]);
        rest = after;
    }
    page.push_str(rest);
    page
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_text_ends_the_element_that_holds_the_data() {
        let nasty = json!({"text": "</script><script>alert(1)</script><!-- 深度 /*program*/"});
        let page = fill(&nasty.to_string());
        assert_eq!(page.matches("</script>").count(), TEMPLATE.matches("</script>").count());
        let (_, data) = page.split_once("type=\"application/json\">").unwrap_or_default();
        let (data, _) = data.split_once("</script>").unwrap_or_default();
        assert_eq!(serde_json::from_str::<Value>(data).ok(), Some(nasty));
        assert!(page.contains(PROGRAM) && page.contains(STYLE));
    }

    #[test]
    fn a_start_anew_goes_on_counting() {
        let mut totals = Totals::default();
        let line = |step: u64, seconds: f64| json!({"step": step, "elapsed_s": seconds, "pairs": step * 2, "tokens": 1});
        for line in [line(10, 5.0), line(20, 9.0), line(30, 4.0), line(40, 8.0)] {
            totals.add(&line);
        }
        // One that comes to its first line later than the one before it did to its last.
        let mut first = line(60, 8.5);
        first[RESUMED_AFTER] = json!(45);
        totals.add(&first);
        let totals = totals.to_json();
        assert_eq!(totals["elapsed_s"], 25.5);
        assert_eq!(totals["pairs"], 40.0 + 80.0 + 120.0);
        assert_eq!(totals["resumed_after"], json!([20, 45]));
        assert_eq!(totals["step"], 60);
    }
}
