//! The NCCL backend's own logic, over a stand-in for the library, its ranks threads and its device the host:
//! joining, every collective, training, and what happens when a peer fails or does not come. That
//! the real library does what the stand-in does is checked on a GPU by `scripts/gpu-check.sh`.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::ranks::{
    Case, STRATEGIES, ZERO3, assert_close, environment, free_port, gloo, train, train_over,
};
use reranker::Error;
use reranker::comm::{Communicator, Gloo, Groups, Nccl, Pending, Place, Reduction, reduce_values};
use reranker::torch_ext::nccl;
use tch::{Device, Kind, Tensor};

/// Longer than any wait here should be.
const PATIENCE: Duration = Duration::from_secs(60);

/// The stand-in, compiled once.
fn library() -> PathBuf {
    static LIBRARY: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let out = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("libfake_nccl.so");
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fake_nccl/nccl.c");
        let flags = ["-std=c11", "-O1", "-shared", "-fPIC", "-pthread", "-o"];
        let status = Command::new("cc").args(flags).arg(&out).arg(source).status().unwrap();
        assert!(status.success(), "the stand-in does not compile");
        out
    };
    LIBRARY.get_or_init(make).clone()
}

/// Runs `job` as every rank of a world; returns what each made of it.
fn ranks<T: Send + 'static>(
    count: usize,
    timeout: Duration,
    job: impl Fn(Result<Nccl, Error>, usize) -> T + Clone + Send + 'static,
) -> Vec<T> {
    tch::set_num_threads(1);
    let port = free_port();
    let library = nccl::Nccl::load(library()).unwrap();
    let threads: Vec<_> = (0..count)
        .map(|rank| {
            let (job, library) = (job.clone(), Arc::clone(&library));
            std::thread::spawn(move || {
                let host = gloo(port, rank, count, timeout);
                job(Nccl::join(host, library, Device::Cpu, timeout), rank)
            })
        })
        .collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
}

#[test]
fn every_collective_in_every_precision() {
    let kinds = [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half, Kind::Int64, Kind::Uint8];
    for outcome in ranks(3, PATIENCE, move |comm, rank| {
        let comm = comm.unwrap();
        assert_eq!((comm.rank(), comm.world_size()), (rank, 3));
        for kind in kinds {
            // 10 r, 10 r + 1, …: small enough for eight bits in every sum.
            let mine =
                || Tensor::arange(6, (Kind::Double, Device::Cpu)).to_kind(kind) + 10 * rank as i64;
            let sums = [30.0, 33.0, 36.0, 39.0, 42.0, 45.0];
            let tensor = mine().to_kind(kind);
            comm.all_reduce(&tensor, Reduction::Sum).unwrap().wait().unwrap();
            assert_eq!(values(&tensor), sums, "{kind:?}");
            let tensor = mine().to_kind(kind);
            comm.all_reduce(&tensor, Reduction::Max).unwrap().wait().unwrap();
            assert_eq!(values(&tensor), [20.0, 21.0, 22.0, 23.0, 24.0, 25.0], "{kind:?}");
            let tensor = mine().to_kind(kind);
            comm.all_reduce(&tensor, Reduction::Min).unwrap().wait().unwrap();
            assert_eq!(values(&tensor), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0], "{kind:?}");
            let tensor = mine().to_kind(kind);
            comm.reduce_scatter(&tensor, Reduction::Sum).unwrap().wait().unwrap();
            assert_eq!(values(&tensor)[2 * rank..2 * rank + 2], sums[2 * rank..2 * rank + 2]);
            let tensor = mine().to_kind(kind);
            comm.all_gather(&tensor).unwrap().wait().unwrap();
            assert_eq!(values(&tensor), [0.0, 1.0, 12.0, 13.0, 24.0, 25.0], "{kind:?}");
            let tensor = mine().to_kind(kind);
            comm.broadcast(&tensor, 1).unwrap().wait().unwrap();
            assert_eq!(values(&tensor), [10.0, 11.0, 12.0, 13.0, 14.0, 15.0], "{kind:?}");
        }
        comm.barrier().unwrap();
        true
    }) {
        assert!(outcome);
    }
}

#[test]
fn training_is_what_it_is_over_gloo() {
    let base = Case::reference(2, Some(0.5));
    let reference = &train(base)[0];
    for (_, sharding) in STRATEGIES {
        for ranks in [2, 3] {
            let case = Case { sharding, ranks, ..base };
            for outcome in &train_over(case, Some(&library())) {
                assert_close(case, outcome, reference, 1e-5);
            }
        }
    }
    let hybrid = Case { sharding: ZERO3, ranks: 4, block: Some(2), ..base };
    for outcome in &train_over(hybrid, Some(&library())) {
        assert_close(hybrid, outcome, reference, 1e-5);
    }
}

#[test]
fn a_rank_that_leaves_ends_the_others_at_once() {
    let started = Instant::now();
    let outcomes = ranks(3, PATIENCE, |comm, rank| {
        let comm = comm.unwrap();
        let tensor = Tensor::ones([8], (Kind::Float, Device::Cpu));
        comm.all_reduce(&tensor, Reduction::Sum).unwrap().wait().unwrap();
        comm.barrier().unwrap();
        if rank == 1 {
            comm.abort();
            // Its process lives on for a while: only NCCL knows.
            std::thread::sleep(Duration::from_secs(3));
            return String::new();
        }
        comm.set_place(Some(&Place { stage: "layer 3".into(), step: Some(411) }));
        let error = comm.all_reduce(&tensor, Reduction::Sum).and_then(Pending::wait).unwrap_err();
        // Every later call says the same.
        let again = comm.all_gather(&tensor).and_then(Pending::wait).unwrap_err();
        assert_eq!(error.to_string(), again.to_string());
        assert!(comm.barrier().is_err());
        error.to_string()
    });
    assert!(started.elapsed() < PATIENCE / 2, "took {:?}", started.elapsed());
    for rank in [0, 2] {
        assert_eq!(
            outcomes[rank],
            format!(
                "rank {rank}: all_reduce of layer 3, step 412 failed: remote process exited or \
                 there was a network error: a rank has aborted"
            )
        );
    }
}

