// The backend `hccl` of the tests: gloo over the same memory, which it is shown as CPU tensors.
#pragma once

#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <algorithm>
#include <atomic>

#include "operators.h"

namespace executing {

using Tensors = std::vector<at::Tensor>;
using Work = c10::intrusive_ptr<c10d::Work>;

inline std::atomic<int64_t>& calls() { // so that a test can say that this is what ran
  static std::atomic<int64_t> count{0};
  return count;
}

inline Tensors as_cpu(const Tensors& tensors) {
  ++calls();
  Tensors found;
  for (const auto& tensor : tensors) found.push_back(as_cpu(tensor));
  return found;
}

inline std::vector<Tensors> as_cpu(const std::vector<Tensors>& lists) {
  std::vector<Tensors> found;
  for (const auto& list : lists) found.push_back(as_cpu(list));
  return found;
}

// What has happened already. Gloo's own work copies its result out again on a second wait, over what was made of it since.
struct Done final : c10d::Work {
  bool wait(std::chrono::milliseconds) override { return true; }
  bool isCompleted() override { return true; }
  bool isSuccess() const override { return true; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override {
    auto future = c10::make_intrusive<c10::ivalue::Future>(c10::NoneType::get());
    future->markCompleted();
    return future;
  }
};

class Collectives final : public c10d::Backend {
 public:
  Collectives(c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) : c10d::Backend(rank, size), gloo_(std::move(gloo)) {}
  const std::string getBackendName() const override { return "hccl"; }

  Work broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    auto there = as_cpu(tensors);
    return finished(gloo_->broadcast(there, options));
  }
  Work allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    auto there = as_cpu(tensors);
    return reduced(there, options, [&](auto summing) { return gloo_->allreduce(there, summing); });
  }
  Work allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    c10d::AllreduceOptions each;
    each.reduceOp = options.reduceOp;
    for (const auto& tensor : tensors) {
      Tensors one{tensor};
      allreduce(one, each);
    }
    return c10::make_intrusive<Done>();
  }
  Work reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    auto there = as_cpu(tensors);
    return finished(gloo_->reduce(there, options));
  }
  Work allgather(std::vector<Tensors>& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    auto there = as_cpu(out);
    auto from = as_cpu(in);
    return finished(gloo_->allgather(there, from, options));
  }
  Work _allgather_base(at::Tensor& out, at::Tensor& in, const c10d::AllgatherOptions& options) override {
    auto both = as_cpu(Tensors{out, in});
    return finished(gloo_->_allgather_base(both[0], both[1], options));
  }
  Work allgather_into_tensor_coalesced(Tensors& out, Tensors& in, const c10d::AllgatherOptions& options) override {
    for (size_t each = 0; each < out.size(); ++each) _allgather_base(out[each], in[each], options);
    return c10::make_intrusive<Done>();
  }
  Work _reduce_scatter_base(at::Tensor& out, at::Tensor& in, const c10d::ReduceScatterOptions& options) override {
    auto both = as_cpu(Tensors{out, in});
    return reduced({both[0]}, options, [&](auto summing) { return gloo_->_reduce_scatter_base(both[0], both[1], summing); });
  }
  Work reduce_scatter_tensor_coalesced(Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& options) override {
    for (size_t each = 0; each < out.size(); ++each) _reduce_scatter_base(out[each], in[each], options);
    return c10::make_intrusive<Done>();
  }
  Work alltoall_base(at::Tensor& out, at::Tensor& in, std::vector<int64_t>& out_sizes, std::vector<int64_t>& in_sizes,
                     const c10d::AllToAllOptions& options) override {
    auto both = as_cpu(Tensors{out, in});
    return finished(gloo_->alltoall_base(both[0], both[1], out_sizes, in_sizes, options));
  }
  Work scatter(Tensors& out, std::vector<Tensors>& in, const c10d::ScatterOptions& options) override {
    auto from = as_cpu(in);
    auto there = as_cpu(out);
    return finished(gloo_->scatter(there, from, options));
  }
  Work gather(std::vector<Tensors>& out, Tensors& in, const c10d::GatherOptions& options) override {
    auto there = as_cpu(out);
    auto from = as_cpu(in);
    return finished(gloo_->gather(there, from, options));
  }
  Work barrier(const c10d::BarrierOptions& options) override { return finished(gloo_->barrier(options)); }

  // These two alone go on after the call: a pipeline's neighbours may each send before they receive.
  Work send(Tensors& tensors, int to, int tag) override {
    auto there = as_cpu(tensors);
    return gloo_->send(there, to, tag);
  }
  Work recv(Tensors& tensors, int from, int tag) override {
    auto there = as_cpu(tensors);
    return gloo_->recv(there, from, tag);
  }

 private:
  // FSDP2 asks accelerators for averages, which gloo has not: a sum, divided.
  template <class Options, class Run>
  Work reduced(const Tensors& results, const Options& options, Run run) {
    auto summing = options;
    const bool average = options.reduceOp == c10d::ReduceOp::AVG;
    if (average) summing.reduceOp = c10d::ReduceOp::SUM;
    auto work = finished(run(summing));
    const at::NoGradGuard plain;
    if (average)
      for (auto tensor : results) tensor.div_(getSize());
    return work;
  }

  static Work finished(const Work& work) {
    work->wait();
    return c10::make_intrusive<Done>();
  }

  c10::intrusive_ptr<c10d::Backend> gloo_;
};

} // namespace executing
