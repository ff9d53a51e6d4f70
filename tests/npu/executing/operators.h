// What the device must do itself: make, view, resize and copy tensors. Every other operation copies to the CPU, runs there, and comes back.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <torch/library.h>

#include "device.h"

namespace executing {

using at::Tensor;
template <class T>
using Maybe = std::optional<T>;
using Sizes = c10::SymIntArrayRef;

const auto KEYS = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

// The same memory as a CPU tensor, which keeps it for as long as it lives: gloo sends and receives after the call has returned.
inline Tensor as_cpu(const Tensor& tensor) {
  if (tensor.device().is_cpu()) return tensor;
  auto storage = tensor.storage();
  auto* address = storage.data_ptr().get();
  if (!address) return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kCPU).requires_grad(false));
  const auto let_go = [](void* held) { delete static_cast<c10::Storage*>(held); };
  auto data = c10::DataPtr(address, new c10::Storage(storage), let_go, c10::Device(c10::kCPU));
  auto alias = c10::Storage(c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), nullptr, false);
  auto made = at::detail::make_tensor<c10::TensorImpl>(std::move(alias), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  made.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  return made;
}

inline Tensor empty(c10::IntArrayRef sizes, Maybe<at::ScalarType> dtype, Maybe<c10::Layout>, Maybe<c10::Device> device, Maybe<bool>,
                    Maybe<c10::MemoryFormat> format) {
  const On on(device);
  return at::detail::empty_generic(sizes, &memory(), KEYS, dtype.value_or(at::kFloat), format);
}

inline Tensor empty_strided(c10::IntArrayRef sizes, c10::IntArrayRef strides, Maybe<at::ScalarType> dtype, Maybe<c10::Layout>,
                            Maybe<c10::Device> device, Maybe<bool>) {
  const On on(device);
  return at::detail::empty_strided_generic(sizes, strides, &memory(), KEYS, dtype.value_or(at::kFloat));
}

inline Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  const at::NoGradGuard plain;
  as_cpu(to).copy_(as_cpu(from));
  return to;
}

inline Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

inline at::Scalar value_of(const Tensor& tensor) {
  return as_cpu(tensor).item();
}

inline Tensor as_strided(const Tensor& tensor, Sizes sizes, Sizes strides, Maybe<c10::SymInt> offset) {
  const auto start = offset ? Maybe<int64_t>(offset->expect_int()) : Maybe<int64_t>();
  return at::native::as_strided_tensorimpl(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides), start);
}

inline Tensor view(const Tensor& tensor, Sizes sizes) {
  return at::native::view(tensor, C10_AS_INTARRAYREF_SLOW(sizes));
}

inline Tensor reshape_alias(const Tensor& tensor, Sizes sizes, Sizes strides) {
  return at::native::_reshape_alias(tensor, C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
}

inline const Tensor& resize(const Tensor& tensor, Sizes sizes, Maybe<c10::MemoryFormat>) {
  if (tensor.sym_sizes() == sizes) return tensor; // a part of another tensor keeps its strides
  auto* held = tensor.unsafeGetTensorImpl();
  held->set_sizes_contiguous(C10_AS_INTARRAYREF_SLOW(sizes));
  const size_t bytes = (held->numel() + held->storage_offset()) * held->dtype().itemsize();
  if (bytes > held->storage().nbytes()) at::detail::getPrivateUse1Hooks().resizePrivateUse1Bytes(held->storage(), bytes);
  return tensor;
}

inline Tensor& set_to_part(Tensor& tensor, at::Storage storage, c10::SymInt offset, Sizes sizes, Sizes strides) {
  auto* held = tensor.unsafeGetTensorImpl();
  held->set_storage_keep_dtype(std::move(storage));
  held->set_storage_offset(offset.expect_int());
  held->set_sizes_and_strides(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(strides));
  return tensor;
}

inline Tensor& set_to_tensor(Tensor& tensor, const Tensor& other) {
  return set_to_part(tensor, other.storage(), other.storage_offset(), other.sym_sizes(), other.sym_strides());
}

inline Tensor& set_to_storage(Tensor& tensor, at::Storage storage) {
  const c10::SymInt length = static_cast<int64_t>(storage.nbytes() / tensor.dtype().itemsize()), one = 1;
  return set_to_part(tensor, std::move(storage), 0, {&length, 1}, {&one, 1});
}

// A device without complex numbers, as there are: a view must not be answered by a copy, which the fallback would make of it.
inline Tensor no_complex_numbers(const Tensor&) {
  TORCH_CHECK_NOT_IMPLEMENTED(false, "this device has no complex numbers");
}

inline void on_the_cpu(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  at::native::cpu_fallback(operation, stack);
}

} // namespace executing

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&executing::on_the_cpu>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, library) { // casts nothing: bf16 autocast is not what these tests are about
  library.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &executing::empty);
  library.impl("empty_strided", &executing::empty_strided);
  library.impl("_copy_from", &executing::copy_from);
  library.impl("_copy_from_and_resize", &executing::copy_from_and_resize);
  library.impl("_local_scalar_dense", &executing::value_of);
  library.impl("as_strided", &executing::as_strided);
  library.impl("view", &executing::view);
  library.impl("_reshape_alias", &executing::reshape_alias);
  library.impl("view_as_complex", &executing::no_complex_numbers);
  library.impl("view_as_real", &executing::no_complex_numbers);
  library.impl("resize_", &executing::resize);
  library.impl("set_.source_Storage_storage_offset", &executing::set_to_part);
  library.impl("set_.source_Tensor", &executing::set_to_tensor);
  library.impl("set_.source_Storage", &executing::set_to_storage);
}
