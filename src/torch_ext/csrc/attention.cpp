// Variable-length self-attention with dropout for the CPU, differentiable, on packed batches.
//
// libtorch's flash kernel for the CPU rejects dropout, and its fallback keeps [heads, L, L] score
// matrices of every sequence for the backward pass. This one works like flash attention: blocks of
// query rows, only the log-sum-exp kept, probabilities and the dropout mask computed again in the
// backward pass. Products are the BLAS sgemm inside libtorch.
//
// Source of the formulas: Dao et al., "FlashAttention", 2022, algorithms 2 and 4.
#include <torch/csrc/autograd/custom_function.h>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "attention.h"
#include "shim.h"

// Fortran BLAS, column-major; libtorch's CPU library exports it.
extern "C" void sgemm_(const char* transa, const char* transb, const int* m, const int* n,
                       const int* k, const float* alpha, const float* a, const int* lda,
                       const float* b, const int* ldb, const float* beta, float* c, const int* ldc);

// One build for every x86-64; the loader picks the widest version the processor has. Levels, not
// processor names: the latter match one vendor's models only.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define RR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define RR_CLONES
#endif

namespace {

// Query rows per block: scores of a block against 512 keys are 256 KB, so they stay in the
// second-level cache between the products and the softmax.
constexpr int64_t kRows = 128;

enum class Trans { no, yes };

// Row-major C[m,n] = alpha * op(A)[m,k] op(B)[k,n] + beta * C, leading dimensions in elements.
void gemm(Trans ta, Trans tb, int m, int n, int k, float alpha, const float* a, int lda,
          const float* b, int ldb, float beta, float* c, int ldc) {
  const char* ca = ta == Trans::yes ? "T" : "N";
  const char* cb = tb == Trans::yes ? "T" : "N";
  sgemm_(cb, ca, &n, &m, &k, &alpha, b, &ldb, a, &lda, &beta, c, &ldc);
}

// exp on the range softmax needs (x <= ~0), to about 2 ulp: 2^n * p(r) with r in [-ln2/2, ln2/2].
// Written out so that the loops around it vectorize. Polynomial: Cephes expf.
inline float exp_approx(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504088896341f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  return p * std::bit_cast<float>(bits);
}

// Counter-based random bits: a 32-bit finalizer (two rounds of multiply and xor-shift, constants
// of "lowbias32", C. Wellons 2018) of the element's index under a per-row key. The same in forward
// and backward without keeping a mask, and independent of the number of threads.
inline uint32_t random_bits(uint32_t key, uint32_t column) {
  uint32_t x = column * 0x9E3779B9u + key;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

uint32_t row_key(uint64_t seed, int64_t head, int64_t token) {
  uint64_t z = seed + 0x9E3779B97F4A7C15ull * (static_cast<uint64_t>(head) * 0x100000001ull +
                                               static_cast<uint64_t>(token) + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;  // splitmix64
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return static_cast<uint32_t>(z ^ (z >> 31));
}

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // an element is dropped when its random bits are below
  float scale;         // 1 / (1 - p) for the kept ones
  bool on;

  Dropout(double p, int64_t seed_)
      : seed(static_cast<uint64_t>(seed_)),
        threshold(static_cast<uint32_t>(p * 4294967296.0)),
        scale(static_cast<float>(1.0 / (1.0 - p))),
        on(p > 0.0) {}
};

// scores -> exp(scores - max), returning the row's log-sum-exp.
RR_CLONES float softmax_row(float* row, int64_t n) {
  float max = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = std::max(max, row[i]);
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_approx(row[i] - max);
    row[i] = e;
    sum += e;
  }
  const float inverse = 1.0f / sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] *= inverse;
  return max + std::log(sum);
}

RR_CLONES void probabilities_row(float* row, int64_t n, float lse) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) row[i] = exp_approx(row[i] - lse);
}

// `first` is the column of row[0] in its sequence.
RR_CLONES void drop_row(float* row, int64_t n, uint32_t first, uint32_t key, uint32_t threshold,
                        float scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t column = first + static_cast<uint32_t>(i);
    row[i] *= random_bits(key, column) >= threshold ? scale : 0.0f;
  }
}

// dS = P * (dP - delta), the gradient of softmax, in place of dP.
RR_CLONES void softmax_backward_row(float* dp, const float* p, int64_t n, float delta) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) dp[i] = p[i] * (dp[i] - delta);
}

RR_CLONES float dot(const float* a, const float* b, int64_t n) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}

