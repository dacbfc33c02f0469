// libtorch's variable-length attention kernels for CUDA, on packed batches. Both are reached through
// the dispatcher, so that this links against a libtorch without CUDA; autograd knows their
// derivatives.
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_efficient_attention_forward.h>
#include <ATen/ops/_flash_attention_forward.h>

#include "attention.h"
#include "shim.h"

namespace {

std::optional<int64_t> limit(int64_t keys) {
  return keys < 0 ? std::nullopt : std::optional<int64_t>(keys);
}

// The number of sdp::CustomMaskType.
constexpr int64_t kNoMask = 0;
constexpr int64_t kCausalFromTopLeft = 1;

}  // namespace

extern "C" {

// q[T, heads, dim], k and v[T, kv_heads, dim] in bf16 or fp16; cu_seqlens int32 [B + 1] on the same
// device. -> a new tensor [T, heads, dim].
char* rr_flash_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* cu_seqlens,
                         int64_t longest, const RrAttention* options, at::Tensor** out) {
  return rr::guarded([&] {
    const RrAttention& o = *options;
    rr::check_projections(*q, k, v, o);
    TORCH_CHECK(cu_seqlens->scalar_type() == at::kInt && cu_seqlens->device() == q->device(),
                "flash attention takes int32 boundaries on the device of the projections");
    *out = new at::Tensor(std::get<0>(at::_flash_attention_forward(
        *q, *k, *v, *cu_seqlens, *cu_seqlens, longest, longest, o.dropout,
        /*is_causal=*/o.right == 0, /*return_debug_mask=*/false, o.scale, limit(o.left),
        limit(o.right))));
  });
}

// The same in any float precision, with kv_heads == heads, and no window but the causal one.
char* rr_efficient_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, at::Tensor* cu_seqlens,
                             int64_t longest, const RrAttention* options, at::Tensor** out) {
  return rr::guarded([&] {
    const RrAttention& o = *options;
    rr::check_projections(*q, k, v, o);
    TORCH_CHECK(o.kv_heads == o.heads && o.left < 0 && o.right <= 0,
                "efficient attention takes as many key heads as heads, and no sliding window");
    const bool train = at::GradMode::is_enabled() &&
                       (q->requires_grad() || k->requires_grad() || v->requires_grad());
    const at::Tensor attended = std::get<0>(at::_efficient_attention_forward(
        q->unsqueeze(0), k->unsqueeze(0), v->unsqueeze(0), /*bias=*/std::nullopt, *cu_seqlens,
        *cu_seqlens, longest, longest, o.dropout, o.right == 0 ? kCausalFromTopLeft : kNoMask,
        /*compute_log_sumexp=*/train, o.scale));
    *out = new at::Tensor(attended.squeeze(0));
  });
}

}  // extern "C"
