// Computes libtorch's CUDA kernels on the host, for the stand-in for CUDA. Every operation of libtorch
// that has a kernel for CUDA gets one that views the same bytes as tensors of the CPU, calls the CPU's
// kernel, and puts what comes out into memory of the device. What CUDA refuses is refused here as well:
// tensors of different devices in one operation, dtypes and shapes that a kernel does not take.
//
// Random numbers come from the device's own generator, whose state moves on as it would.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <iostream>
#include <set>

#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "kernels.h"
#include "races.h"

extern "C" void* fake_cuda_host(const void* pointer);

namespace fake_cuda {

namespace {

// Operations whose tensors may be on different devices.
const std::set<std::string> kMixed = {
    "aten::copy_", "aten::index.Tensor", "aten::index_put_", "aten::_index_put_impl_",
    "aten::index_put", "aten::_unsafe_index.Tensor", "aten::_to_copy",
};

// Operations that touch no bytes, or do so by copies: libtorch's own are kept.
const std::set<std::string> kKept = {
    "aten::empty.memory_format", "aten::empty_strided", "aten::resize_", "aten::_local_scalar_dense",
    "aten::record_stream", "aten::_fused_sdp_choice", "aten::is_pinned", "aten::_pin_memory",
    "aten::set_", "aten::set_.source_Storage", "aten::set_.source_Storage_storage_offset",
    "aten::set_.source_Tensor", "aten::_efficientzerotensor", "aten::_has_same_storage_numel",
};

// The operation that this thread computes.
thread_local std::string running = "an operation";

bool is_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  return false;
}

// The tensors of a call, viewed by the host, and their device.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack& stack) : op_(op), stack_(stack) {
    const auto& schema = op.schema();
    const size_t count = schema.arguments().size();
    originals_.assign(stack.end() - static_cast<int64_t>(count), stack.end());
    find_device();
    for (size_t i = 0; i < count; i++)
      stack[stack.size() - count + i] = to_host(originals_[i], schema.arguments()[i]);
  }

  void run() {
    at::AutoDispatchBelowADInplaceOrView guard;
    op_.callBoxed(stack_);
    const auto& returns = op_.schema().returns();
    const size_t first = stack_.size() - returns.size();
    for (size_t i = 0; i < returns.size(); i++)
      stack_[first + i] = to_device(stack_[first + i], returns[i]);
    for (auto& [device, host] : resized_) write_back(device, host);
  }

 private:
  static bool is_out(const c10::Argument& argument) {
    return argument.kwarg_only() && argument.alias_info() && argument.alias_info()->isWrite();
  }

  void find_device() {
    const std::string name = c10::toString(op_.operator_name());
    std::optional<c10::Device> host;
    const auto look = [&](const at::Tensor& tensor) {
      if (!tensor.defined()) return;
      if (tensor.is_cuda()) {
        TORCH_CHECK(!device_ || *device_ == tensor.device() || kMixed.contains(name),
                    "Expected all tensors to be on the same device (", name, ")");
        if (!device_) device_ = tensor.device();
      } else if (tensor.dim() > 0) {
        host = tensor.device();
      }
    };
    for (const auto& value : originals_) {
      if (value.isTensor()) look(value.toTensor());
      if (value.isTensorList())
        for (const at::Tensor& tensor : value.toTensorList()) look(tensor);
      if (value.isOptionalTensorList())
        for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
          if (tensor) look(*tensor);
      if (value.isDevice()) device_ = value.toDevice();
    }
    TORCH_CHECK(!device_ || !host || kMixed.contains(name),
                "Expected all tensors to be on the same device, but found ", *device_, " and cpu (",
                name, ")");
    if (!device_) device_ = c10::Device(c10::kCUDA, 0);
  }

  c10::IValue to_host(const c10::IValue& value, const c10::Argument& argument) {
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    const Use use = written ? Use::kWrite : Use::kRead;
    if (value.isTensor()) {
      const at::Tensor tensor = value.toTensor();
      // Its shape may have to change, which a view cannot.
      if (tensor.defined() && tensor.is_cuda() && is_out(argument)) {
        at::Tensor fresh = at::empty({0}, tensor.options().device(c10::kCPU));
        resized_.emplace_back(tensor, fresh);
        return fresh;
      }
      return host_view(tensor, use);
    }
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(host_view(tensor, use));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList())
        list.push_back(tensor ? std::optional(host_view(*tensor)) : std::nullopt);
      return list;
    }
    if (value.isDevice()) return c10::Device(c10::kCPU);
    if (argument.name() == "generator") return host_generator(draw(*device_));
    return value;
  }

  c10::IValue to_device(const c10::IValue& value, const c10::Argument& result) {
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorList()) list.push_back(device_copy(tensor, *device_));
      return list;
    }
    if (!value.isTensor() || !value.toTensor().defined()) return value;
    const auto* alias = result.alias_info();
    if (alias == nullptr) return device_copy(value.toTensor(), *device_);
    const auto& arguments = op_.schema().arguments();
    for (size_t i = 0; i < arguments.size(); i++)
      if (arguments[i].alias_info() != nullptr &&
          arguments[i].alias_info()->beforeSets() == alias->beforeSets())
        return originals_[i];
    TORCH_CHECK(false, "fake CUDA: ", op_.operator_name(), " returns an argument that it does not take");
  }

  static void write_back(const at::Tensor& device, const at::Tensor& host) {
    if (device.sizes() != host.sizes()) device.resize_(host.sizes());
    host_view(device, Use::kWrite).copy_(host);
  }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::vector<c10::IValue> originals_;
  std::optional<c10::Device> device_;
  std::vector<std::pair<at::Tensor, at::Tensor>> resized_;
};

