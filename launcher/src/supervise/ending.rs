//! The ends: of an attempt, of the launch with its last output, and of a launcher that cannot go on.

use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Instant;

use super::Supervisor;
use crate::attempt::Token;
use crate::contract::vars;
use crate::lifecycle::{Cause, Event, Order};
use crate::nodes::Cluster;
use crate::output::Reader;
use crate::report;
use crate::summary::AttemptRecord;
use crate::sys::{self, Epoll, Interest};

impl Supervisor {
    /// Everybody is gone: the last output, the report, and what comes next.
    pub(super) fn conclude(&mut self) -> io::Result<Option<Order>> {
        self.drain()?;
        for sink in self.output.console.sinks() {
            sink.clear_status();
        }
        let (told, step) = self.take_settlement();
        let cause = self.lifecycle.cause();
        let order = self.tell(Event::AllGone { step }, Instant::now());
        let blamed = cause.and_then(Cause::rank);
        let keeps_lines = |rank| order.is_none() || Some(rank) == blamed;
        let record = self.attempt.record(cause, keeps_lines);
        for line in report::lines(
            &record,
            told.as_deref(),
            self.lifecycle.verdict(),
            self.options.max_restarts,
        ) {
            self.output.say(&line);
        }
        if order.is_none() && cause.is_some() {
            self.hand_on_error(&record);
        }
        self.summary.attempts.push(record);
        let code = order.is_none().then(|| self.lifecycle.exit_code());
        self.write_summary(code);
        self.write_out()?;
        Ok(order)
    }

    /// The last words are out: the exit code. What cuts them short does not change what the run came to.
    pub(super) fn finish(mut self) -> io::Result<u8> {
        let code = self.lifecycle.exit_code();
        self.write_to_the_end()?;
        self.guardian.dismiss();
        self.cluster.take().into_iter().for_each(Cluster::part);
        Ok(code)
    }

    /// Whoever started the launcher may want to read a worker's exception, as torchrun hands it on.
    fn hand_on_error(&mut self, record: &AttemptRecord) {
        let wanted =
            std::env::var_os(vars::TORCHELASTIC_ERROR_FILE).filter(|path| !path.is_empty());
        let (Some(path), Some(error)) = (wanted, record.error()) else { return };
        if let Err(problem) = error.write(Path::new(&path), self.lifecycle.exit_code()) {
            let path = path.to_string_lossy();
            self.output.say(&format!("cannot write the exception into {path}: {problem}"));
        }
    }

    pub(super) fn write_summary(&mut self, exit_code: Option<u8>) {
        let Some(dir) = &self.options.output.log_dir else { return };
        if let Err(error) = self.summary.write(dir, self.lifecycle.verdict(), exit_code) {
            let dir = dir.display();
            self.output.say(&format!("cannot write the summary into {dir}: {error}"));
        }
    }

    /// Reads what the workers have left in their pipes, and no more: a process that escaped its
    /// group may hold a pipe open for ever.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        for index in 0..self.attempt.pipes.len() {
            let Some(file) = &self.attempt.pipes[index].file else { continue };
            let mut left = sys::readable_bytes(file.as_fd());
            while left > 0 {
                let Some(file) = &mut self.attempt.pipes[index].file else { break };
                let size = left.min(self.buffer.len());
                let count = file.read(&mut self.buffer[..size])?;
                if count == 0 {
                    break;
                }
                left -= count;
                self.take_in(index, count);
            }
            self.end_of_output(index);
        }
        Ok(())
    }

    /// Writes what is left, for as long as it takes; a signal cuts it short.
    fn write_to_the_end(&mut self) -> io::Result<()> {
        self.watch_nothing_else()?;
        loop {
            self.write_out()?;
            if self.output.console.sinks().iter().all(|sink| sink.reader() != Reader::Slow) {
                return Ok(());
            }
            self.epoll.wait(None)?;
            while let Some(signal) = self.requests.next() {
                if signal != libc::SIGCHLD {
                    return Ok(());
                }
            }
        }
    }

    /// From now on only signals and room for output wake the loop: another node that has hung up would
    /// without end.
    fn watch_nothing_else(&mut self) -> io::Result<()> {
        self.epoll = Epoll::new()?;
        self.requests.watch(&self.epoll, Token::Signals.pack())?;
        for (index, sink) in self.output.console.sinks().iter().enumerate() {
            if sink.reader() == Reader::Slow {
                self.epoll.add(sink.as_fd(), Interest::Write, Token::Sink(index).pack())?;
            }
        }
        Ok(())
    }

    /// The launcher itself has failed: the others are told, and the summary.
    pub(super) fn give_up(&mut self, code: u8) {
        if let Some(cluster) = self.cluster.take() {
            cluster.gives_up(code);
        }
        self.write_summary(Some(code));
        // As far as it goes: the error is said in any case.
        let _ = self.write_out();
    }
}