// What every pass over a batch needs to know; kept for the backward pass.
struct Settings : torch::CustomClassHolder {
  std::vector<int64_t> cu_seqlens;
  int heads;
  int kv_heads;
  int dim;
  int64_t left;   // keys before the own position that a query sees
  int64_t right;  // keys after it
  float scale;
  Dropout dropout{0.0, 0};

  int64_t tokens() const { return cu_seqlens.back(); }
  int64_t sequences() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }
  int group() const { return heads / kv_heads; }
  int64_t longest() const {
    int64_t longest = 0;
    for (int64_t s = 0; s < sequences(); ++s)
      longest = std::max(longest, cu_seqlens[s + 1] - cu_seqlens[s]);
    return longest;
  }
};

// [T, heads, dim] of which the rows may stand apart.
template <typename Float>
struct Rows {
  Float* data;
  int stride;
  int dim;

  Float* at(int64_t token, int head) const { return data + token * stride + head * dim; }
};

template <typename Float>
struct Projections {
  Rows<Float> q, k, v;
};

// One head of one sequence.
struct Head {
  int64_t first;   // its first token
  int64_t length;  // its number of tokens
  int query;       // number of the query head
  int key;         // number of the key and value head
};

// A block of query rows with the keys that at least one of them sees; positions in the sequence.
struct Block {
  int64_t row;
  int rows;
  int64_t key;
  int keys;

  Block(const Settings& s, int64_t length, int64_t first_row)
      : row(first_row),
        rows(static_cast<int>(std::min(kRows, length - first_row))),
        key(std::max<int64_t>(0, first_row - s.left)),
        keys(static_cast<int>(std::min(length, first_row + rows + s.right) - key)) {}

  // The keys that row `r` of the block sees, as columns of the block.
  int64_t begin(const Settings& s, int r) const {
    return std::max<int64_t>(0, row + r - s.left - key);
  }
  int64_t end(const Settings& s, int r) const {
    return std::min<int64_t>(keys, row + r + s.right + 1 - key);
  }
};

// Calls body(sequence's first token, its length, head, scratch) for every sequence and every one of
// `heads` heads, in parallel; scratch holds `blocks` score blocks.
template <typename Body>
void for_each_head(const Settings& s, int heads, int64_t blocks, const Body& body) {
  const int64_t longest = s.longest();
  const int64_t block = std::min(kRows, longest) * longest;
  at::parallel_for(0, s.sequences() * heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(blocks * block));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t first = s.cu_seqlens[i / heads];
      const int64_t length = s.cu_seqlens[i / heads + 1] - first;
      if (length > 0) body(first, length, static_cast<int>(i % heads), scratch.data());
    }
  });
}

void forward_head(const Settings& s, const Projections<const float>& in, const Head& head,
                  float* scores, const Rows<float>& out, float* lse) {
  for (int64_t row = 0; row < head.length; row += kRows) {
    const Block block(s, head.length, row);
    const int64_t token = head.first + row;
    const int64_t key = head.first + block.key;
    gemm(Trans::no, Trans::yes, block.rows, block.keys, s.dim, s.scale, in.q.at(token, head.query),
         in.q.stride, in.k.at(key, head.key), in.k.stride, 0.0f, scores, block.keys);
    for (int r = 0; r < block.rows; ++r) {
      float* const line = scores + int64_t{r} * block.keys;
      const int64_t begin = block.begin(s, r), end = block.end(s, r);
      std::fill(line, line + begin, 0.0f);
      std::fill(line + end, line + block.keys, 0.0f);
      lse[head.query * s.tokens() + token + r] = softmax_row(line + begin, end - begin);
      if (s.dropout.on)
        drop_row(line + begin, end - begin, static_cast<uint32_t>(block.key + begin),
                 row_key(s.dropout.seed, head.query, token + r), s.dropout.threshold,
                 s.dropout.scale);
    }
    gemm(Trans::no, Trans::no, block.rows, s.dim, block.keys, 1.0f, scores, block.keys,
         in.v.at(key, head.key), in.v.stride, 0.0f, out.at(token, head.query), out.stride);
  }
}

struct Saved {
  Rows<const float> out;
  Rows<const float> grad_out;
  const float* lse;
};

