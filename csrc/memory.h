// Uninitialized, aligned memory for numbers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

namespace flux {

constexpr int64_t CACHE_LINE = 64;

/// Blocks that this thread has freed, reused for its next block of queries or its next op: memory fresh from the system
/// costs a page fault per 4096 bytes, which took a fifth of the time of an op on images. At most KEPT bytes per thread.
class Shelf {
public:
    Shelf() { blocks_.reserve(64); }  // so that putting a block back cannot fail

    static Shelf& of_thread() {
        static thread_local Shelf shelf;
        return shelf;
    }

    ~Shelf() {
        for (const Block& block : blocks_) release(block.data);
    }

    /// A block of at least `bytes`, which becomes its size.
    void* take(size_t& bytes) {
#if defined(FLUX_SANITIZED)
        return allocate(bytes);  // not rounded up, so that a sanitizer sees the first byte past the end
#else
        bytes = (bytes / CACHE_LINE + 1) * CACHE_LINE;
        for (size_t i = blocks_.size(); i-- > 0;)  // the most recent block is most likely in the cache
            if (bytes <= blocks_[i].bytes && blocks_[i].bytes <= 2 * bytes) {
                const Block block = blocks_[i];
                blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
                kept_ -= block.bytes;
                bytes = block.bytes;
                return block.data;
            }
        return allocate(bytes);
#endif
    }

    void put_back(void* data, size_t bytes) {
#if defined(FLUX_SANITIZED)
        const bool keep = false;  // a sanitizer must see each block freed
#else
        const bool keep = bytes <= KEPT;
#endif
        if (!keep) {
            release(data);
            return;
        }
        // Free the oldest blocks to make room.
        while (!blocks_.empty() && (kept_ + bytes > KEPT || blocks_.size() == blocks_.capacity())) {
            kept_ -= blocks_.front().bytes;
            release(blocks_.front().data);
            blocks_.erase(blocks_.begin());
        }
        blocks_.push_back({data, bytes});
        kept_ += bytes;
    }

private:
    struct Block {
        void* data;
        size_t bytes;
    };
    // Of the language, not std::aligned_alloc, which Windows lacks.
    static void* allocate(size_t bytes) { return ::operator new(bytes, std::align_val_t{CACHE_LINE}); }
    static void release(void* data) { ::operator delete(data, std::align_val_t{CACHE_LINE}); }
    static constexpr size_t KEPT = 1 << 24;
    std::vector<Block> blocks_;
    size_t kept_ = 0;
};

template <class T>
class Buffer {
public:
    Buffer() = default;
    explicit Buffer(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
        data_ = static_cast<T*>(Shelf::of_thread().take(bytes_));
    }
    ~Buffer() {
        if (data_) Shelf::of_thread().put_back(data_, bytes_);
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;

    T* get() const { return data_; }
    T& operator[](int64_t i) const { return data_[i]; }

private:
    size_t bytes_ = 0;
    T* data_ = nullptr;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

}  // namespace flux
