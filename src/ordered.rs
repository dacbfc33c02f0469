//! A map over an iterator in background threads, with results in order and bounded memory.

use std::any::Any;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use crate::error::{Error, Result};

/// An item on its way to a worker, with where its result goes.
struct Job<T, R> {
    item: T,
    result: Sender<Result<R>>,
}

/// The results of [`ordered_map`], in the order of the items. It ends after the first error.
///
/// Dropping it ends the threads: workers after the item in hand, the source's thread when the
/// source returns from the `next` it may be in.
#[derive(Debug)]
pub struct OrderedMap<R> {
    /// One receiver for each item, in order: a worker answers on it.
    pending: Receiver<Receiver<Result<R>>>,
    /// Dropped to tell all threads to stop; nothing is ever sent.
    stop: Option<Sender<Infallible>>,
    workers: Vec<JoinHandle<()>>,
}

/// Applies `work` to every item of `source` in `threads` threads, at most `ahead` items before the
/// consumer.
///
/// An error of the source, an error of `work`, and a panic in either come out as an `Err` in the
/// place of the item.
///
/// # Errors
/// [`Error::Training`] when the system gives no more threads.
pub fn ordered_map<S, T, R, F>(
    source: S,
    threads: usize,
    ahead: usize,
    work: F,
) -> Result<OrderedMap<R>>
where
    S: Iterator<Item = Result<T>> + Send + 'static,
    T: Send + 'static,
    R: Send + 'static,
    F: Fn(T) -> Result<R> + Send + Sync + 'static,
{
    let (stop, stopped) = bounded::<Infallible>(0);
    // An item counts against `ahead` from here until the consumer asks for it.
    let (pending_sender, pending) = bounded(ahead.max(1));
    let (job_sender, jobs) = bounded::<Job<T, R>>(ahead.max(1));
    let work = Arc::new(work);
    let mut map = OrderedMap { pending, stop: Some(stop), workers: Vec::new() };
    for number in 0..threads.max(1) {
        let (jobs, stopped, work) = (jobs.clone(), stopped.clone(), Arc::clone(&work));
        let worker = spawn(&format!("tokenize-{number}"), move || {
            while let Some(Job { item, result }) = next_job(&jobs, &stopped) {
                let outcome = catch_unwind(AssertUnwindSafe(|| work(item)));
                // Nobody listens any more when the consumer is gone.
                let _ = result.send(outcome.unwrap_or_else(|panic| Err(panicked(&*panic))));
            }
        })?;
        map.workers.push(worker);
    }
    spawn("tokenize-feed", move || {
        let _ = feed(source, &pending_sender, &job_sender, &stopped);
    })?;
    Ok(map)
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let builder = thread::Builder::new().name(name.to_owned());
    builder.spawn(body).map_err(|error| Error::Training(format!("cannot start a thread: {error}")))
}

/// `None` when there will be no more, or nobody wants more.
fn next_job<T, R>(jobs: &Receiver<Job<T, R>>, stopped: &Receiver<Infallible>) -> Option<Job<T, R>> {
    select! {
        recv(stopped) -> _ => None,
        recv(jobs) -> job => job.ok(),
    }
}

/// Hands items to the workers until the source ends; `None` when the consumer went away first.
fn feed<T, R>(
    mut source: impl Iterator<Item = Result<T>>,
    pending: &Sender<Receiver<Result<R>>>,
    jobs: &Sender<Job<T, R>>,
    stopped: &Receiver<Infallible>,
) -> Option<()> {
    loop {
        let item = match catch_unwind(AssertUnwindSafe(|| source.next())) {
            Ok(item) => item.transpose(),
            Err(panic) => Err(panicked(&*panic)),
        };
        let (result, receiver) = bounded(1);
        match item {
            Ok(None) => return Some(()),
            Ok(Some(item)) => {
                send_unless(pending, receiver, stopped)?;
                send_unless(jobs, Job { item, result }, stopped)?;
            }
            Err(error) => {
                result.send(Err(error)).ok()?;
                return send_unless(pending, receiver, stopped);
            }
        }
    }
}

fn send_unless<M>(to: &Sender<M>, message: M, stopped: &Receiver<Infallible>) -> Option<()> {
    select! {
        recv(stopped) -> _ => None,
        send(to, message) -> sent => sent.ok(),
    }
}

fn panicked(panic: &(dyn Any + Send)) -> Error {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let message = text.unwrap_or_else(|| "no message".to_owned());
    Error::Training(format!("a tokenizing thread panicked: {message}"))
}

