#include "plan/plan.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/dispatch.h"
#include "ops/workspace.h"

namespace lamina {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kHugePage = size_t{2} << 20;
// What kernels may read behind the end of a tensor.
constexpr size_t kSlack = 64;

// Whether all elements of an operand lie within `bytes` bytes.
bool lies_within(const Operand& operand, int64_t bytes) {
  if (operand.dtype == DType::other) return false;
  int64_t last = 0;
  for (size_t i = 0; i < operand.shape.size(); ++i) {
    if (operand.shape[i] < 0 || operand.strides[i] < 0) return false;
    if (operand.shape[i] == 0) return true;
    int64_t reach;
    if (__builtin_mul_overflow(operand.shape[i] - 1, operand.strides[i], &reach)) return false;
    if (__builtin_add_overflow(last, reach, &last)) return false;
  }
  int64_t end;
  if (__builtin_mul_overflow(last + 1, int64_t{dtype_bytes(operand.dtype)}, &end)) return false;
  if (__builtin_add_overflow(end, operand.offset, &end)) return false;
  return operand.offset >= 0 && end <= bytes;
}

}  // namespace

void ArenaPool::Lease::Free::operator()(void* data) const { std::free(data); }

ArenaPool::Lease::Lease(ArenaPool& pool, size_t bytes) : pool_(pool) {
  if (bytes == 0) return;
  {
    const std::lock_guard lock(pool.mutex_);
    if (!pool.idle_.empty()) {
      arena_ = std::move(pool.idle_.back());
      pool.idle_.pop_back();
    }
  }
  if (arena_.size >= bytes) return;
  // Huge pages where the system gives them, for arenas that fill some.
  const size_t page = bytes >= kHugePage ? kHugePage : kPage;
  const size_t size = (bytes + kSlack + page - 1) / page * page;
  arena_.data.reset();
  arena_.data.reset(std::aligned_alloc(page, size));
  if (!arena_.data) {
    arena_.size = 0;
    throw std::bad_alloc();
  }
  arena_.size = size - kSlack;
#ifdef MADV_HUGEPAGE
  if (page == kHugePage) madvise(arena_.data.get(), size, MADV_HUGEPAGE);
#endif
}

ArenaPool::Lease::~Lease() {
  if (!arena_.data) return;
  const std::lock_guard lock(pool_.mutex_);
  pool_.idle_.push_back(std::move(arena_));
}

Plan::Plan(std::shared_ptr<ArenaPool> pool, std::vector<int64_t> sizes, const std::vector<StepSpec>& steps)
    : pool_(std::move(pool)), sizes_(std::move(sizes)) {
  if (sizes_.empty() || sizes_[0] < 0) throw FormatError("plan: it says no size of its arena");
  for (const StepSpec& spec : steps) {
    Step step{make_step(spec.op, spec.arguments), {}};
    for (const Argument& argument : spec.arguments) {
      if (const auto* operand = std::get_if<Operand>(&argument)) step.operands.push_back(*operand);
      if (const auto* several = std::get_if<std::vector<Operand>>(&argument)) {
        step.operands.insert(step.operands.end(), several->begin(), several->end());
      }
    }
    for (const Operand& operand : step.operands) {
      const bool known = operand.buffer >= 0 && operand.buffer < int64_t(sizes_.size());
      if (!known || operand.shape.size() != operand.strides.size() || !lies_within(operand, sizes_[operand.buffer])) {
        throw FormatError("plan: a tensor of step '" + spec.op + "' does not fit its buffer");
      }
    }
    most_operands_ = std::max(most_operands_, step.operands.size());
    steps_.push_back(std::move(step));
  }
}

template <class Around>
void Plan::run_steps(void* const* addresses, const Around& around) const {
  const ArenaPool::Lease arena(*pool_, size_t(sizes_[0]));
  if (WorkspaceFrame::poisoned() && arena.data()) std::memset(arena.data(), 0xff, size_t(sizes_[0]));
  std::vector<TensorView> views(most_operands_);
  for (size_t s = 0; s < steps_.size(); ++s) {
    const Step& step = steps_[s];
    for (size_t i = 0; i < step.operands.size(); ++i) {
      const Operand& operand = step.operands[i];
      char* base = static_cast<char*>(operand.buffer == 0 ? arena.data() : addresses[operand.buffer - 1]);
      views[i] = operand.view(base ? base + operand.offset : nullptr);
    }
    around(s, [&] { step.call->run(views.data()); });
  }
}

void Plan::run(void* const* addresses) const {
  run_steps(addresses, [](size_t, const auto& step) { step(); });
}

std::vector<StepTime> Plan::profile(void* const* addresses) const {
  using Clock = std::chrono::steady_clock;
  std::vector<StepTime> times(steps_.size());
  run_steps(addresses, [&](size_t s, const auto& step) {
    const auto start = Clock::now();
    step();
    times[s] = {std::chrono::duration<double>(Clock::now() - start).count(), isa_name(last_isa())};
  });
  return times;
}

}  // namespace lamina