// Probabilities and the gradient of the scores of a block, computed again: p after dropout, and dS
// in place of dp.
void backward_rows(const Settings& s, const Saved& saved, const Head& head, const Block& block,
                   float* p, float* dp) {
  for (int r = 0; r < block.rows; ++r) {
    const int64_t token = head.first + block.row + r;
    const int64_t begin = block.begin(s, r), end = block.end(s, r), seen = end - begin;
    for (float* line : {p + int64_t{r} * block.keys, dp + int64_t{r} * block.keys}) {
      std::fill(line, line + begin, 0.0f);
      std::fill(line + end, line + block.keys, 0.0f);
    }
    float* const p_row = p + int64_t{r} * block.keys + begin;
    float* const dp_row = dp + int64_t{r} * block.keys + begin;
    const float delta =
        dot(saved.out.at(token, head.query), saved.grad_out.at(token, head.query), s.dim);
    const uint32_t row = row_key(s.dropout.seed, head.query, token);
    const uint32_t column = static_cast<uint32_t>(block.key + begin);
    probabilities_row(p_row, seen, saved.lse[head.query * s.tokens() + token]);
    if (s.dropout.on) drop_row(dp_row, seen, column, row, s.dropout.threshold, s.dropout.scale);
    softmax_backward_row(dp_row, p_row, seen, delta);
    if (s.dropout.on) drop_row(p_row, seen, column, row, s.dropout.threshold, s.dropout.scale);
  }
}

// `written`: rows of this head's key and value gradients that hold something already.
void backward_head(const Settings& s, const Projections<const float>& in, const Saved& saved,
                   const Projections<float>& grad, const Head& head, int64_t& written,
                   float* scratch) {
  float* const p = scratch;
  float* const dp = scratch + std::min(kRows, head.length) * head.length;
  for (int64_t row = 0; row < head.length; row += kRows) {
    const Block block(s, head.length, row);
    const int64_t token = head.first + row;
    const int64_t key = head.first + block.key;
    const int m = block.rows, n = block.keys;
    const float* const query = in.q.at(token, head.query);
    const float* const d_out = saved.grad_out.at(token, head.query);
    gemm(Trans::no, Trans::yes, m, n, s.dim, s.scale, query, in.q.stride, in.k.at(key, head.key),
         in.k.stride, 0.0f, p, n);
    gemm(Trans::no, Trans::yes, m, n, s.dim, 1.0f, d_out, saved.grad_out.stride,
         in.v.at(key, head.key), in.v.stride, 0.0f, dp, n);
    backward_rows(s, saved, head, block, p, dp);
    // The products below add to all rows of the block or to none: a row that is new begins at 0.
    const float accumulate = block.key < written ? 1.0f : 0.0f;
    for (; accumulate > 0.0f && written < block.key + n; ++written)
      for (const Rows<float>& rows : {grad.k, grad.v})
        std::fill_n(rows.at(head.first + written, head.key), s.dim, 0.0f);
    written = std::max(written, block.key + n);
    gemm(Trans::yes, Trans::no, n, s.dim, m, 1.0f, p, n, d_out, saved.grad_out.stride, accumulate,
         grad.v.at(key, head.key), grad.v.stride);
    gemm(Trans::no, Trans::no, m, s.dim, n, s.scale, dp, n, in.k.at(key, head.key), in.k.stride,
         0.0f, grad.q.at(token, head.query), grad.q.stride);
    gemm(Trans::yes, Trans::no, n, s.dim, m, s.scale, dp, n, query, in.q.stride, accumulate,
         grad.k.at(key, head.key), grad.k.stride);
  }
}

// A tensor whose rows the kernels can walk: elements of a row side by side, rows apart by no less.
at::Tensor walkable(const at::Tensor& x) {
  const bool dense = x.dim() == 2 ? x.stride(1) == 1 : x[0].is_contiguous();
  return dense && x.stride(0) >= x[0].numel() ? x : x.contiguous();
}

template <typename Float>
Rows<Float> rows_of(const at::Tensor& x, int64_t dim, int64_t skipped_heads = 0) {
  const int64_t width = x.numel() / std::max<int64_t>(1, x.size(0));
  return {x.data_ptr<float>() + skipped_heads * dim,
          static_cast<int>(std::max(x.stride(0), width)), static_cast<int>(dim)};
}

// Of one fused tensor, or of three.
template <typename Float>
Projections<Float> projections_of(const Settings& s, const at::Tensor& q, const at::Tensor& k,
                                  const at::Tensor& v) {
  if (k.defined())
    return {rows_of<Float>(q, s.dim), rows_of<Float>(k, s.dim), rows_of<Float>(v, s.dim)};
  return {rows_of<Float>(q, s.dim), rows_of<Float>(q, s.dim, s.heads),
          rows_of<Float>(q, s.dim, s.heads + s.kv_heads)};
}

