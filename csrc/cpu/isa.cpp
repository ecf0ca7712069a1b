#include "cpu/isa.h"

#include <cpuid.h>

#include <atomic>
#include <cstdint>
#include <stdexcept>

namespace lamina {
namespace {

struct CpuFeatures {
  bool avx2, fma, f16c, avx512_core, avx512_vnni, avx512_bf16;
  // Whether the operating system keeps the upper halves of the registers over a context switch.
  bool os_ymm, os_zmm;
};

uint64_t read_xcr0() {
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t(high) << 32) | low;
}

CpuFeatures read_cpu_features() {
  CpuFeatures f{};
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
  f.fma = c & bit_FMA;
  f.f16c = c & bit_F16C;
  if (c & bit_OSXSAVE) {
    const uint64_t xcr0 = read_xcr0();
    f.os_ymm = (xcr0 & 0x06) == 0x06;  // xmm and ymm state
    f.os_zmm = (xcr0 & 0xe6) == 0xe6;  // and opmask, zmm0-15 upper halves, zmm16-31
  }
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.avx2 = b & bit_AVX2;
    f.avx512_core = (b & bit_AVX512F) && (b & bit_AVX512BW) && (b & bit_AVX512DQ) && (b & bit_AVX512VL);
    f.avx512_vnni = c & bit_AVX512VNNI;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) f.avx512_bf16 = a & (1u << 5);
  return f;
}

std::vector<Isa> detect() {
  const CpuFeatures f = read_cpu_features();
  std::vector<Isa> found;
#define ISA_ROW(name, flags, portable, predicate) \
  if (predicate) found.push_back(Isa::name);
#include "cpu/isa.def"
#undef ISA_ROW
  return found;
}

std::atomic<int>& active_slot() {
  static std::atomic<int> active{static_cast<int>(available_isas().back())};
  return active;
}

}  // namespace

const char* isa_name(Isa isa) {
  static constexpr const char* names[] = {
#define ISA_ROW(name, flags, portable, predicate) #name,
#include "cpu/isa.def"
#undef ISA_ROW
  };
  return names[static_cast<int>(isa)];
}

const std::vector<Isa>& available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa active_isa() { return static_cast<Isa>(active_slot().load(std::memory_order_relaxed)); }

void force_isa(const std::string& name) {
  std::string known;
  for (Isa isa : available_isas()) {
    if (name == isa_name(isa)) {
      active_slot().store(static_cast<int>(isa), std::memory_order_relaxed);
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(isa_name(isa));
  }
  bool exists = false;
  for (int i = 0; i < kIsaCount; ++i) exists |= name == isa_name(static_cast<Isa>(i));
  throw std::invalid_argument("ISA '" + name + (exists ? "' is not supported by this machine" : "' is unknown") +
                              "; available: " + known);
}

}  // namespace lamina
