// Attention over packed sequences for the stand-in for CUDA, in plain products: libtorch has those
// operations for CUDA alone. They refuse what flash_api.cpp and attention.cu of libtorch 2.11 refuse.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>

#include "devices.h"
#include "kernels.h"

namespace fake_cuda {

namespace {

using Maybe = std::optional<at::Tensor>;

// Which sequences there are, and which keys a query sees.
struct Pattern {
  at::Tensor boundaries;  // int32 on the host
  double scale, dropout;
  int64_t left, right;  // -1: without limit
  Draw drawn;
  at::Tensor bias;  // on the scores of the only sequence, [heads, length, length]; or none
};

struct Grads {
  at::Tensor q, k, v;
};

// Queries, keys or values of a sequence, [heads, length, dim] in fp32; `heads` repeats shared ones.
at::Tensor part(const at::Tensor& all, int64_t from, int64_t to, int64_t heads) {
  const at::Tensor rows = all.slice(0, from, to).to(at::kFloat).transpose(0, 1);
  return rows.repeat_interleave(heads / rows.size(0), 0);
}

// Softmax weights [heads, length, length].
at::Tensor weights(const at::Tensor& q, const at::Tensor& k, const Pattern& pattern) {
  const int64_t length = q.size(1);
  at::Tensor seen = at::ones({length, length}, at::kBool);
  if (pattern.left >= 0) seen = seen.triu(-pattern.left);
  if (pattern.right >= 0) seen = seen.tril(pattern.right);
  at::Tensor scores = at::matmul(q, k.transpose(1, 2)) * pattern.scale;
  if (pattern.bias.defined()) scores = scores + pattern.bias.to(at::kFloat);
  return scores.masked_fill(seen.logical_not(), -std::numeric_limits<double>::infinity()).softmax(-1);
}

// What each weight is multiplied with: 0 where it is dropped.
at::Tensor factors(const at::Tensor& weights, const Pattern& pattern, at::Generator& generator) {
  if (pattern.dropout == 0) return at::ones_like(weights);
  return at::empty_like(weights).bernoulli_(1 - pattern.dropout, generator) / (1 - pattern.dropout);
}

template <typename Body>
void each_sequence(const Pattern& pattern, Body body) {
  at::Generator generator = host_generator(pattern.drawn);
  const int* bounds = pattern.boundaries.const_data_ptr<int>();
  for (int64_t i = 0; i + 1 < pattern.boundaries.numel(); i++)
    if (bounds[i + 1] > bounds[i]) body(bounds[i], bounds[i + 1], generator);
}

// q[T, heads, dim], k and v[T, kv_heads, dim] on the host -> [T, heads, dim].
at::Tensor attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Pattern& pattern) {
  at::Tensor out = at::zeros(q.sizes(), q.options());
  each_sequence(pattern, [&](int64_t from, int64_t to, at::Generator& generator) {
    const int64_t heads = q.size(1);
    const at::Tensor p = weights(part(q, from, to, heads), part(k, from, to, heads), pattern);
    const at::Tensor kept = p * factors(p, pattern, generator);
    out.slice(0, from, to).copy_(at::matmul(kept, part(v, from, to, heads)).transpose(0, 1));
  });
  return out;
}

Grads differentiate(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const Pattern& pattern) {
  Grads out{at::zeros(q.sizes(), q.options()), at::zeros(k.sizes(), k.options()),
            at::zeros(v.sizes(), v.options())};
  each_sequence(pattern, [&](int64_t from, int64_t to, at::Generator& generator) {
    const int64_t heads = q.size(1), length = to - from;
    const at::Tensor qs = part(q, from, to, heads), ks = part(k, from, to, heads);
    const at::Tensor g = part(grad, from, to, heads), p = weights(qs, ks, pattern);
    const at::Tensor factor = factors(p, pattern, generator);
    const auto put = [&](const at::Tensor& sum, const at::Tensor& each) {  // heads that share are summed
      const int64_t own = sum.size(1);
      sum.slice(0, from, to).copy_(each.view({own, heads / own, length, -1}).sum(1).transpose(0, 1));
    };
    put(out.v, at::matmul((p * factor).transpose(1, 2), g));
    const at::Tensor dp = at::matmul(g, part(v, from, to, heads).transpose(1, 2)) * factor;
    const at::Tensor ds = p * (dp - (dp * p).sum(-1, true)) * pattern.scale;
    put(out.q, at::matmul(ds, ks));
    put(out.k, at::matmul(ds.transpose(1, 2), qs));
  });
  return out;
}

at::Tensor numbers(std::initializer_list<int64_t> values, at::IntArrayRef shape, c10::ScalarType type,
                   c10::Device device) {
  const at::Tensor host = at::tensor(std::vector<int64_t>(values), at::kLong).view(shape);
  return device_copy(host.to(type), device);
}

// Batches of [batch, length, heads, dim] are packed sequences of one length.
at::Tensor pack(const at::Tensor& tensor) {
  const at::Tensor host = host_view(tensor);
  return host.dim() == 4 ? host.flatten(0, 1) : host;
}

at::Tensor unpack(const at::Tensor& packed, const at::Tensor& like) {
  return device_copy(packed.view(like.sizes()), like.device());
}

at::Tensor host_boundaries(const Maybe& given, const at::Tensor& q) {
  if (given && given->defined()) return host_view(*given);
  const int64_t batch = q.size(0), length = q.size(1);
  return at::arange(0, batch * length + 1, length, at::kInt);
}

uint64_t number(const at::Tensor& tensor, int64_t index) {
  return static_cast<uint64_t>(host_view(tensor).to(at::kLong).view({-1})[index].item<int64_t>());
}

double default_scale(std::optional<double> scale, const at::Tensor& q) {
  return scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1))));
}

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& boundaries) {
  for (const at::Tensor& tensor : {q, k, v}) {
    TORCH_CHECK(tensor.is_cuda() && tensor.device() == q.device(), "attention takes tensors of one device");
    TORCH_CHECK(tensor.scalar_type() == q.scalar_type(), "query, key and value must have the same dtype");
    TORCH_CHECK(tensor.stride(-1) == 1, "Input tensor must have contiguous last dimension");
    TORCH_CHECK(tensor.sizes().slice(0, tensor.dim() - 2) == q.sizes().slice(0, q.dim() - 2),
                "fake CUDA: attention of a sequence to itself only");
  }
  TORCH_CHECK(!boundaries || !boundaries->defined() ||
                  (boundaries->device() == q.device() && boundaries->scalar_type() == at::kInt &&
                   boundaries->is_contiguous()),
              "boundaries must be int32, contiguous and on the device");
}

