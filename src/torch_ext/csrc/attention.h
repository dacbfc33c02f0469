// What the attention kernels share: how to attend, and whether tensors fit that.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>

// How to attend; the order is the Rust struct's.
struct RrAttention {
  const int64_t* cu_seqlens;  // [sequences + 1], from 0 to T
  size_t boundaries;          // sequences + 1
  int64_t heads;
  int64_t kv_heads;           // divides heads
  int64_t left;               // keys before the own position that a query sees; -1: all
  int64_t right;              // keys after it; -1: all
  double scale;
  double dropout;             // in [0, 1)
  int64_t seed;
};

namespace rr {

// Throws unless q, k and v (or the fused q alone, with k and v null) are what `o` says; returns the
// width of a head.
inline int64_t check_projections(const at::Tensor& q, const at::Tensor* k, const at::Tensor* v,
                                 const RrAttention& o) {
  TORCH_CHECK(o.heads >= 1 && o.kv_heads >= 1 && o.heads % o.kv_heads == 0, "packed attention: ",
              o.heads, " heads do not divide by ", o.kv_heads, " key and value heads");
  TORCH_CHECK(o.dropout >= 0.0 && o.dropout < 1.0, "packed attention: dropout must be in [0, 1)");
  const int64_t* const end = o.cu_seqlens + o.boundaries;
  TORCH_CHECK(q.dim() >= 1 && o.boundaries >= 1 && o.cu_seqlens[0] == 0 && end[-1] == q.size(0) &&
                  std::is_sorted(o.cu_seqlens, end),
              "packed attention: cu_seqlens must rise from 0 to the number of tokens");
  if (k == nullptr) {
    const int64_t all = o.heads + 2 * o.kv_heads;
    TORCH_CHECK(q.dim() == 2 && q.size(1) % all == 0, "packed attention: expected [T, ", all,
                " heads x dim], found ", q.sizes());
    return q.size(1) / all;
  }
  auto fits = [&](const at::Tensor& x, int64_t heads) {
    TORCH_CHECK(x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == heads &&
                    x.size(2) == q.size(2) && x.device() == q.device() &&
                    x.scalar_type() == q.scalar_type(),
                "packed attention: expected [", q.size(0), ", ", heads, " heads, dim] like q, found ",
                x.sizes());
  };
  TORCH_CHECK(q.dim() == 3, "packed attention: expected q as [T, heads, dim], found ", q.sizes());
  fits(q, o.heads);
  fits(*k, o.kv_heads);
  fits(*v, o.kv_heads);
  return q.size(2);
}

}  // namespace rr
