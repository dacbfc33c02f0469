//! The workers' output on its way to the launcher's own and to files: split into lines ([`lines`]),
//! remembered for the report ([`Tail`]), marked with the rank ([`Template`]), and written without ever
//! tearing a line or making the event loop wait ([`Sink`], [`LogFile`]).

mod clock;
mod console;
mod lines;
mod log_file;
mod options;
mod sink;
mod tail;
mod template;
mod voice;

use std::fs;
use std::io;
use std::path::Path;
use std::time::Instant;

use clock::Clock;
pub use console::Console;
pub use lines::{LineSplitter, Piece};
use log_file::LogFile;
pub use options::{Format, Options, Show};
pub use sink::{Reader, Sink};
pub use tail::Tail;
use template::Fields;
pub use template::Template;
pub use voice::Voice;

use crate::error::LaunchError;
use crate::procfs;

/// The file of all workers' lines and the launcher's own, in the log directory.
pub const MERGED: &str = "launch.log";

/// What the launcher's own lines begin with.
const OWN: &[u8] = b"rr-launch: ";

/// One of the two output streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Results.
    Stdout,
    /// Everything else.
    Stderr,
}

impl Stream {
    /// `stdout` or `stderr`.
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Where lines go: the console, the merged file, and each rank's own.
pub struct Output {
    /// The launcher's own stdout and stderr.
    pub console: Console,
    options: Options,
    merged: Option<LogFile>,
    host: String,
    clock: Clock,
    /// A line in JSON, made once for all that take it.
    json: Vec<u8>,
    /// Whether it was said that files lack lines.
    has_warned: bool,
}

impl Output {
    /// Opens the process's streams and, where there is to be a log directory, the merged file.
    pub fn open(options: Options) -> Result<Self, LaunchError> {
        let console = Console::new().map_err(LaunchError::system("open the output"))?;
        let open = |dir: &Path| {
            fs::create_dir_all(dir).map_err(|error| refusal(dir, &error))?;
            let path = dir.join(MERGED);
            LogFile::open(path.clone()).map_err(|error| refusal(&path, &error))
        };
        let merged = options.log_dir.as_deref().map(open).transpose()?;
        Ok(Self {
            console,
            options,
            merged,
            host: procfs::hostname(),
            clock: Clock::default(),
            json: Vec::new(),
            has_warned: false,
        })
    }

    /// The voices of an attempt's workers, each given by its rank and its rank on this host. Files
    /// that cannot be opened end a launch before it begins; a restart goes without them.
    pub fn voices(
        &mut self,
        attempt: u32,
        ranks: impl Iterator<Item = (usize, usize)>,
    ) -> Result<Vec<Voice>, LaunchError> {
        self.console.sinks().iter_mut().for_each(Sink::forget_pressure);
        let mut voices = Vec::new();
        for (rank, local_rank) in ranks {
            let file = self.rank_file(attempt, rank)?;
            let prefix = |stream: Stream| {
                let (host, stream) = (self.host.as_str(), stream.name());
                self.options.prefix.fill(Fields { rank, local_rank, host, stream })
            };
            let prefixes = [prefix(Stream::Stdout), prefix(Stream::Stderr)];
            voices.push(Voice::new(rank, prefixes, self.options.show.shows(rank), file));
        }
        Ok(voices)
    }

    /// Passes on a piece of a worker's output. On a terminal only rank 0 has a status.
    pub fn pass_on(&mut self, voice: &mut Voice, stream: Stream, piece: Piece<'_>) {
        match piece {
            Piece::Line(line) => {
                voice.take_status(stream);
                voice.tail.push(line);
                self.line(voice, stream, line, voice.is_shown);
            }
            Piece::Status(status) => {
                if voice.rank == 0 && voice.is_shown && self.options.format == Format::Text {
                    self.console.sink(stream).set_status(status);
                }
                if let Some(sample) = voice.set_status(stream, status, Instant::now()) {
                    self.line(voice, stream, &sample, false);
                }
            }
        }
    }

    /// A stream has ended. The status that stood last is the last that is known of the worker.
    pub fn end(&mut self, voice: &mut Voice, stream: Stream) {
        if let Some(status) = voice.take_status(stream) {
            voice.tail.push(&status);
            self.line(voice, stream, &status, false);
        }
    }

