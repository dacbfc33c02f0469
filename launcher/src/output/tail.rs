//! The last lines of a worker, for the report of its death.

use std::collections::VecDeque;

/// Lines that are remembered.
const LINES: usize = 20;

/// Bytes of each that are remembered; the stream itself has it whole.
const BYTES: usize = 2000;

/// Remembers the last lines of a worker, of both its streams, in a bounded amount of memory.
#[derive(Debug, Default)]
pub struct Tail {
    lines: VecDeque<Vec<u8>>,
}

impl Tail {
    /// Takes a line, and forgets the oldest if there are too many.
    pub fn push(&mut self, line: &[u8]) {
        let mut buffer = if self.lines.len() == LINES {
            self.lines.pop_front().unwrap_or_default()
        } else {
            Vec::new()
        };
        buffer.clear();
        buffer.extend_from_slice(&line[..line.len().min(BYTES)]);
        self.lines.push_back(buffer);
    }

    /// The remembered lines, the oldest first.
    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.lines.iter().map(Vec::as_slice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_last_lines_are_kept_and_long_ones_are_cut() {
        let mut tail = Tail::default();
        assert_eq!(tail.lines().count(), 0);
        for number in 0..LINES + 5 {
            tail.push(number.to_string().as_bytes());
        }
        assert_eq!(tail.lines().next(), Some(&b"5"[..]));
        assert_eq!(tail.lines().count(), LINES);
        tail.push(&[b'x'; BYTES + 1]);
        assert_eq!(tail.lines().last().map(<[u8]>::len), Some(BYTES));
    }
}
