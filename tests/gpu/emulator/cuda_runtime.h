// Enough of CUDA for a .cu file of csrc/cuda to be compiled by a C++ compiler and run on the CPU: blocks one after the
// other, the threads of a block as fibers that take turns. A fiber runs until it waits for others: at a barrier of its
// block or at an exchange of its warp. Sums, rounding and races between barriers are those of the kernel; time is not.
//
// What it finds that a GPU would not say: threads of a warp that come to different exchanges, barriers that never open,
// shared memory left as the last block left it (it is filled with a pattern), copies read before they were waited for,
// and, under the address sanitizer, every access outside of what was allocated.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <functional>
#include <vector>

#include "cuda_runtime_api.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

#if !defined(__x86_64__)
#error "the emulator switches between fibers by x86-64 instructions"
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__

// Saves the registers that a call must keep, changes stacks, and returns to where that stack was left.
asm(R"(
.text
.p2align 4
.local emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** saved, void* next);

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kStack = 128 << 10;
constexpr int kSlot = 16;  // bytes that a lane can show to its warp at once

[[noreturn]] inline void stop(const char* what) {
  fprintf(stderr, "emulator: %s\n", what);
  abort();
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;
};

struct Fiber {
  void* sp = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  bool done = false;
  int barriers = 0;   // of the block that it has come to
  int exchanges = 0;  // of its warp
  uint3 index{};
  std::vector<std::vector<Copy>> groups;  // asynchronous copies that are committed, oldest first
  std::vector<Copy> open;                 // and those that are not
};

struct Warp {
  int arrived = 0, passed = 0;  // at the exchange that is under way, and exchanges that all have come to
  int kind = 0;
  alignas(16) char slots[2][kWarp][kSlot];
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> shared;
  int arrived = 0, passed = 0, alive = 0;
  bool progress = false;
  Fiber* now = nullptr;
  void* scheduler = nullptr;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_bottom = nullptr;
  size_t scheduler_size = 0;
  const std::function<void()>* kernel = nullptr;
};

inline Block block;
inline uint3 block_index;
inline dim3 block_size, grid_size;
inline char* shared_memory;
inline bool backwards;  // threads take turns from the last to the first

inline void to_scheduler(bool for_good = false) {
  Fiber* self = block.now;
#if EMULATOR_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, block.scheduler_bottom, block.scheduler_size);
#endif
  emulator_switch(&self->sp, block.scheduler);
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, &block.scheduler_bottom, &block.scheduler_size);
#endif
  (void)for_good;
}

inline void enter() {
#if EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_bottom, &block.scheduler_size);
#endif
  (*block.kernel)();
  block.now->done = true;
  to_scheduler(true);
  stop("a thread that had ended went on");
}

inline void barrier() {
  Fiber* self = block.now;
  const int mine = self->barriers++;
  block.progress = true;
  if (++block.arrived == block.alive) {
    block.arrived = 0;
    ++block.passed;
  }
  while (block.passed <= mine) to_scheduler();
}

// Every lane shows `bytes` and sees those of all the others. `kind` tells one instruction from another.
inline const char (*exchange(int kind, const void* data, int bytes)) [kSlot] {
  Fiber* self = block.now;
  const int thread = int(self - block.fibers.data()), lane = thread % kWarp;
  Warp& warp = block.warps[size_t(thread / kWarp)];
  if (bytes > kSlot) stop("an exchange of more bytes than there is room for");
  const int mine = self->exchanges++;
  if (mine != warp.passed) stop("a lane is ahead of its warp");
  if (warp.arrived == 0) warp.kind = kind;
  if (warp.kind != kind) stop("lanes of a warp came to different instructions that need them all");
  auto& slots = warp.slots[mine % 2];
  if (bytes) memcpy(slots[lane], data, size_t(bytes));
  block.progress = true;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.passed;
  }
  while (warp.passed <= mine) to_scheduler();
  return slots;
}

enum Kind {
  kSync = 1,
  kShuffle,
  kVote,
  kLoadMatrix,
  kMoveMatrix,
  kMultiply
};

template <class T>
T shuffle(T value, int source) {
  static_assert(sizeof(T) <= kSlot);
  const auto slots = exchange(kShuffle, &value, sizeof(T));
  memcpy(&value, slots[source], sizeof(T));
  return value;
}

inline int lane() { return int(block.now - block.fibers.data()) % kWarp; }

