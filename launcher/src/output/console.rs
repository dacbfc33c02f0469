//! The launcher's own stdout and stderr.

use std::io;
use std::os::fd::AsFd as _;

use super::{Sink, Stream};

/// The launcher's own stdout and stderr. Where both lead to the same file, pipe or terminal they
/// are one sink: two queues could interleave inside a line.
pub struct Console {
    sinks: Vec<Sink>,
}

impl Console {
    /// The process's standard streams.
    pub fn new() -> io::Result<Self> {
        let stdout = Sink::new(io::stdout().as_fd())?;
        let stderr = Sink::new(io::stderr().as_fd())?;
        let shared = stdout.is_same_as(&stderr)?;
        Ok(Self { sinks: if shared { vec![stdout] } else { vec![stdout, stderr] } })
    }

    /// The number, below [`Self::sinks`]' length, of the sink that a stream goes to.
    pub fn index_of(&self, stream: Stream) -> usize {
        match stream {
            Stream::Stdout => 0,
            Stream::Stderr => self.sinks.len() - 1,
        }
    }

    /// The sink that a stream goes to.
    pub fn sink(&mut self, stream: Stream) -> &mut Sink {
        let index = self.index_of(stream);
        &mut self.sinks[index]
    }

    /// All sinks, one or two.
    pub fn sinks(&mut self) -> &mut [Sink] {
        &mut self.sinks
    }

    /// The sinks whose readers have just become too slow (true) or quick enough again (false).
    pub fn pressure(&mut self) -> Vec<(usize, bool)> {
        let sinks = self.sinks.iter_mut().enumerate();
        sinks.filter_map(|(index, sink)| Some((index, sink.pressure_change()?))).collect()
    }
}
