//! The teacher of a distillation, whose scores become the training labels.
//!
//! `<output_dir>/teacher/train.jsonl` holds them, a line a pair in the order of the training data,
//! and `job.json` beside it what they were made of. An interrupted job goes on where it was.

use std::fs::{self, Metadata};
use std::io::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rr_launch::contract::{WorkerEnv, heartbeat, preemption};
use serde_json::{Value, json};
use tch::Device;
use tracing::{info, warn};

use super::inputs::settle_together;
use crate::atomic::{StagedFile, create_dir};
use crate::checkpoint::tell_reading;
use crate::checkpoint::training::file_crc32;
use crate::comm::{Communicator, Reduction, reduce_values, work_together};
use crate::config::{Plan, TeacherPlan};
use crate::data::{DatasetKind, InputFormat, LoadOptions};
use crate::error::{Error, Result};
use crate::model::Pretrained;
use crate::score::{self, Checked, CrossEncoder, Earlier, FileJob, Progress, ScoreOptions, Writer};
use crate::torch_ext::runtime;

/// The directory inside the output directory.
const DIR: &str = "teacher";
const SCORES: &str = "train.jsonl";
const JOB: &str = "job.json";
/// Where the latter says what they were made of, to see at once that nothing has changed.
const FILES: &str = "files";
/// And where to see that nothing has, although files are others by their times.
const CONTENTS: &str = "contents";
const PROGRAM: &str = concat!("reranker ", env!("CARGO_PKG_VERSION"));
/// The label's key in a line of scores: the sigmoid of the teacher's logit.
const LABEL: &str = "score";
/// Between two lines of the log that say how far it is.
const SAY: Duration = Duration::from_secs(10);
/// Between two looks for what rank 0 writes.
const LOOK: Duration = Duration::from_millis(20);
/// From rank 0's last look at its scores until the others see what it wrote of them, at most: over NFS
/// a file shows up late.
const LAST_WORDS: Duration = Duration::from_secs(60);

fn place(plan: &Plan, name: &str) -> PathBuf {
    plan.saving.output_dir.join(DIR).join(name)
}

/// How the training data is read for a run with a teacher: with its scores once they are there,
/// without any labels before. `taught` says that they are there.
///
/// # Errors
/// As [`files`].
pub(super) fn load_options(
    plan: &Plan,
    teacher: &TeacherPlan,
    taught: bool,
) -> Result<LoadOptions> {
    let kind = Some(DatasetKind::Pointwise);
    Ok(if taught || is_whole(plan, &files(plan, teacher)?) {
        LoadOptions { kind, label_key: Some(LABEL.into()), ..LoadOptions::new(place(plan, SCORES)) }
    } else {
        LoadOptions { kind, label_key: None, ..LoadOptions::new(&plan.data.train) }
    })
}

/// The file whose contents are the training data: the teacher's scores where there is a teacher,
/// `None` before they are there.
pub(super) fn labelled(plan: &Plan) -> Option<PathBuf> {
    match plan.data.teacher {
        None => Some(plan.data.train.clone()),
        Some(_) => Some(place(plan, SCORES)).filter(|path| path.exists()),
    }
}

/// Opens the teacher and throws it away: what is wrong with it is known before a launch.
///
/// # Errors
/// As loading it for good.
pub fn check(plan: &Plan) -> Result<()> {
    let Some(teacher) = &plan.data.teacher else { return Ok(()) };
    let options = score::LoadOptions { prompt: teacher.prompt.as_deref(), ..Default::default() };
    let examined = CrossEncoder::examine(&teacher.path, options, teacher.max_len);
    let unscored = examined.map_err(|error| named(plan, error))?;
    if unscored.is_empty() {
        return Ok(());
    }
    Err(plan.error(
        "teacher.model_name_or_path",
        format!(
            "{} has no {}, so that its scores mean nothing; expected a reranker",
            teacher.path,
            unscored.join(", ")
        ),
    ))
}

/// Scores the training data with the teacher as one of the workers that `env` describes, and trains
/// nothing.
///
/// # Errors
/// [`Error::File`] when the plan has no teacher; what scoring reports.
pub fn run_scores(plan: &Plan, env: &WorkerEnv) -> Result<()> {
    let Some(teacher) = &plan.data.teacher else { return Err(missing(plan)) };
    super::check_output(plan)?;
    let device = runtime::device(plan.parallel.device, env.local_rank)?;
    let groups = super::join(plan, env, device)?;
    let outcome = super::checkpoints::lock(plan, env, &groups).and_then(|_lock| {
        settle_together(plan, env, groups.world.as_ref())?;
        teach(plan, teacher, device, groups.world.as_ref())
    });
    if outcome.is_err() {
        std::mem::forget(groups);
        return outcome;
    }
    groups.world.leave()
}

/// The error of a distillation without a teacher.
#[must_use]
pub fn missing(plan: &Plan) -> Error {
    let message = "no teacher; expected a section teacher with model_name_or_path";
    Error::File { path: plan.sources.training.clone(), message: message.into() }
}

