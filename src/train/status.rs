//! The line on a terminal that tells how far training is, drawn over itself.

use std::fs::File;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;

/// The least time between two drawings.
const REDRAW: Duration = Duration::from_millis(100);

/// Cells of the bar: at most, and those below which there is none.
const CELLS: usize = 30;
const FEWEST_CELLS: usize = 4;

/// Columns of a terminal that does not say how many it has.
const COLUMNS: usize = 80;

/// A status line on stderr.
#[derive(Debug)]
pub(super) struct StatusLine {
    drawn: Option<Instant>,
    /// Whether stderr is the terminal itself, rather than the launcher's pipe.
    direct: bool,
}

/// What the line says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    /// Steps taken, of how many.
    pub(super) step: usize,
    pub(super) total: usize,
    pub(super) loss: f64,
    pub(super) lr: f64,
    pub(super) pairs_per_s: f64,
    /// Seconds to the end, at the rate so far.
    pub(super) left_s: f64,
    /// The most bytes this worker has held: of its GPU, or of the host.
    pub(super) memory: Option<usize>,
}

impl StatusLine {
    /// One where stderr is a terminal, or the launcher shows what ends in a carriage return.
    pub(super) fn new(launcher_shows: bool) -> Option<Self> {
        let direct = std::io::stderr().is_terminal();
        (direct || launcher_shows).then_some(Self { drawn: None, direct })
    }

    /// Whether the last drawing is long enough ago.
    pub(super) fn is_due(&self) -> bool {
        self.drawn.is_none_or(|drawn| drawn.elapsed() >= REDRAW)
    }

    /// Draws a line that fits. The launcher keeps what ends in a carriage return below the log.
    pub(super) fn draw(&mut self, progress: &Progress) {
        self.drawn = Some(Instant::now());
        // The last column stays free: some terminals would go on in the next row.
        let text = progress.line(self.columns() - 1);
        let line = if self.direct { format!("{text}\x1b[K\r") } else { format!("{text}\r") };
        // Whoever closed stderr does not want to see progress; training goes on.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    /// Columns of the terminal; behind the launcher's pipe, of the one that both belong to.
    fn columns(&self) -> usize {
        let size = if self.direct {
            tcgetwinsize(std::io::stderr()).ok()
        } else {
            File::open("/dev/tty").ok().and_then(|terminal| tcgetwinsize(terminal).ok())
        };
        size.map(|size| usize::from(size.ws_col)).filter(|&columns| columns > 0).unwrap_or(COLUMNS)
    }
}

impl Progress {
    /// A line of at most `width` columns: the bar becomes shorter or goes, then what stands last.
    fn line(&self, width: usize) -> String {
        let Self { step, total, loss, lr, pairs_per_s, left_s, memory } = *self;
        let mut facts = vec![
            format!("{step}/{total}"),
            format!("loss {loss:.4}"),
            format!("lr {lr:.1e}"),
            format!("{pairs_per_s:.0} pairs/s"),
            format!("{} left", clock(left_s)),
        ];
        facts.extend(memory.map(|bytes| format!("{:.1} GB", bytes as f64 / 1e9)));
        let percent = format!("{:>3} %", step * 100 / total.max(1));
        let columns = |facts: &[String]| {
            percent.len() + facts.iter().map(|fact| 2 + fact.len()).sum::<usize>()
        };
        while columns(&facts) > width && facts.len() > 1 {
            facts.pop();
        }
        let cells = width.saturating_sub(columns(&facts) + 2).min(CELLS);
        if cells >= FEWEST_CELLS {
            let full = (step * cells / total.max(1)).min(cells);
            facts.insert(0, "█".repeat(full) + &"░".repeat(cells - full));
        }
        let line = format!("{percent}  {}", facts.join("  "));
        line.chars().take(width).collect()
    }
}

/// `1:02:03` or `2:03`.
fn clock(seconds: f64) -> String {
    let seconds = seconds.max(0.0) as u64;
    let (hours, minutes, seconds) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    if hours > 0 {
        format!("{hours}:{minutes:02}:{seconds:02}")
    } else {
        format!("{minutes}:{seconds:02}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks() {
        assert_eq!(clock(3.9), "0:03");
        assert_eq!(clock(125.0), "2:05");
        assert_eq!(clock(3723.0), "1:02:03");
    }

    #[test]
    fn the_line_fits_and_the_bar_gives_way_first() {
        let progress = Progress {
            step: 150,
            total: 400,
            loss: 0.43217,
            lr: 1.9e-5,
            pairs_per_s: 39.6,
            left_s: 83.0,
            memory: Some(1_250_000_000),
        };
        let facts = "150/400  loss 0.4322  lr 1.9e-5  40 pairs/s  1:23 left  1.2 GB";
        let bar = |full, empty| "█".repeat(full) + &"░".repeat(empty);
        assert_eq!(progress.line(119), format!(" 37 %  {}  {facts}", bar(11, 19)));
        assert_eq!(progress.line(79), format!(" 37 %  {}  {facts}", bar(3, 5)));
        assert_eq!(progress.line(74), format!(" 37 %  {facts}"));
        let (some, _) = facts.rsplit_once("  ").unwrap_or_default();
        assert_eq!(progress.line(68), format!(" 37 %  {}  {some}", bar(1, 4)));
        for width in 0..150 {
            assert!(progress.line(width).chars().count() <= width, "{width}");
        }
        let done = Progress { step: 400, memory: None, ..progress }.line(100);
        assert!(done.starts_with(&format!("100 %  {}  400/400  loss ", bar(30, 0))), "{done}");
    }
}