void check_flash(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& boundaries) {
  check(q, k, v, boundaries);
  TORCH_CHECK(setting("FAKE_CUDA_MAJOR", 9) >= 8, "FlashAttention only supports Ampere GPUs or newer.");
  TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16,
              "FlashAttention only support fp16 and bf16 data type");
  TORCH_CHECK(q.size(-1) <= 256 && q.size(-1) % 8 == 0 && q.size(-2) % k.size(-2) == 0,
              "FlashAttention takes heads of up to 256, a multiple of 8");
}

// Kernels load 16 bytes at a time, which rows have to be aligned to.
void check_efficient(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& bias,
                     const Maybe& boundaries) {
  check(q, k, v, boundaries);
  TORCH_CHECK(q.scalar_type() != at::kBFloat16 || setting("FAKE_CUDA_MAJOR", 9) >= 8,
              "cutlassF: no kernel found to launch!");
  TORCH_CHECK(!bias || !bias->defined() || (q.size(0) == 1 && bias->size(0) == 1 && bias->device() == q.device()),
              "fake CUDA: efficient attention with a bias for one sequence only");
  TORCH_CHECK(q.dim() == 4 && q.size(2) == k.size(2), "efficient attention: wrong shapes");
  TORCH_CHECK(!boundaries || !boundaries->defined() || q.size(0) == 1, "packed sequences are one batch");
  const int64_t lanes = 16 / q.element_size();
  for (const at::Tensor& tensor : {q, k, v})
    TORCH_CHECK(tensor.stride(1) % lanes == 0 && tensor.stride(2) % lanes == 0,
                "efficient attention: rows are not aligned");
}

using Five = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using Length = std::optional<c10::SymInt>;

Pattern flash_pattern(const at::Tensor& q, const Maybe& boundaries, double dropout, bool causal,
                      std::optional<double> scale, const Length& left, const Length& right, Draw drawn) {
  const auto limit = [](const Length& keys) { return keys ? keys->expect_int() : -1; };
  return {host_boundaries(boundaries, q), default_scale(scale, q), dropout, limit(left),
          causal ? 0 : limit(right), drawn, {}};
}

