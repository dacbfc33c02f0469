//! The line on a terminal that tells how far training is, drawn over itself.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

use rustix::termios::tcgetwinsize;

/// The least time between two drawings.
const REDRAW: Duration = Duration::from_millis(100);

/// Cells of the bar.
const CELLS: usize = 20;

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

    /// Draws `text`. The launcher keeps what ends in a carriage return below the log, cut to its
    /// terminal's width; on a terminal of our own that is done here.
    pub(super) fn draw(&mut self, text: &str) {
        self.drawn = Some(Instant::now());
        let line = if self.direct {
            let width = tcgetwinsize(std::io::stderr()).map_or(0, |size| usize::from(size.ws_col));
            // A terminal that nobody gave a size says 0.
            let width = if width == 0 { 80 } else { width };
            let cut: String = text.chars().take(width.saturating_sub(1)).collect();
            format!("{cut}\x1b[K\r")
        } else {
            format!("{text}\r")
        };
        // Whoever closed stderr does not want to see progress; training goes on.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
}

impl std::fmt::Display for Progress {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { step, total, loss, lr, pairs_per_s, left_s, memory } = *self;
        let (full, percent) = (step * CELLS / total.max(1), step * 100 / total.max(1));
        let bar = "█".repeat(full) + &"░".repeat(CELLS - full.min(CELLS));
        write!(
            out,
            "{percent:>3} %  step {step}/{total}  loss {loss:.4}  lr {lr:.1e}  \
             {pairs_per_s:.0} pairs/s  {} left",
            clock(left_s)
        )?;
        if let Some(bytes) = memory {
            write!(out, "  {:.1} GB", bytes as f64 / 1e9)?;
        }
        // Last, because a narrow terminal cuts the end off.
        write!(out, "  {bar}")
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
    fn the_line_says_everything_on_eighty_columns_but_the_whole_bar() {
        let progress = Progress {
            step: 150,
            total: 400,
            loss: 0.43217,
            lr: 1.9e-5,
            pairs_per_s: 39.6,
            left_s: 83.0,
            memory: Some(1_250_000_000),
        };
        let text = " 37 %  step 150/400  loss 0.4322  lr 1.9e-5  40 pairs/s  1:23 left  1.2 GB  ";
        assert!(text.len() < 80);
        assert_eq!(progress.to_string(), text.to_owned() + "███████░░░░░░░░░░░░░");
        let done = Progress { step: 400, memory: None, ..progress }.to_string();
        let ends = done.ends_with(&("left  ".to_owned() + &"█".repeat(20)));
        assert!(done.starts_with("100 %  step 400/400") && ends, "{done}");
    }
}
