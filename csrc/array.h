// Strided arrays of the four floating types of PyTorch tensors. Numbers are converted when they are loaded, and rounded
// once when they are stored.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace flux {

/// bfloat16: the upper half of a float.
struct BFloat16 {
    uint16_t bits;

    explicit operator double() const {
        const uint32_t wide = uint32_t{bits} << 16;
        float value;
        std::memcpy(&value, &wide, sizeof value);
        return value;
    }
    explicit BFloat16(double x) {
        const float value = static_cast<float>(x);
        uint32_t wide;
        std::memcpy(&wide, &value, sizeof wide);
        // To nearest, ties to even; a NaN keeps a bit of its mantissa.
        bits = value != value ? 0x7fc0 : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
    }
};

/// IEEE 754 half precision.
struct Half {
    uint16_t bits;

    explicit operator double() const {
        const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
        const double magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                                 : exponent == 0 ? std::ldexp(mantissa, -24)
                                                 : std::ldexp(mantissa + 1024, exponent - 25);
        return bits >> 15 ? -magnitude : magnitude;
    }
    explicit Half(double x) {
        const float value = static_cast<float>(x);
        const double magnitude = std::fabs(static_cast<double>(value));
        uint16_t result;
        if (value != value) {
            result = 0x7e00;
        } else if (magnitude >= 65520) {
            result = 0x7c00;
        } else {
            // In units of the last place; below the smallest normal number, in the units of that number.
            int exponent = magnitude < 0x1p-14 ? -14 : std::ilogb(magnitude);
            const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));
            // A mantissa of 2048 carries into the exponent by itself; one below 1024 is subnormal.
            result = static_cast<uint16_t>(static_cast<int>(units) + ((exponent + 14) << 10));
        }
        bits = std::signbit(value) ? static_cast<uint16_t>(result | 0x8000) : result;
    }
};

enum class Type { float64, float32, bfloat16, float16 };

/// Calls `f` with a null pointer to the C++ type.
template <class F>
inline void visit(Type type, F f) {
    switch (type) {
        case Type::float64:
            return f(static_cast<double*>(nullptr));
        case Type::float32:
            return f(static_cast<float*>(nullptr));
        case Type::bfloat16:
            return f(static_cast<BFloat16*>(nullptr));
        case Type::float16:
            return f(static_cast<Half*>(nullptr));
    }
}

/// A view of [B, N, D], [B, N] or [B] numbers; strides count elements, those of missing dimensions are 0.
struct Array {
    char* data = nullptr;
    Type type = Type::float64;
    int64_t item = 8;
    int64_t stride[3] = {0, 0, 0};

    explicit operator bool() const { return data != nullptr; }

    /// The view that begins at entry (b, n, d).
    Array at(int64_t b, int64_t n = 0, int64_t d = 0) const {
        Array view = *this;
        view.data += item * (b * stride[0] + n * stride[1] + d * stride[2]);
        return view;
    }

    double number(int64_t b, int64_t n = 0) const {
        double value;
        at(b, n).load(1, 1, &value, 1);
        return value;
    }

    /// The first `rows` x `columns` entries along the last two dimensions, into rows `pitch` apart.
    void load(int64_t rows, int64_t columns, double* out, int64_t pitch) const {
        visit(type, [&](auto* kind) {
            const auto* from = reinterpret_cast<decltype(kind)>(data);
            each(rows, columns, pitch,
                 [&](int64_t here, int64_t there) { out[there] = static_cast<double>(from[here]); });
        });
    }

    void store(int64_t rows, int64_t columns, const double* in, int64_t pitch) const {
        visit(type, [&](auto* kind) {
            auto* to = reinterpret_cast<decltype(kind)>(data);
            using T = std::remove_pointer_t<decltype(kind)>;
            each(rows, columns, pitch, [&](int64_t here, int64_t there) { to[here] = static_cast<T>(in[there]); });
        });
    }

    /// The largest magnitude among [B, rows, columns]; infinity if one of them is not a number.
    double largest(int64_t B, int64_t rows, int64_t columns) const {
        double result = 0;
        for (int64_t b = 0; b < (stride[0] ? B : 1); ++b)
            visit(type, [&](auto* kind) {
                const auto* from = reinterpret_cast<decltype(kind)>(at(b).data);
                float most = 0;
                bool numbers = true;
                each(rows, columns, columns, [&](int64_t here, int64_t) {
                    const float value = std::fabs(static_cast<float>(static_cast<double>(from[here])));
                    numbers &= value == value;
                    most = value > most ? value : most;
                });
                result = std::max<double>(result, numbers ? most : INFINITY);
            });
        return result;
    }

    /// Rounds `count` numbers to the type of this array.
    void round(int64_t count, double* values) const {
        visit(type, [&](auto* kind) {
            using T = std::remove_pointer_t<decltype(kind)>;
            for (int64_t i = 0; i < count; ++i) values[i] = static_cast<double>(static_cast<T>(values[i]));
        });
    }

private:
    template <class F>
    void each(int64_t rows, int64_t columns, int64_t pitch, F f) const {
        if (stride[2] == 1 && stride[1] == columns && pitch == columns) {  // one run, which compilers vectorize
            for (int64_t i = 0; i < rows * columns; ++i) f(i, i);
        } else if (stride[2] == 1) {
            for (int64_t n = 0; n < rows; ++n)
                for (int64_t d = 0; d < columns; ++d) f(n * stride[1] + d, n * pitch + d);
        } else {
            for (int64_t n = 0; n < rows; ++n)
                for (int64_t d = 0; d < columns; ++d) f(n * stride[1] + d * stride[2], n * pitch + d);
        }
    }
};

}  // namespace flux