inline void start_copy(void* to, const void* from, int bytes, bool valid) {
  if (uintptr_t(to) % unsigned(bytes) || uintptr_t(from) % unsigned(bytes)) stop("an asynchronous copy is misaligned");
  block.now->open.push_back({to, from, bytes, valid});
}
inline void commit_copies() {
  block.now->groups.push_back(std::move(block.now->open));
  block.now->open.clear();
}
// The latest moment at which the hardware may do them.
inline void wait_for_copies(int pending) {
  auto& groups = block.now->groups;
  while (int(groups.size()) > pending) {
    for (const Copy& copy : groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.from, size_t(copy.bytes));
      } else {
        memset(copy.to, 0, size_t(copy.bytes));
      }
    }
    groups.erase(groups.begin());
  }
}

inline void run_block() {
  const int threads = int(block_size.x);
  if (block_size.y != 1 || block_size.z != 1 || threads % kWarp) stop("blocks must be rows of whole warps");
  if (int(block.fibers.size()) < threads) block.fibers.resize(size_t(threads));
  block.warps.assign(size_t(threads / kWarp), Warp());
  block.arrived = block.passed = 0;
  block.alive = threads;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[size_t(i)];
    if (!fiber.stack) fiber.stack = static_cast<char*>(aligned_alloc(64, kStack));
    fiber.done = false;
    fiber.barriers = fiber.exchanges = 0;
    fiber.index = {unsigned(i), 0, 0};
    fiber.groups.clear();
    fiber.open.clear();
#if EMULATOR_ASAN
    __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
    void** top = reinterpret_cast<void**>(fiber.stack + kStack) - 2;  // as after a call: 8 below a multiple of 16
    top[0] = reinterpret_cast<void*>(&enter);
    top[1] = nullptr;
    fiber.sp = top - 6;
    memset(fiber.sp, 0, 6 * sizeof(void*));
  }
  for (int left = threads; left > 0;) {
    block.progress = false;
    for (int k = 0; k < threads; ++k) {
      Fiber& fiber = block.fibers[size_t(backwards ? threads - 1 - k : k)];
      if (fiber.done) continue;
      block.now = &fiber;
#if EMULATOR_ASAN
      __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack, kStack);
#endif
      emulator_switch(&block.scheduler, fiber.sp);
#if EMULATOR_ASAN
      __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
      if (!fiber.done) continue;
      --left;
      --block.alive;
      block.progress = true;
      if (block.alive > 0 && block.arrived == block.alive) {  // a thread that has ended counts as arrived
        block.arrived = 0;
        ++block.passed;
      }
      if (!fiber.open.empty() || !fiber.groups.empty()) {
        for (const auto& group : fiber.groups) {
          if (!group.empty()) stop("a thread ended before its copies did");
        }
        if (!fiber.open.empty()) stop("a thread ended before its copies were committed");
      }
    }
    if (!block.progress) stop("all threads wait for others");
  }
}

}  // namespace emulator

#define threadIdx (emulator::block.now->index)
inline const uint3& blockIdx = emulator::block_index;
inline const dim3& blockDim = emulator::block_size;
inline const dim3& gridDim = emulator::grid_size;

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(emulator::kSync, nullptr, 0); }
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return emulator::shuffle(value, source % emulator::kWarp);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::shuffle(value, emulator::lane() ^ mask);
}
inline int __any_sync(unsigned, int predicate) {
  const auto slots = emulator::exchange(emulator::kVote, &predicate, sizeof predicate);
  for (int i = 0; i < emulator::kWarp; ++i) {
    int theirs;
    memcpy(&theirs, slots[i], sizeof theirs);
    if (theirs) return 1;
  }
  return 0;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = (uint64_t(y) << 32) | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= unsigned((both >> (8 * ((selector >> (4 * i)) & 7))) & 0xff) << (8 * i);
  return result;
}
template <class To, class From>
To emulator_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned x) { return emulator_bits<float>(x); }
inline unsigned __float_as_uint(float x) { return emulator_bits<unsigned>(x); }
inline float __fdiv_rn(float a, float b) { return a / b; }

template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  using namespace emulator;
  grid_size = config->gridDim;
  block_size = config->blockDim;
  const std::function<void()> call = [&] { kernel(args...); };
  block.kernel = &call;
  for (unsigned z = 0; z < grid_size.z; ++z) {
    for (unsigned y = 0; y < grid_size.y; ++y) {
      for (unsigned x = 0; x < grid_size.x; ++x) {
        // A quiet NaN as float16, bfloat16 and float32.
        std::vector<char> memory(config->dynamicSmemBytes + 16, char(0xff));
        shared_memory = reinterpret_cast<char*>((uintptr_t(memory.data()) + 15) / 16 * 16);
        block_index = {x, y, z};
        run_block();
      }
    }
  }
  return cudaSuccess;
}
