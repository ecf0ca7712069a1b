// From a kernel's name to the best variant this machine may run.
//
// A kernel's header declares a table (`extern const KernelTable<void(const Args&)> int8_gemm_table;`), each variant
// registers itself with REGISTER_KERNEL(table, function) in the file that defines it, and callers take table.get().
// Registration is data in a linker section, not code: no static initialiser compiled with AVX-512 flags can run on a
// machine without AVX-512, and there is no order of initialisation to get wrong.
#pragma once

#include "cpu/isa.h"

namespace lamina {

using AnyKernel = void (*)();

struct KernelRecordHead {
  const void* table;
  Isa isa;
  bool hand_written;
};

// 32 bytes and aligned so: the linker then lays the records of all files out as one array.
template <class Function>
struct alignas(32) KernelRecord {
  KernelRecordHead head;
  Function function;
};
static_assert(sizeof(KernelRecord<AnyKernel>) == 32);

// The best variant of `table` not above the active ISA: the highest hand-written one, else the highest portable one,
// else null. Remembers its ISA for last_isa().
const KernelRecord<AnyKernel>* find_kernel(const void* table);

// The ISA of the kernel that this thread looked up last: what tests use to prove which code ran.
Isa last_isa();

// Throws std::logic_error if two variants of one table claim the same ISA. Called once, when the module is loaded.
void check_kernel_records();

template <class Signature>
class KernelTable;

template <class Result, class... Args>
class KernelTable<Result(Args...)> {
 public:
  using Function = Result (*)(Args...);

  // Null only for tables without a portable variant (the machine-peak probes).
  Function find() const {
    const auto* record = find_kernel(this);
    return record ? reinterpret_cast<Function>(record->function) : nullptr;
  }

  // Tables with a portable variant always have an answer: the generic ISA exists everywhere.
  Function get() const { return find(); }

 private:
  // Tables are told apart by their address, so each needs storage of its own.
  char unused_ = 0;
};

}  // namespace lamina

#define LAMINA_CONCAT_(a, b) a##b
#define LAMINA_CONCAT(a, b) LAMINA_CONCAT_(a, b)

#define REGISTER_KERNEL(table, ...)                                                                              \
  __attribute__((section("lamina_kernels"),                                                                      \
                 used)) constinit const ::lamina::KernelRecord<std::remove_cvref_t<decltype(table)>::Function>   \
  LAMINA_CONCAT(kernel_record_, __COUNTER__) = {{&(table), ::lamina::Isa::LAMINA_ISA, LAMINA_HAND_WRITTEN != 0}, \
                                                &(__VA_ARGS__)}
