// A CUDA device guard that does nothing, for a torch built without CUDA: what asks for the current device gets device 0.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/device_lazy_init.h>

namespace {

using c10::Device;
using c10::DeviceType;
using c10::Stream;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};

const Guard guard;

}  // namespace

// Put the guard into torch's registry, or take it out; returns whether it was there before. While it is there, torch
// takes CUDA for initialized; afterwards it asks `torch.cuda` again, which says why there is no device.
extern "C" bool set_guard(bool present) {
  torch::utils::set_requires_device_init(DeviceType::CUDA, !present);
  auto& registered = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  return registered.exchange(present ? &guard : nullptr) != nullptr;
}