/// Scores the training data with the teacher, over all ranks of `comm`, which call it together,
/// unless an earlier start has done so.
///
/// # Errors
/// What reading, scoring or writing reports; [`Error::Comm`] from `comm`.
pub(super) fn teach(
    plan: &Plan,
    teacher: &TeacherPlan,
    device: Device,
    comm: &dyn Communicator,
) -> Result<()> {
    // Rank 0 says what the scores are made of: files of the same bytes have other names and times on
    // another machine.
    let is_first = comm.rank() == 0;
    let files = if is_first { Some(files(plan, teacher)?) } else { None };
    if !agreed(comm, files.as_ref().is_some_and(|files| is_whole(plan, files)))? {
        let made_of = || files.map(|files| made_of(plan, teacher, &files)).transpose();
        // To read all of a large teacher takes longer than a rank waits for another.
        let made_of = work_together(comm, made_of, tell_reading)??;
        let is_same = made_of.as_ref().is_some_and(|made_of| is_same(plan, made_of));
        if !agreed(comm, is_same)? {
            return make(plan, teacher, made_of.as_ref(), device, comm);
        }
        if let Some(made_of) = made_of {
            put_down(plan, &made_of)?;
        }
    }
    if is_first {
        info!("the scores of {} are in {}", teacher.path, place(plan, SCORES).display());
    }
    Ok(())
}

/// Whether something holds on rank 0. All ranks call it together.
fn agreed(comm: &dyn Communicator, holds: bool) -> Result<bool> {
    let mut said = [f64::from(u8::from(holds))];
    reduce_values(comm, &mut said, Reduction::Max)?;
    Ok(said[0] > 0.0)
}

/// Makes the scores; rank 0 says what of.
fn make(
    plan: &Plan,
    teacher: &TeacherPlan,
    made_of: Option<&Value>,
    device: Device,
    comm: &dyn Communicator,
) -> Result<()> {
    let mut said = [made_of.map_or(0.0, |made_of| f64::from(digest(made_of)))];
    reduce_values(comm, &mut said, Reduction::Max)?;
    let job = FileJob {
        input: plan.data.train.clone(),
        format: InputFormat::JsonLines,
        output: place(plan, SCORES),
        echo: true,
    };
    let checked = job.check(comm)?;
    if comm.rank() == 0 {
        create_dir(&plan.saving.output_dir.join(DIR))?;
        // From here on what is there is not whole.
        match fs::remove_file(place(plan, JOB)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::Io { path: place(plan, JOB), action: "remove", source: error });
            }
            _ => {}
        }
    }
    let first = score(teacher, &job, checked, device, comm).map_err(|error| named(plan, error))?;
    match made_of {
        Some(made_of) => put_down(plan, made_of),
        None => wait(plan, said[0] as u32, &first, comm.rank()),
    }
}

/// Waits until rank 0, which holds its log of scores as long as it works on them, has put down what
/// they are made of. It may have more left to do than a collective's deadline allows.
fn wait(plan: &Plan, made_of: u32, first: &Writer, rank: usize) -> Result<()> {
    heartbeat::waiting(format_args!("rank 0 to write the teacher's scores"));
    let mut gone = None;
    while !is_done(plan, made_of) {
        if preemption::is_requested() {
            return Err(Error::Preempted);
        }
        if first.has_ended() && gone.get_or_insert_with(Instant::now).elapsed() >= LAST_WORDS {
            return Err(Error::Comm {
                rank,
                operation: "waiting for the teacher's scores".into(),
                message: "rank 0 ended before they were written".into(),
            });
        }
        std::thread::sleep(LOOK);
    }
    Ok(())
}

/// Scores this rank's part; returns what tells whether rank 0 is still at work.
fn score(
    teacher: &TeacherPlan,
    job: &FileJob,
    checked: Checked,
    device: Device,
    comm: &dyn Communicator,
) -> Result<Writer> {
    let (started, is_first) = (Instant::now(), comm.rank() == 0);
    let TeacherPlan { path, prompt, max_len, batch_size } = teacher;
    let prompt = prompt.as_deref();
    let load = score::LoadOptions { device, prompt, ..score::LoadOptions::default() };
    let model = CrossEncoder::load(path, load)?;
    let options = ScoreOptions { batch_size: *batch_size, max_len: *max_len, normalize: true };
    if is_first && model.is_bare() {
        warn!(
            "{path} is a decoder without reranker.json; query and document are put together as they are"
        );
    }
    let (store, earlier) = job.open(&model, checked, &options, comm)?;
    match earlier {
        Earlier::Scores(scores) if is_first => {
            info!("{path} goes on scoring: {scores} pairs are scored already");
        }
        Earlier::OtherJob(keys) if is_first => {
            warn!("scores of another job ({} differs) are made anew", keys.join(", "));
        }
        _ if is_first => info!("{path} scores {}", job.input.display()),
        _ => {}
    }
    let first = store.writer(0);
    let mut said = started;
    let pairs =
        job.run(&model, store, checked.chunks, &options, |Progress { due, done, .. }| {
            if is_first && said.elapsed() >= SAY {
                said = Instant::now();
                let left =
                    started.elapsed().as_secs_f64() * (due - done) as f64 / done.max(1) as f64;
                info!("scored {} %, {left:.0} s left", 100 * done / due.max(1));
            }
        })?;
    if let Some(pairs) = pairs {
        let (to, seconds) = (job.output.display(), started.elapsed().as_secs_f64());
        info!("{path} scored {pairs} pairs in {seconds:.1} s: {to}");
    }
    Ok(first)
}

