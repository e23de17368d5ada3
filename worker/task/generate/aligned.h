// worker/task/generate/aligned.h
//
// A std::vector whose numbers begin at a cache line: a vector load that crosses two lines costs two.

#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace refinery::generate {

template <typename T>
struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kLine{64};

  LineAllocator() = default;
  template <typename Other>
  LineAllocator(const LineAllocator<Other>&) {}  // NOLINT(google-explicit-constructor): an allocator's rebinding

  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* memory, size_t) { ::operator delete(memory, kLine); }
  bool operator==(const LineAllocator&) const { return true; }
};

template <typename T>
using AlignedVector = std::vector<T, LineAllocator<T>>;

}  // namespace refinery::generate
