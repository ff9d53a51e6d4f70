// What Python sees of the device. One translation unit: most of the time goes into torch's headers.
#include <torch/extension.h>

#include "collectives.h"

namespace executing {
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

static const bool registered = [] {
  c10::SetAllocator(NPU, &memory());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
  return true;
}();
} // namespace executing

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("device_count", [] { return executing::DEVICES; });
  module.def("current_device", [] { return executing::current(); });
  module.def("set_device", [](int index) { executing::current() = index; });
  module.def("collective_calls", [] { return executing::calls().load(); });
  module.def("over_gloo", [](c10::intrusive_ptr<c10d::Backend> gloo, int rank, int size) -> c10::intrusive_ptr<c10d::Backend> {
    return c10::make_intrusive<executing::Collectives>(std::move(gloo), rank, size);
  });
}
