#include "cpu/dispatch.h"

#include <stdexcept>
#include <string>

namespace lamina {
namespace {

using Record = KernelRecord<AnyKernel>;

}  // namespace

// Bounds of the section that REGISTER_KERNEL fills; the linker defines these two names.
extern "C" {
extern const Record __start_lamina_kernels[] __attribute__((visibility("hidden")));
extern const Record __stop_lamina_kernels[] __attribute__((visibility("hidden")));
}

namespace {

thread_local Isa last = Isa::generic;

// Hand-written before portable, whatever their ISAs: a portable copy for a newer ISA knows nothing of the
// instructions that somebody wrote the other one for. Then the higher ISA.
int rank(const KernelRecordHead& head) { return head.hand_written * kIsaCount + static_cast<int>(head.isa); }

}  // namespace

const KernelRecord<AnyKernel>* find_kernel(const void* table) {
  // A few dozen records: a scan is a fraction of a microsecond's tenth, and there is no cache to keep right.
  const Isa active = active_isa();
  const Record* best = nullptr;
  for (const Record* r = __start_lamina_kernels; r != __stop_lamina_kernels; ++r) {
    if (r->head.table == table && r->head.isa <= active && (!best || rank(r->head) > rank(best->head))) best = r;
  }
  if (best) last = best->head.isa;
  return best;
}

Isa last_isa() { return last; }

void check_kernel_records() {
  for (const Record* a = __start_lamina_kernels; a != __stop_lamina_kernels; ++a) {
    for (const Record* b = a + 1; b != __stop_lamina_kernels; ++b) {
      if (a->head.table == b->head.table && rank(a->head) == rank(b->head)) {
        throw std::logic_error(std::string("two kernels of one table are registered for ") + isa_name(a->head.isa));
      }
    }
  }
}

}  // namespace lamina
