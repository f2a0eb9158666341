// Splits work over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace flux {

/// Runs task(0), ..., task(tasks - 1), each once, on at most `threads` threads; waits for all of them.
///
/// Any thread may run any task, so a task must not depend on its thread. An exception of a task is rethrown here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

/// Source of the threads: "PyTorch's OpenMP pool" or "std::thread".
const char* thread_source();

/// The BLAS function sgemm of PyTorch's own library, or null where it has none: on its machine's processor it is faster
/// than a product that was compiled for many.
using MatrixProduct = void (*)(const char* transpose_a, const char* transpose_b, const int* m, const int* n,
                               const int* k, const float* alpha, const float* a, const int* lda, const float* b,
                               const int* ldb, const float* beta, float* c, const int* ldc);
MatrixProduct matrix_product();

}  // namespace flux