// q, k and v, or everything in q, without k and v.
struct PackedAttention : torch::autograd::Function<PackedAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q_in,
                            const std::optional<at::Tensor>& k_in,
                            const std::optional<at::Tensor>& v_in,
                            c10::intrusive_ptr<Settings> settings) {
    const Settings& s = *settings;
    at::Tensor out = at::empty({s.tokens(), int64_t{s.heads} * s.dim}, q_in.options());
    at::Tensor lse = at::empty({s.heads, s.tokens()}, q_in.options());
    auto ready = [&](const std::optional<at::Tensor>& x) {
      return x.has_value() && s.tokens() > 0 ? walkable(*x) : x.value_or(at::Tensor());
    };
    const at::Tensor q = ready(q_in), k = ready(k_in), v = ready(v_in);
    const auto in = projections_of<const float>(s, q, k, v);
    const auto out_rows = rows_of<float>(out, s.dim);
    float* const sums = lse.data_ptr<float>();
    for_each_head(s, s.heads, 1, [&](int64_t first, int64_t length, int head, float* scratch) {
      forward_head(s, in, {first, length, head, head / s.group()}, scratch, out_rows, sums);
    });
    ctx->save_for_backward({q, k, v, out, lse});
    ctx->saved_data["settings"] = c10::IValue::make_capsule(std::move(settings));
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    const auto capsule = ctx->saved_data["settings"].toCapsule();
    const Settings& s = static_cast<const Settings&>(*capsule);
    const auto tensors = ctx->get_saved_variables();
    const at::Tensor &q = tensors[0], &k = tensors[1], &v = tensors[2];
    const at::Tensor grad_out = grads[0].contiguous();
    auto make = [](const at::Tensor& x) {
      return x.defined() ? at::empty(x.sizes(), x.options()) : at::Tensor();
    };
    const at::Tensor grad_q = make(q), grad_k = make(k), grad_v = make(v);
    const auto in = projections_of<const float>(s, q, k, v);
    const auto grad = projections_of<float>(s, grad_q, grad_k, grad_v);
    const Saved saved{rows_of<const float>(tensors[3], s.dim), rows_of<const float>(grad_out, s.dim),
                      tensors[4].data_ptr<float>()};
    // Query heads that share a key head add to the same gradients: one thread takes them all.
    for_each_head(s, s.kv_heads, 2, [&](int64_t first, int64_t length, int head, float* scratch) {
      int64_t written = 0;
      for (int query = head * s.group(); query < (head + 1) * s.group(); ++query)
        backward_head(s, in, saved, grad, {first, length, query, head}, written, scratch);
    });
    return {grad_q, grad_k, grad_v, at::Tensor()};
  }
};

}  // namespace

extern "C" {

// q[T, heads, dim], k and v[T, kv_heads, dim], or k and v null and q[T, (heads + 2 kv_heads) * dim];
// fp32 on the CPU. -> a new tensor [T, heads * dim].
char* rr_packed_attention(at::Tensor* q, at::Tensor* k, at::Tensor* v, const RrAttention* options,
                          at::Tensor** out) {
  return rr::guarded([&] {
    const RrAttention& o = *options;
    const int64_t dim = rr::check_projections(*q, k, v, o);
    TORCH_CHECK(q->device().is_cpu() && q->scalar_type() == at::kFloat,
                "packed attention on the CPU takes fp32");
    auto settings = c10::make_intrusive<Settings>();
    settings->cu_seqlens.assign(o.cu_seqlens, o.cu_seqlens + o.boundaries);
    settings->heads = static_cast<int>(o.heads);
    settings->kv_heads = static_cast<int>(o.kv_heads);
    settings->dim = static_cast<int>(dim);
    settings->left = o.left < 0 ? q->size(0) : o.left;
    settings->right = o.right < 0 ? q->size(0) : o.right;
    settings->scale = static_cast<float>(o.scale);
    settings->dropout = Dropout(o.dropout, o.seed);
    auto given = [](const at::Tensor* x) {
      return x == nullptr ? std::nullopt : std::optional<at::Tensor>(*x);
    };
    *out = new at::Tensor(PackedAttention::apply(*q, given(k), given(v), std::move(settings)));
  });
}

}  // extern "C"