/// NCCL itself says nothing: as over NVLink, where nobody sees the process go.
#[test]
fn a_process_that_ends_is_noticed_without_nccl() {
    let started = Instant::now();
    let outcomes = ranks(4, PATIENCE, |comm, rank| {
        let comm = comm.unwrap();
        let groups = Groups::hybrid(Box::new(comm), 2).unwrap();
        groups.world.barrier().unwrap();
        if rank == 3 {
            // Its connections close, its communicators stay as they are.
            return String::new();
        }
        let tensor = Tensor::ones([8], (Kind::Float, Device::Cpu));
        let error = groups.world.all_reduce(&tensor, Reduction::Sum).and_then(Pending::wait);
        // The groups of the world are ended with it.
        assert!(
            groups.shard().all_reduce(&tensor, Reduction::Sum).and_then(Pending::wait).is_err()
        );
        error.unwrap_err().to_string()
    });
    assert!(started.elapsed() < PATIENCE / 2, "took {:?}", started.elapsed());
    for (rank, outcome) in outcomes[..3].iter().enumerate() {
        assert_eq!(*outcome, format!("rank {rank}: all_reduce failed: rank 3 has ended"));
    }
}

#[test]
fn ranks_that_leave_together_are_not_missed() {
    for outcome in ranks(3, PATIENCE, |comm, rank| {
        let comm = comm.unwrap();
        comm.leave().unwrap();
        // The others go first, in every order.
        std::thread::sleep(Duration::from_millis(150 * rank as u64));
        comm.failure().map(|error| error.to_string())
    }) {
        assert_eq!(outcome, None);
    }
}

/// Hands on what comes to `listener` to a port of loopback.
fn forward(listener: TcpListener, port: u16) {
    std::thread::spawn(move || {
        for caller in listener.incoming().map_while(Result::ok) {
            let store = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let back = (store.try_clone().unwrap(), caller.try_clone().unwrap());
            for (mut from, mut to) in [(caller, store), back] {
                std::thread::spawn(move || {
                    // The end of one side is that of the other, however it comes.
                    let _ = io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Write);
                });
            }
        }
    });
}

/// As where rank 0 is known by the name of a service, which forwards the store's port and no other.
#[test]
fn an_address_that_leads_to_the_store_alone_is_enough() {
    tch::set_num_threads(1);
    let service = TcpListener::bind("127.0.0.2:0").unwrap();
    let (port, public) = (free_port(), service.local_addr().unwrap().port());
    let library = nccl::Nccl::load(library()).unwrap();
    let start = |rank, place| {
        let library = Arc::clone(&library);
        std::thread::spawn(move || {
            let host = Gloo::join(&environment(place, rank, 2), PATIENCE).unwrap();
            let comm = Nccl::join(host, library, Device::Cpu, PATIENCE).unwrap();
            comm.leave().unwrap();
        })
    };
    let first = start(0, ("127.0.0.1", port));
    let deadline = Instant::now() + PATIENCE;
    while TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(Instant::now() < deadline, "no store");
        std::thread::sleep(Duration::from_millis(5));
    }
    forward(service, port);
    let second = start(1, ("127.0.0.2", public));
    first.join().unwrap();
    second.join().unwrap();
}

#[test]
fn a_peer_that_does_not_come_is_a_timeout() {
    let timeout = Duration::from_secs(2);
    let outcomes = ranks(2, timeout, |comm, rank| {
        let comm = comm.unwrap();
        let tensor = Tensor::ones([8], (Kind::Float, Device::Cpu));
        if rank == 1 {
            // Longer than the other waits.
            std::thread::sleep(Duration::from_secs(4));
            return String::new();
        }
        let started = Instant::now();
        let error = comm.all_gather(&tensor).and_then(Pending::wait).unwrap_err();
        assert!(started.elapsed() >= Duration::from_secs(2));
        error.to_string()
    });
    assert_eq!(
        outcomes[0],
        "rank 0: all_gather failed: timed out after 2 s; a peer is stuck, gone or slow (--timeout)"
    );
}

#[test]
fn small_groups_of_a_world() {
    let sums = ranks(4, PATIENCE, |comm, rank| {
        let groups = Groups::hybrid(Box::new(comm.unwrap()), 2).unwrap();
        let mut total = [rank as f64];
        reduce_values(groups.shard(), &mut total, Reduction::Sum).unwrap();
        let mut across = [rank as f64];
        reduce_values(groups.replicas().unwrap(), &mut across, Reduction::Sum).unwrap();
        groups.world.barrier().unwrap();
        (total[0], across[0])
    });
    assert_eq!(sums, [(1.0, 2.0), (1.0, 4.0), (5.0, 2.0), (5.0, 4.0)]);
}

#[test]
fn a_missing_library_is_said() {
    let message = nccl::Nccl::load("libno_such_nccl.so.2").unwrap_err();
    assert!(message.contains("libno_such_nccl.so.2"), "{message}");
    let version = nccl::Nccl::load(library()).unwrap().version().unwrap();
    assert_eq!(version, (2, 30, 7));
}