// Prints the operation that begins, and the bytes that tensors hold on the first device.
void trace() {
  const auto stats = c10::getDeviceAllocator(c10::kCUDA)->getDeviceStats(0);
  std::cerr << "fake CUDA: " << running << " " << stats.allocated_bytes[0].current << "\n";
}

void compute(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  running = c10::toString(op.operator_name());
  static const bool traced = std::getenv("FAKE_CUDA_TRACE") != nullptr;
  if (traced) trace();
  Call(op, *stack).run();
}

// Copies that need no kernel are libtorch's own.
void copy(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  const auto arguments = torch::jit::last(*stack, 3);
  const at::Tensor to = arguments[0].toTensor(), from = arguments[1].toTensor();
  const bool plain = to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes() &&
                     to.is_contiguous() && from.is_contiguous();
  if (plain) return op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  compute(op, keys, stack);
}

// Products of integers have no kernel on CUDA.
void check_product(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  for (const auto& value : *stack)
    TORCH_CHECK(!value.isTensor() || !value.toTensor().defined() ||
                    !c10::isIntegralType(value.toTensor().scalar_type(), true),
                "\"", op.operator_name(), "\" not implemented for integers on CUDA");
  compute(op, keys, stack);
}

}  // namespace

at::Tensor host_view(const at::Tensor& tensor, Use use) {
  if (!tensor.defined() || !tensor.is_cuda()) return tensor;
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); i++) last += (tensor.size(i) - 1) * tensor.stride(i);
  const size_t bytes = tensor.numel() == 0 ? 0 : static_cast<size_t>(last + 1) * tensor.element_size();
  const FakeCudaRange range{tensor.const_data_ptr(), bytes, use == Use::kWrite};
  const c10::Stream stream = c10::impl::VirtualGuardImpl(c10::kCUDA).getStream(tensor.device());
  const char* race = fake_cuda_work(stream.native_handle(), running.c_str(), &range, 1);
  TORCH_CHECK(race == nullptr, "fake CUDA: race: ", race);
  return at::from_blob(fake_cuda_host(tensor.const_data_ptr()), tensor.sizes(), tensor.strides(),
                       tensor.options().device(c10::kCPU).requires_grad(false));
}

at::Tensor device_copy(const at::Tensor& tensor, c10::Device device) {
  if (!tensor.defined()) return tensor;
  at::Tensor out =
      at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
  host_view(out, Use::kWrite).copy_(tensor);
  return out;
}