impl<R> Iterator for OrderedMap<R> {
    type Item = Result<R>;

    fn next(&mut self) -> Option<Self::Item> {
        self.stop.as_ref()?;
        // The feeding thread is gone and nothing is left of what it sent.
        let Ok(result) = self.pending.recv() else {
            self.stop = None;
            return None;
        };
        let gone = || Err(Error::Training("a tokenizing thread ended without an answer".into()));
        let outcome = result.recv().unwrap_or_else(|_| gone());
        if outcome.is_err() {
            self.stop = None;
        }
        Some(outcome)
    }
}

impl<R> Drop for OrderedMap<R> {
    fn drop(&mut self) {
        self.stop = None;
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its work, so there is nothing to hear here.
            let _ = worker.join();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::{Duration, Instant};

    use super::*;

    fn numbers(end: u64) -> impl Iterator<Item = Result<u64>> + Send + 'static {
        (0..end).map(Ok)
    }

    #[test]
    fn results_keep_their_order() {
        for threads in [1, 4] {
            let slow_first = |i: u64| {
                thread::sleep(Duration::from_micros((i * 7919) % 300));
                Ok(i * i)
            };
            let map = ordered_map(numbers(200), threads, 8, slow_first).unwrap();
            let squares: Vec<u64> = map.map(|result| result.unwrap()).collect();
            assert_eq!(squares, (0..200).map(|i| i * i).collect::<Vec<_>>());
        }
    }

    #[test]
    fn errors_and_panics_come_out_in_their_place_and_end_the_stream() {
        let failing = |i: u64| match i {
            3 => Err(Error::Training("three".into())),
            _ => Ok(i),
        };
        let panicking = |i: u64| {
            assert!(i != 3, "no {i}");
            Ok(i)
        };
        let source =
            || (0..5).map(|i| if i == 3 { Err(Error::Usage("src".into())) } else { Ok(i) });
        let bad_source = (0..5).map(|i: u64| {
            assert!(i != 3, "source");
            Ok(i)
        });
        let thread_error = "a tokenizing thread panicked: ";
        for (map, expected) in [
            (ordered_map(numbers(9), 2, 4, failing), "three".to_owned()),
            (ordered_map(numbers(9), 2, 4, panicking), format!("{thread_error}no 3")),
            (ordered_map(source(), 2, 4, Ok), "src".to_owned()),
            (ordered_map(bad_source, 2, 4, Ok), format!("{thread_error}source")),
        ] {
            let mut map = map.unwrap();
            for i in 0..3 {
                assert_eq!(map.next().unwrap().unwrap(), i);
            }
            assert_eq!(map.next().unwrap().unwrap_err().to_string(), expected);
            assert!(map.next().is_none());
        }
    }

    /// Waits for a reference to be the last one: then every thread that held another is gone.
    fn wait_until_alone<T>(last: &Arc<T>) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while Arc::strong_count(last) > 1 {
            assert!(Instant::now() < deadline, "a thread did not end");
            thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn dropping_the_consumer_ends_the_threads() {
        for taken in [0, 1, 5] {
            let held = Arc::new(());
            let (by_source, by_work) = (Arc::clone(&held), Arc::clone(&held));
            let endless = (0_u64..).map(move |i| {
                assert!(Arc::strong_count(&by_source) > 0);
                Ok(i)
            });
            let work = move |i| {
                assert!(Arc::strong_count(&by_work) > 0);
                Ok(i)
            };
            let mut map = ordered_map(endless, 3, 2, work).unwrap();
            assert_eq!(map.by_ref().take(taken).count(), taken);
            drop(map);
            wait_until_alone(&held);
        }
    }

    #[test]
    fn no_more_than_ahead_is_drawn_from_the_source() {
        let drawn = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&drawn);
        let source = (0..1000_u64).map(move |i| {
            counter.fetch_add(1, Ordering::SeqCst);
            Ok(i)
        });
        let mut map = ordered_map(source, 2, 4, Ok).unwrap();
        assert_eq!(map.next().unwrap().unwrap(), 0);
        // One taken, four waiting, one in the hands of the feeding thread.
        while drawn.load(Ordering::SeqCst) < 5 {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(100));
        assert!(drawn.load(Ordering::SeqCst) <= 6);
        assert_eq!(map.count(), 999);
    }

    #[test]
    fn an_empty_source_gives_nothing() {
        assert!(ordered_map(numbers(0), 2, 2, Ok).unwrap().next().is_none());
    }
}
