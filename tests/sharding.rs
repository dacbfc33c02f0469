//! Every way of dividing the work takes the steps of one rank that holds everything.
//!
//! Ranks are threads of this process, each with a Gloo group of its own over loopback.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::ranks::{
    Case, Outcome, STRATEGIES, Trainer, ZERO2, ZERO3, assert_close, on_ranks, train,
};
use reranker::shard::{HeldBytes, Offload};
use tch::Kind;

#[test]
fn every_strategy_takes_the_steps_of_one_rank() {
    for accumulation in [1, 2] {
        for max_grad_norm in [None, Some(0.5)] {
            let base = Case::reference(accumulation, max_grad_norm);
            let reference = &train(base)[0];
            for (_, sharding) in STRATEGIES {
                for ranks in 1..=4 {
                    for recompute in [false, true] {
                        for offloaded in [false, true] {
                            let offload = Offload {
                                states: offloaded,
                                parameters: offloaded && sharding.parameters,
                            };
                            let case = Case { sharding, ranks, recompute, offload, ..base };
                            for outcome in &train(case) {
                                assert_close(case, outcome, reference, 1e-5);
                            }
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn hybrid_sharding_takes_the_steps_of_one_rank() {
    for accumulation in [1, 2] {
        for max_grad_norm in [None, Some(0.5)] {
            let base = Case::reference(accumulation, max_grad_norm);
            let reference = &train(base)[0];
            for sharding in [ZERO2, ZERO3] {
                for (ranks, block) in [(2, 1), (4, 2), (4, 1)] {
                    for (recompute, offloaded) in
                        [(false, false), (true, false), (false, true), (true, true)]
                    {
                        let offload = Offload {
                            states: offloaded,
                            parameters: offloaded && sharding.parameters,
                        };
                        let block = Some(block);
                        let case = Case { sharding, ranks, block, recompute, offload, ..base };
                        for outcome in &train(case) {
                            assert_close(case, outcome, reference, 1e-5);
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn the_same_run_twice_is_bit_identical() {
    for (name, sharding) in STRATEGIES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let base = Case::reference(2, Some(0.5));
            let case = Case { sharding, ranks: 3, kind, recompute: true, ..base };
            let (first, second) = (train(case), train(case));
            for (a, b) in first.iter().zip(&second) {
                assert_eq!(a.parameters, b.parameters, "{name} {kind:?}");
                assert_eq!(a.losses, b.losses, "{name} {kind:?}");
            }
        }
    }
}

#[test]
fn low_precision_stays_near_fp32() {
    let base = Case::reference(2, Some(0.5));
    let reference = &train(base)[0];
    // bf16 keeps 8 bits, fp16 keeps 11.
    for (kind, tolerance) in [(Kind::BFloat16, 3e-2), (Kind::Half, 5e-3)] {
        for (_, sharding) in STRATEGIES {
            for ranks in [1, 2] {
                let case = Case { sharding, ranks, kind, ..base };
                for outcome in &train(case) {
                    assert_close(case, outcome, reference, tolerance);
                }
            }
        }
    }
}

/// The formulas of the ZeRO paper (section 3), in bytes per element: parameters and gradients in
/// the computing precision, states in fp32, each over the number of ranks where it is divided.
#[test]
fn held_bytes_equal_the_formulas() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let width = kind.elt_size_in_bytes();
        // Moments, and master weights beside low-precision parameters.
        let state_width = if kind == Kind::Float { 8 } else { 12 };
        for (name, sharding) in STRATEGIES {
            for ranks in [1, 2, 4] {
                let case = Case { sharding, ranks, kind, ..Case::reference(2, None) };
                for outcome in &train(case) {
                    let part = |divided: bool| if divided { ranks } else { 1 };
                    let Outcome { elements, largest, held, peak, forecast, .. } = outcome;
                    assert_eq!(forecast.held, *held, "{name}: the forecast");
                    // Divided low-precision parameters are kept as the fp32 master weights alone,
                    // which the states count.
                    let parameters = match (sharding.parameters, kind) {
                        (true, Kind::BFloat16) => 0,
                        _ => elements * width / part(sharding.parameters),
                    };
                    let expected = HeldBytes {
                        parameters,
                        gradients: elements * width / part(sharding.gradients),
                        states: elements * state_width / part(sharding.states),
                        host: 0,
                    };
                    assert_eq!(*held, expected, "{name}, {ranks} ranks, {kind:?}, between steps");
                    // While a stage computes: its parameters and those gathered ahead, its
                    // gradients and those being reduced.
                    let two_stages = 2 * largest * width;
                    assert!(
                        peak.parameters <= expected.parameters + two_stages,
                        "{name}: {peak:?}"
                    );
                    assert!(peak.gradients <= expected.gradients + two_stages, "{name}: {peak:?}");
                    assert_eq!(peak.states, expected.states, "{name}");
                }
            }
        }
    }
}

#[test]
fn what_is_offloaded_is_held_by_the_host_alone() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for sharding in [ZERO2, ZERO3] {
            let offload = Offload { states: true, parameters: sharding.parameters };
            let case = Case { sharding, ranks: 2, kind, offload, ..Case::reference(1, None) };
            for outcome in &train(case) {
                let Outcome { elements, held, forecast, .. } = outcome;
                let width = kind.elt_size_in_bytes();
                let expected = HeldBytes {
                    parameters: if sharding.parameters { 0 } else { elements * width },
                    gradients: elements * width / 2,
                    states: 0,
                    // fp32 master weights and two moments.
                    host: elements * 12 / 2,
                };
                assert_eq!(*held, expected, "{case:?}");
                assert_eq!(forecast.held, expected, "{case:?}: the forecast");
            }
        }
    }
}

#[test]
fn gradients_may_be_reduced_in_fp32() {
    let reference = &train(Case::reference(2, Some(0.5)))[0];
    for (name, sharding) in STRATEGIES {
        let base = Case::reference(2, Some(0.5));
        let case = Case { sharding, ranks: 3, kind: Kind::BFloat16, reduce_fp32: true, ..base };
        for outcome in &train(case) {
            assert_close(case, outcome, reference, 3e-2);
            assert_eq!(outcome.forecast.held, outcome.held, "{name}: the forecast");
            // Where they are whole, those of a backward pass, and in fp32 those of the step so far.
            let each =
                if sharding.gradients { 4 * outcome.elements / 3 } else { 6 * outcome.elements };
            assert_eq!(outcome.held.gradients, each, "{name}");
        }
    }
}

/// In bf16 a sum of many micro-batches stops growing: these would differ by a hundredth.
#[test]
fn micro_batches_are_added_up_in_fp32_under_every_strategy() {
    let base = Case { kind: Kind::BFloat16, reduce_fp32: true, ..Case::reference(64, None) };
    let norm_of_a_step = |case: Case| {
        let norms = on_ranks(case, None, move |groups| {
            let mut trainer = Trainer::new(case, groups);
            trainer.steps(0, 1, groups);
            trainer.norms[0]
        });
        norms[0]
    };
    let expected = norm_of_a_step(Case { sharding: ZERO2, ..base });
    for (name, sharding) in STRATEGIES {
        for ranks in [1, 2] {
            let norm = norm_of_a_step(Case { sharding, ranks, ..base });
            let difference = (norm - expected).abs() / expected;
            let tolerance = if ranks == 1 { 1e-6 } else { 1e-3 };
            assert!(difference <= tolerance, "{name}, {ranks} ranks: {norm}, expected {expected}");
        }
    }
}