/// Whether the scores are whole and were made of what has this [`digest`].
fn is_done(plan: &Plan, made_of: u32) -> bool {
    let said = fs::read(place(plan, JOB)).unwrap_or_default();
    crc32fast::hash(&said) == made_of && place(plan, SCORES).exists()
}

/// Whether the scores are whole and were made of these [`files`].
fn is_whole(plan: &Plan, files: &Value) -> bool {
    earlier(plan)[FILES] == *files && place(plan, SCORES).exists()
}

/// Whether the scores are whole and were made of other files, copies for example, with the same in them.
fn is_same(plan: &Plan, made_of: &Value) -> bool {
    earlier(plan)[CONTENTS] == made_of[CONTENTS] && place(plan, SCORES).exists()
}

/// What the scores that are there were made of; null where there are none that are whole.
fn earlier(plan: &Plan) -> Value {
    let said = fs::read(place(plan, JOB)).unwrap_or_default();
    serde_json::from_slice(&said).unwrap_or_default()
}

/// Says, beside the scores, what they were made of.
fn put_down(plan: &Plan, made_of: &Value) -> Result<()> {
    let path = place(plan, JOB);
    let file = StagedFile::new(&path)?;
    let failed = |source| Error::Io { path: path.clone(), action: "write", source };
    file.writer()?.write_all(made_of.to_string().as_bytes()).map_err(failed)?;
    file.publish()
}

/// A number for what scores are made of: the CRC-32 of its text, as it is written down.
fn digest(made_of: &Value) -> u32 {
    crc32fast::hash(made_of.to_string().as_bytes())
}

/// What scores are made of, by the names and times of `files` and by their contents.
fn made_of(plan: &Plan, teacher: &TeacherPlan, files: &Value) -> Result<Value> {
    let sum = |path: &Path| file_crc32(path).map(|sum| json!(format!("{sum:08x}")));
    let mut sums = serde_json::Map::new();
    for path in teacher_files(plan, teacher)? {
        // The same teacher may lie elsewhere.
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let entry = sums.entry(name).or_insert_with(|| json!([]));
        if let Some(sums) = entry.as_array_mut() {
            sums.push(sum(&path)?);
        }
    }
    let mut asked = json!(teacher);
    if let Some(asked) = asked.as_object_mut() {
        asked.remove("model_name_or_path");
    }
    let contents = json!({
        "program": PROGRAM,
        "teacher": sums,
        "asked": asked,
        "data": sum(&plan.data.train)?,
    });
    Ok(json!({FILES: files, CONTENTS: contents}))
}

/// The files of a teacher, in the order of its directories and of their names.
fn teacher_files(plan: &Plan, teacher: &TeacherPlan) -> Result<Vec<PathBuf>> {
    let dirs = Pretrained::directories(&teacher.path).map_err(|error| named(plan, error))?;
    let mut files = Vec::new();
    for dir in dirs {
        let read = |source| Error::Io { path: dir.clone(), action: "read", source };
        let entries = fs::read_dir(&dir).map_err(read)?;
        let paths = entries.map(|entry| Ok(entry.map_err(read)?.path()));
        let mut paths = paths.collect::<Result<Vec<PathBuf>>>()?;
        paths.retain(|path| path.is_file());
        paths.sort();
        files.extend(paths);
    }
    Ok(files)
}

/// What the scores depend on, by the names, sizes and times of files, so that nothing large is read
/// to see that they are there.
fn files(plan: &Plan, teacher: &TeacherPlan) -> Result<Value> {
    let state = |path: &Path| {
        let failed = |source| Error::Io { path: path.to_owned(), action: "read", source };
        path.metadata().map(|metadata| state(&metadata)).map_err(failed)
    };
    let mut files = serde_json::Map::new();
    for path in teacher_files(plan, teacher)? {
        files.insert(path.to_string_lossy().into_owned(), state(&path)?);
    }
    let data = &plan.data.train;
    Ok(json!({
        "program": PROGRAM,
        "teacher": files,
        "asked": teacher,
        "data": {"path": data, "state": state(data)?},
    }))
}

/// The size of a file and the times of its last change: of its contents, which a copy takes along, and of
/// anything about it, which it does not.
fn state(metadata: &Metadata) -> Value {
    let times =
        [(metadata.mtime(), metadata.mtime_nsec()), (metadata.ctime(), metadata.ctime_nsec())];
    json!([metadata.len(), times])
}

/// An error about the teacher, at the place where it was asked for.
fn named(plan: &Plan, error: Error) -> Error {
    match error {
        Error::Usage(message) => plan.error("teacher.model_name_or_path", message),
        other => other,
    }
}
