// A piece of a model as one list of steps over the functions of csrc/ops: run() calls them one after the other, with
// views into buffers.
//
// Buffer 0 is the arena, where everything lies that nobody sees from outside; whoever makes the plan has laid it out so
// that what is needed at the same time does not overlap. The others are the caller's: inputs, outputs and constants,
// given by their addresses at each run. Several threads may run one plan at once: each run has an arena of its own.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "plan/step.h"

namespace lamina {

// Memory for arenas, kept between runs. Plans of one model share it, since mostly one of them runs at a time.
class ArenaPool {
 public:
  // A piece of memory for one run.
  class Lease {
   public:
    Lease(ArenaPool& pool, size_t bytes);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    void* data() const { return arena_.data.get(); }

   private:
    friend class ArenaPool;
    struct Free {
      void operator()(void* data) const;
    };
    struct Arena {
      std::unique_ptr<void, Free> data;
      size_t size = 0;
    };
    ArenaPool& pool_;
    Arena arena_;
  };

 private:
  std::mutex mutex_;
  std::vector<Lease::Arena> idle_;
};

struct StepSpec {
  std::string op;
  std::vector<Argument> arguments;
};

// What one step took.
struct StepTime {
  double seconds;
  std::string isa;  // of the kernel looked up last
};

class Plan {
 public:
  // sizes: bytes of the buffers, the arena first. FormatError where steps do not fit their functions, or a tensor does
  // not fit its buffer.
  Plan(std::shared_ptr<ArenaPool> pool, std::vector<int64_t> sizes, const std::vector<StepSpec>& steps);

  // addresses: of the buffers from 1 on.
  void run(void* const* addresses) const;

  // The same, with what each step took.
  std::vector<StepTime> profile(void* const* addresses) const;

  // Of the buffers that the caller gives.
  size_t address_count() const { return sizes_.size() - 1; }

 private:
  struct Step {
    std::unique_ptr<StepCall> call;
    std::vector<Operand> operands;
  };

  template <class Around>
  void run_steps(void* const* addresses, const Around& around) const;

  std::shared_ptr<ArenaPool> pool_;
  std::vector<int64_t> sizes_;
  std::vector<Step> steps_;
  size_t most_operands_ = 0;
};

}  // namespace lamina
