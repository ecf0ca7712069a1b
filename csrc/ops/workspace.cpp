#include "ops/workspace.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace lamina {
namespace {

std::atomic<bool> poison{false};

constexpr size_t kAlignment = 64;
constexpr size_t kSlack = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kFirstBlock = kHugePage;

// Huge pages where the system gives them: kernels walk through hundreds of small ones, which costs up to 8%. Their
// alignment also means the same addresses modulo 4096 in every run, which makes timings repeatable.
void* allocate(size_t size) {
  size = (size + kHugePage - 1) / kHugePage * kHugePage;
  void* data = std::aligned_alloc(kHugePage, size);
#ifdef MADV_HUGEPAGE
  if (data) madvise(data, size, MADV_HUGEPAGE);
#endif
  return data;
}

struct Block {
  char* data;
  size_t size;
};

struct Workspace {
  std::vector<Block> blocks;  // earlier blocks stay where they are while pieces of them are in use
  size_t block = 0;           // the one being handed out
  size_t used = 0;            // bytes of it

  ~Workspace() {
    for (Block& b : blocks) std::free(b.data);
  }

  void* take(size_t bytes) {
    bytes = (bytes + kSlack + kAlignment - 1) / kAlignment * kAlignment;
    while (block < blocks.size() && used + bytes > blocks[block].size) {
      ++block;
      used = 0;
    }
    if (block == blocks.size()) {
      const size_t last = blocks.empty() ? kFirstBlock / 2 : blocks.back().size;
      const size_t size = std::max(2 * last, bytes);
      void* data = allocate(size);
      if (!data) throw std::bad_alloc();
      blocks.push_back({static_cast<char*>(data), size});
      used = 0;
    }
    char* piece = blocks[block].data + used;
    used += bytes;
    if (poison.load(std::memory_order_relaxed)) std::memset(piece, 0xff, bytes);
    return piece;
  }

  // At rest, several blocks become one as large as all of them, so that the next call finds its pieces together.
  void consolidate() {
    if (blocks.size() < 2) return;
    size_t total = 0;
    for (Block& b : blocks) {
      total += b.size;
      std::free(b.data);
    }
    blocks.clear();
    void* data = allocate(total);
    if (data) blocks.push_back({static_cast<char*>(data), total});
  }
};

thread_local Workspace workspace;
thread_local int frames = 0;

}  // namespace

WorkspaceFrame::WorkspaceFrame() : block_(workspace.block), used_(workspace.used) { ++frames; }

WorkspaceFrame::~WorkspaceFrame() {
  workspace.block = block_;
  workspace.used = used_;
  if (--frames == 0) workspace.consolidate();
}

void* WorkspaceFrame::take_bytes(size_t bytes) { return workspace.take(bytes); }

void WorkspaceFrame::set_poison(bool on) { poison = on; }

bool WorkspaceFrame::poisoned() { return poison.load(std::memory_order_relaxed); }

}  // namespace lamina
