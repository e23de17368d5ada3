#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <sys/mman.h>

#include <algorithm>

#include "worker/task/model/weight_arena.h"

namespace refinery::model {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;
constexpr int64_t kBlockBytes = int64_t{64} << 20;  // pages of it that hold no weight are never touched
constexpr int64_t kAlignment = 64;

}  // namespace

struct WeightArena::Block {
  explicit Block(int64_t wanted) : size(wanted), mapped(wanted + kHugePage) {
    memory = mmap(nullptr, static_cast<size_t>(mapped), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(memory != MAP_FAILED, "out of memory: ", wanted, " bytes for weights");
    const auto address = reinterpret_cast<uintptr_t>(memory);
    start = reinterpret_cast<char*>((address + kHugePage - 1) / kHugePage * kHugePage);
    madvise(start, static_cast<size_t>(size), MADV_HUGEPAGE);  // a hint: without huge pages everything works, slower
  }
  ~Block() { munmap(memory, static_cast<size_t>(mapped)); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  const int64_t size, mapped;
  void* memory = nullptr;
  char* start = nullptr;
};

at::Tensor WeightArena::Empty(at::IntArrayRef shape, at::ScalarType dtype) {
  const int64_t bytes = c10::multiply_integers(shape) * static_cast<int64_t>(c10::elementSize(dtype));
  const int64_t padded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  if (block_ == nullptr || used_ + padded > block_->size) {
    block_ = std::make_shared<Block>((std::max(padded, kBlockBytes) + kHugePage - 1) / kHugePage * kHugePage);
    used_ = 0;
  }
  char* data = block_->start + used_;
  used_ += padded;
  return at::from_blob(data, shape, [block = block_](void*) {}, at::TensorOptions().dtype(dtype));
}

}  // namespace refinery::model
