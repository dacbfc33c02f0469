//! What makes a run on a GPU repeatable is in force when it is asked for, and stands in no operation's
//! way. The kernels themselves run on GPUs only (`scripts/gpu-check.sh` resumes a run there).
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod common;

use common::ranks::{Case, STRATEGIES, assert_close, train};
use reranker::torch_ext::runtime;
use tch::{Kind, Tensor};

#[test]
fn deterministic_algorithms_are_taken_and_training_needs_no_other() {
    let base = Case::reference(2, Some(0.5));
    let before = &train(base)[0];
    let trouble = runtime::use_deterministic_algorithms().unwrap_err();
    assert!(trouble.contains("CUBLAS_WORKSPACE_CONFIG=:4096:8"), "{trouble}");
    runtime::fix_cublas_workspace();
    runtime::use_deterministic_algorithms().unwrap();

    // One of those that libtorch says have none.
    let mut row = Tensor::zeros([3], (Kind::Float, tch::Device::Cpu));
    let (index, value) = (Tensor::from_slice(&[0_i64]), Tensor::from_slice(&[1_f32]));
    let refused = row.f_put_(&index, &value, false).unwrap_err().to_string();
    assert!(refused.contains("does not have a deterministic implementation"), "{refused}");

    for (_, sharding) in STRATEGIES {
        for kind in [Kind::Float, Kind::BFloat16] {
            let case = Case { sharding, ranks: 2, kind, recompute: true, ..base };
            let tolerance = if kind == Kind::Float { 1e-5 } else { 3e-2 };
            for outcome in &train(case) {
                assert_close(case, outcome, before, tolerance);
            }
        }
    }
}
