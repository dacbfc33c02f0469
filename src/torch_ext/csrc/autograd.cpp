// Staged backward: what tch lacks to hand gradients from one stage's graph to the next, and the
// fused optimizer step on flat slices.
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <ATen/Context.h>
#include <ATen/ops/_fused_adamw.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GradMode.h>

#include "shim.h"

extern "C" {

void rr_free_message(char* text) { std::free(text); }

// Backward through the graphs of `roots`, seeded with `grads` (same shapes), adding into the
// .grad of every leaf reached. The graphs are freed.
char* rr_backward(at::Tensor* const* roots, at::Tensor* const* grads, size_t count) {
  return rr::guarded([&] {
    torch::autograd::variable_list root_list;
    torch::autograd::variable_list grad_list;
    for (size_t i = 0; i < count; ++i) {
      root_list.push_back(*roots[i]);
      grad_list.push_back(*grads[i]);
    }
    torch::autograd::backward(root_list, grad_list, /*retain_graph=*/false);
  });
}

// Makes `grad` (a view into a flat buffer, say) the accumulation target of the leaf `leaf`.
// Autograd adds into a defined .grad in place as long as no graph is being created.
char* rr_set_grad(at::Tensor* leaf, at::Tensor* grad) {
  return rr::guarded([&] {
    TORCH_CHECK(leaf->is_leaf() && leaf->requires_grad(), "set_grad needs a leaf that requires grad");
    leaf->mutable_grad() = *grad;
  });
}

// Gives the memory of `tensor`'s storage back, and takes it again (uninitialised). Views and saved
// graph nodes keep pointing at the storage, so parameters can be absent between two uses.
char* rr_storage_resize(at::Tensor* tensor, size_t bytes) {
  return rr::guarded([&] {
    c10::StorageImpl* storage = tensor->storage().unsafeGetStorageImpl();
    TORCH_CHECK(storage->allocator() != nullptr, "this storage has no allocator");
    storage->set_data_ptr_noswap(storage->allocator()->allocate(bytes));
    storage->set_nbytes(bytes);
  });
}

// Bytes that `tensor`'s storage holds now.
size_t rr_storage_bytes(const at::Tensor* tensor) {
  return tensor->storage().nbytes();
}

// From now on operations take their deterministic algorithm, or fail where they have none. New memory
// stays uninitialized: nothing here reads what it has not written.
char* rr_deterministic_algorithms() {
  return rr::guarded([&] {
    at::globalContext().setDeterministicAlgorithms(/*b=*/true, /*warn_only=*/false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
  });
}

// The most bytes that tensors held at once on GPU `device`, as its allocator counted.
char* rr_peak_gpu_bytes(int device, size_t* out) {
  return rr::guarded([&] {
    const auto stats =
        c10::getDeviceAllocator(c10::kCUDA)->getDeviceStats(static_cast<c10::DeviceIndex>(device));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *out = static_cast<size_t>(stats.allocated_bytes[all].peak);
  });
}

// The hyper-parameters of one AdamW call; the order is the Rust struct's.
struct RrAdamW {
  double lr;
  double beta1;
  double beta2;
  double weight_decay;
  double eps;
};

// One fused AdamW step on flat fp32 slices: param, grad, exp_avg, exp_avg_sq are 1-d and of one
// length, `step` is a scalar fp32 tensor that already counts this step.
char* rr_fused_adamw(at::Tensor* param, at::Tensor* grad, at::Tensor* exp_avg,
                     at::Tensor* exp_avg_sq, at::Tensor* step, const RrAdamW* h) {
  return rr::guarded([&] {
    c10::NoGradGuard no_grad;
    at::_fused_adamw_({*param}, {*grad}, {*exp_avg}, {*exp_avg_sq}, {}, {*step}, h->lr, h->beta1,
                      h->beta2, h->weight_decay, h->eps, /*amsgrad=*/false, /*maximize=*/false);
  });
}

}  // extern "C"