    /// Queues a line of the launcher's own, on stderr.
    pub fn say(&mut self, line: &str) {
        self.own_line(line, true);
    }

    /// Queues a line of the launcher's own for the merged file alone.
    pub fn note(&mut self, line: &str) {
        self.own_line(line, false);
    }

    /// Writes what is queued for files. A full disk costs their lines, not the job.
    pub fn write_files(&mut self, voices: &mut [Voice]) {
        let (format, clock) = (self.options.format, &mut self.clock);
        let mut gap = |lines: u64| {
            let text = format!("{lines} lines are missing here, for which there was no room");
            match format {
                Format::Text => [OWN, text.as_bytes()].concat(),
                Format::Json => {
                    let mut json = Vec::new();
                    record(&mut json, clock.now(), None, "launcher", text.as_bytes());
                    json
                }
            }
        };
        let mut trouble = None;
        let files = voices.iter_mut().filter_map(|voice| voice.file.as_mut());
        for file in self.merged.iter_mut().chain(files) {
            if let Err(error) = file.flush(&mut gap) {
                trouble.get_or_insert_with(|| {
                    format!("cannot write {}: {error}", file.path().display())
                });
            }
        }
        if let Some(trouble) = trouble {
            self.warn(&trouble);
        }
    }

    /// Sends a worker's line to its file, to the merged one and, if asked, to the console.
    fn line(&mut self, voice: &mut Voice, stream: Stream, line: &[u8], on_console: bool) {
        let Self { console, options, merged, clock, json, .. } = self;
        let rank = voice.rank;
        let (prefix, file) = voice.parts(stream);
        let (prefix, line) = match options.format {
            Format::Text => {
                if let Some(file) = file {
                    file.line(b"", line);
                }
                (prefix.now(clock), line)
            }
            Format::Json => {
                record(json, clock.now(), Some(rank), stream.name(), line);
                if let Some(file) = file {
                    file.line(b"", json);
                }
                (&b""[..], json.as_slice())
            }
        };
        if let Some(merged) = merged {
            merged.line(prefix, line);
        }
        if on_console {
            console.sink(stream).line(prefix, line);
        }
    }

    fn own_line(&mut self, line: &str, on_console: bool) {
        let Self { console, options, merged, clock, json, .. } = self;
        let (prefix, line) = match options.format {
            Format::Text => (OWN, line.as_bytes()),
            Format::Json => {
                record(json, clock.now(), None, "launcher", line.as_bytes());
                (&b""[..], json.as_slice())
            }
        };
        if let Some(merged) = merged {
            merged.line(prefix, line);
        }
        if on_console {
            console.sink(Stream::Stderr).line(prefix, line);
        }
    }

    fn rank_file(&mut self, attempt: u32, rank: usize) -> Result<Option<LogFile>, LaunchError> {
        let Some(dir) = &self.options.log_dir else { return Ok(None) };
        let dir = dir.join(format!("attempt-{attempt}"));
        let path = dir.join(format!("rank-{rank}.log"));
        match fs::create_dir_all(dir).and_then(|()| LogFile::open(path.clone())) {
            Ok(file) => Ok(Some(file)),
            Err(error) if attempt == 0 => Err(refusal(&path, &error)),
            Err(error) => {
                self.warn(&format!("cannot open {}: {error}", path.display()));
                Ok(None)
            }
        }
    }

    fn warn(&mut self, trouble: &str) {
        if !self.has_warned {
            self.has_warned = true;
            self.say(&format!("{trouble}; the job goes on, its log files lack lines"));
        }
    }
}

fn refusal(path: &Path, error: &io::Error) -> LaunchError {
    LaunchError::Usage(format!("--log-dir: cannot write to {}: {error}", path.display()))
}

/// A line as a JSON object, without its end. What is not UTF-8 becomes U+FFFD. The launcher's own
/// lines have no rank.
fn record(json: &mut Vec<u8>, time: &str, rank: Option<usize>, stream: &str, line: &[u8]) {
    use io::Write as _;

    json.clear();
    let rank = rank.map_or("null".to_owned(), |rank| rank.to_string());
    let line = String::from_utf8_lossy(line);
    // Writing into a vector never fails.
    let _ = write!(json, r#"{{"time":"{time}","rank":{rank},"stream":"{stream}","line":"#);
    let _ = serde_json::to_writer(&mut *json, &*line);
    json.push(b'}');
}
