// The device `npu` of the tests: its memory is the host's, its streams are always done, and there are as many of it as asked for.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <mutex>

namespace executing {

constexpr auto NPU = c10::DeviceType::PrivateUse1;
constexpr int DEVICES = 8;
constexpr size_t MEMORY = size_t{64} << 30; // bytes that each pretends to have

inline int& current() {
  static thread_local int index = 0;
  return index;
}

// A device of this kind is current for as long as this lives.
struct On {
  int before = current();
  explicit On(std::optional<c10::Device> device) {
    if (device && device->has_index()) current() = device->index();
  }
  ~On() { current() = before; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Device = c10::Device;
  using Stream = c10::Stream;
  using Index = c10::DeviceIndex;
  c10::DeviceType type() const override { return NPU; }
  Device getDevice() const override { return {NPU, static_cast<Index>(current())}; }
  void setDevice(Device device) const override { current() = device.index(); }
  void uncheckedSetDevice(Device device) const noexcept override { current() = device.index(); }
  Device exchangeDevice(Device device) const override {
    const auto before = getDevice();
    setDevice(device);
    return before;
  }
  Index deviceCount() const noexcept override { return DEVICES; }

  // All work is done when a call returns: one stream, events that have happened.
  Stream getStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return getStream(device); }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(const Index) const override {}
  void record(void**, const Stream&, const Index, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

// Host memory under the device's name, counted as an accelerator counts it.
struct Memory final : c10::DeviceAllocator {
  using Stats = c10::CachingDeviceAllocator::DeviceStats;
  struct Block {
    void* address;
    size_t bytes;
    int device;
  };

  c10::DataPtr allocate(size_t bytes) override {
    auto* block = new Block{nullptr, bytes, current()};
    if (bytes) TORCH_CHECK(!posix_memalign(&block->address, 64, bytes), "no memory for ", bytes, " bytes");
    count(block->device, static_cast<int64_t>(bytes));
    return {block->address, block, &release, c10::Device(NPU, static_cast<c10::DeviceIndex>(block->device))};
  }
  static void release(void* held);
  void copy_data(void* to, const void* from, size_t bytes) const override { memcpy(to, from, bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  Stats getDeviceStats(c10::DeviceIndex device) override {
    const std::lock_guard lock(mutex_);
    return stats_.at(device);
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex device) override {
    const std::lock_guard lock(mutex_);
    for (auto& stat : stats_.at(device).allocated_bytes) stat.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override {
    const std::lock_guard lock(mutex_);
    return {MEMORY - static_cast<size_t>(stats_.at(device).allocated_bytes[0].current), MEMORY};
  }
  void count(int device, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    auto& stat = stats_.at(device).allocated_bytes[0]; // index 0: of all pools together
    bytes >= 0 ? stat.increase(bytes) : stat.decrease(-bytes);
  }

 private:
  std::mutex mutex_;
  std::array<Stats, DEVICES> stats_;
};

inline Memory& memory() {
  static auto* held = new Memory; // never destroyed: tensors may be freed while the process ends
  return *held;
}

inline void Memory::release(void* held) {
  auto* block = static_cast<Block*>(held);
  memory().count(block->device, -static_cast<int64_t>(block->bytes));
  free(block->address);
  delete block;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  using Index = c10::DeviceIndex;
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(Index) const override { return true; }
  Index deviceCount() const override { return DEVICES; }
  Index getCurrentDevice() const override { return static_cast<Index>(current()); }
  void setCurrentDevice(Index device) const override { current() = device; }
  Index exchangeDevice(Index device) const override {
    const auto before = getCurrentDevice();
    current() = device;
    return before;
  }
  Index maybeExchangeDevice(Index device) const override { return exchangeDevice(device); }
  bool isPinnedPtr(const void*) const override { return false; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::kCPU); }
  at::Device getDeviceFromPtr(void*) const override { return {NPU, static_cast<Index>(current())}; }
  const at::Generator& getDefaultGenerator(Index) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(Index) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto* held = storage.unsafeGetStorageImpl();
    const On on(storage.device());
    auto grown = memory().allocate(bytes);
    if (const auto kept = std::min(bytes, held->nbytes()); kept && held->data()) memcpy(grown.get(), held->data(), kept);
    held->set_data_ptr_noswap(std::move(grown));
    held->set_nbytes(bytes);
  }
};

} // namespace executing