Five flash_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& q_bounds,
                   const Maybe& k_bounds, c10::SymInt max_q, c10::SymInt max_k, double dropout, bool causal,
                   bool debug, std::optional<double> scale, Length left, Length right, const Maybe&,
                   const Maybe&) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(q_bounds.has_value() == k_bounds.has_value() && !debug && max_q == max_k && max_q > 0,
              "fake CUDA: flash attention of sequences to themselves only");
  check_flash(q, k, v, q_bounds);
  const Draw drawn = dropout > 0 ? draw(q.device()) : Draw{0, 0};
  const Pattern pattern = flash_pattern(q, q_bounds, dropout, causal, scale, left, right, drawn);
  const at::Tensor out = attend(pack(q), pack(k), pack(v), pattern);
  const auto state = {static_cast<int64_t>(drawn.seed), static_cast<int64_t>(drawn.offset)};
  return {unpack(out, q), at::empty({q.size(-2), out.size(0)}, q.options().dtype(at::kFloat)),
          numbers(state, {2}, at::kUInt64, q.device()), numbers({0}, {}, at::kUInt64, q.device()),
          at::empty({0}, q.options())};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> flash_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor&, const at::Tensor& sums, const at::Tensor& q_bounds, const at::Tensor&, c10::SymInt,
    c10::SymInt, double dropout, bool causal, const at::Tensor& state, const at::Tensor&,
    std::optional<double> scale, Length left, Length right) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check_flash(q, k, v, q_bounds);
  TORCH_CHECK(sums.numel() > 0, "flash attention: no sums from the forward pass");
  const Draw drawn{number(state, 0), number(state, 1)};
  const Pattern pattern = flash_pattern(q, q_bounds, dropout, causal, scale, left, right, drawn);
  const Grads grads = differentiate(pack(grad), pack(q), pack(k), pack(v), pattern);
  return {unpack(grads.q, q), unpack(grads.k, k), unpack(grads.v, v)};
}

Pattern efficient_pattern(const at::Tensor& q, const Maybe& boundaries, double dropout, int64_t mask,
                          std::optional<double> scale, Draw drawn, const Maybe& bias) {
  const at::Tensor added = bias && bias->defined() ? host_view(*bias)[0] : at::Tensor();
  const int64_t right = mask == 0 ? -1 : 0;
  return {host_boundaries(boundaries, q), default_scale(scale, q), dropout, -1, right, drawn, added};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, c10::SymInt, c10::SymInt> efficient_forward(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& bias, const Maybe& q_bounds,
    const Maybe& k_bounds, Length max_q, Length max_k, double dropout, int64_t mask, bool sums,
    std::optional<double> scale, const Maybe&, std::optional<int64_t>) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(q_bounds.has_value() == k_bounds.has_value() && q_bounds.has_value() <= max_q.has_value(),
              "efficient attention: boundaries without the longest sequence");
  check_efficient(q, k, v, bias, q_bounds);
  const Draw drawn = dropout > 0 ? draw(q.device()) : Draw{0, 0};
  const Pattern pattern = efficient_pattern(q, q_bounds, dropout, mask, scale, drawn, bias);
  const at::Tensor out = attend(pack(q), pack(k), pack(v), pattern);
  const at::Tensor kept = at::empty({pattern.boundaries.numel() - 1, q.size(2), sums ? q.size(1) : 0},
                                    q.options().dtype(at::kFloat));
  return {unpack(out, q), kept, numbers({static_cast<int64_t>(drawn.seed)}, {}, at::kLong, q.device()),
          numbers({static_cast<int64_t>(drawn.offset)}, {}, at::kLong, q.device()),
          max_q.value_or(q.size(1)), max_k.value_or(k.size(1))};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> efficient_backward(
    const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const Maybe& bias,
    const at::Tensor&, const Maybe& q_bounds, const Maybe&, c10::SymInt, c10::SymInt, const at::Tensor& sums,
    double dropout, const at::Tensor& seed, const at::Tensor& offset, int64_t mask, bool,
    std::optional<double> scale, std::optional<int64_t>, std::optional<int64_t>, bool) {
  at::AutoDispatchBelowADInplaceOrView guard;
  check_efficient(q, k, v, bias, q_bounds);
  TORCH_CHECK(sums.numel() > 0, "efficient attention: no sums from the forward pass");
  const Draw drawn{number(seed, 0), number(offset, 0)};
  const Pattern pattern = efficient_pattern(q, q_bounds, dropout, mask, scale, drawn, bias);
  const Grads grads = differentiate(pack(grad), pack(q), pack(k), pack(v), pattern);
  return {unpack(grads.q, q), unpack(grads.k, k), unpack(grads.v, v), at::Tensor()};
}

}  // namespace

void replace_attention(torch::Library& library) {
  library.impl("_flash_attention_forward", flash_forward);
  library.impl("_flash_attention_backward", flash_backward);
  library.impl("_efficient_attention_forward", efficient_forward);
  library.impl("_efficient_attention_backward", efficient_backward);
}

}  // namespace fake_cuda