Draw draw(c10::Device device) {
  at::Generator generator = at::globalContext().defaultGenerator(device);
  std::scoped_lock guard(generator.mutex());
  const Draw drawn{generator.current_seed(), generator.get_offset()};
  generator.set_offset(drawn.offset + 4);
  return drawn;
}

at::Generator host_generator(Draw draw) {
  return at::detail::createCPUGenerator(draw.seed * 0x9E3779B97F4A7C15 + draw.offset);
}

}  // namespace fake_cuda

namespace {

std::tuple<at::Tensor, at::Tensor> dropout(const at::Tensor& input, double p, std::optional<bool> train) {
  if (train.has_value() && !*train)
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  const at::Tensor values = fake_cuda::host_view(input);
  at::Tensor kept = at::empty_like(values, values.options().dtype(at::kBool));
  kept.bernoulli_(1 - p, fake_cuda::host_generator(fake_cuda::draw(input.device())));
  const at::Tensor out = values * kept * (p == 1 ? 0.0 : 1 / (1 - p));
  return {fake_cuda::device_copy(out, input.device()), fake_cuda::device_copy(kept, input.device())};
}

// As https://docs.pytorch.org/docs/stable/generated/torch.nn.RMSNorm.html, differentiated: the CPU has no
// such kernel.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& grad, const at::Tensor& input,
                                                     at::IntArrayRef shape, const at::Tensor& rstd,
                                                     const std::optional<at::Tensor>& weight,
                                                     std::array<bool, 2> wanted) {
  at::AutoDispatchBelowADInplaceOrView guard;
  TORCH_CHECK(shape.size() == 1, "fake CUDA: RMSNorm over the last dimension only");
  const auto host = [](const at::Tensor& tensor) { return fake_cuda::host_view(tensor).to(at::kFloat); };
  const at::Tensor normed = host(input) * host(rstd), flat = (host(grad) * normed).reshape({-1, shape[0]});
  const bool scaled = weight.has_value() && weight->defined();
  const at::Tensor inner = scaled ? host(grad) * host(*weight) : host(grad);
  const at::Tensor to_input = (inner - normed * (inner * normed).mean(-1, true)) * host(rstd);
  const auto put = [&](const at::Tensor& tensor) {
    return fake_cuda::device_copy(tensor.to(input.scalar_type()), input.device());
  };
  return {wanted[0] ? put(to_input) : at::Tensor(), wanted[1] && scaled ? put(flat.sum(0)) : at::Tensor()};
}

// Nothing else wants to hear that kernels are replaced.
class Silence : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

void replace() {
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  using torch::CppFunction;
  static torch::Library library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  const std::set<std::string> products = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"};
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    const std::string full = c10::toString(name);
    if (!op || !full.starts_with("aten::") || fake_cuda::kKept.contains(full)) continue;
    if (full != "aten::copy_" && !op->hasKernelForDispatchKey(c10::DispatchKey::CUDA)) continue;
    if (fake_cuda::is_view(op->schema()) || full.find("_attention_") != std::string::npos) continue;
    if (full == "aten::native_dropout") continue;
    // Those that the host lacks are made of others, or launch a kernel and fail.
    if (!op->hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) continue;
    library.impl(full.c_str() + 6,
                 full == "aten::copy_"      ? CppFunction::makeFromBoxedFunction<&fake_cuda::copy>()
                 : products.contains(full) ? CppFunction::makeFromBoxedFunction<&fake_cuda::check_product>()
                                            : CppFunction::makeFromBoxedFunction<&fake_cuda::compute>());
  }
  library.impl("native_dropout", dropout);
  library.impl("_fused_rms_norm_backward", rms_norm_backward);
  fake_cuda::replace_attention(library);
}

// When the library is loaded, after what stands above.
const bool kReplaced = [] {
  try {
    replace();
    return true;
  } catch (const std::exception& error) {
    std::cerr << "fake CUDA: " << error.what() << "\n";
    std::abort();
  }
}();

}  // namespace
