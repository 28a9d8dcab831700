// Per-thread buffers that grow and stay, so that no kernel call pays for fresh pages.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace moelora {

// A cache-line aligned array of at least n elements; its contents last until the next take() on
// this object.
template <class T>
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data_); }

  T* take(int64_t n) {
    if (n > capacity_) {
      std::free(data_);
      const size_t bytes = (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
      data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
      if (!data_) {
        capacity_ = 0;
        throw std::bad_alloc();
      }
      capacity_ = n;
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

}  // namespace moelora
