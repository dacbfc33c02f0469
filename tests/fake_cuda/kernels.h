// What the parts of the stand-in's kernels share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/Generator.h>
#include <torch/library.h>

namespace fake_cuda {

enum class Use { kRead, kWrite };

// The same bytes as a tensor of the CPU; a tensor of the CPU itself as it is. On its device that is work
// on the current stream, and an error where other work on the same bytes may go on beside it.
at::Tensor host_view(const at::Tensor& tensor, Use use = Use::kRead);

// The same values in new memory of `device`.
at::Tensor device_copy(const at::Tensor& tensor, c10::Device device);

// What a kernel takes from its device's generator, which moves on.
struct Draw {
  uint64_t seed, offset;
};
Draw draw(c10::Device device);

// The random numbers of a kernel, on the host.
at::Generator host_generator(Draw draw);

// Has attention over packed sequences computed on the host.
void replace_attention(torch::Library& library);

}  // namespace fake_cuda
