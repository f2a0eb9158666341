// Uninitialised, aligned memory for numbers.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace flux {

constexpr int64_t CACHE_LINE = 64;

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t count)
        : data_(static_cast<T*>(std::aligned_alloc(CACHE_LINE, rounded(count * int64_t{sizeof(T)})))) {
        if (!data_) throw std::bad_alloc();
    }
    T* get() const { return data_.get(); }
    T& operator[](int64_t i) const { return data_.get()[i]; }

private:
    static size_t rounded(int64_t bytes) { return static_cast<size_t>((bytes / CACHE_LINE + 1) * CACHE_LINE); }
    struct Free {
        void operator()(T* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> data_;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace flux
