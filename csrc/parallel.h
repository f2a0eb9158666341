// Splitting work over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace flux {

/// Runs task(0), ..., task(tasks - 1), each once, on at most `threads` threads; waits for all of them.
///
/// Which thread runs a task is left to chance, so a task must not depend on it. An exception of a task is thrown here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

/// Whose threads these are: "PyTorch's OpenMP pool" or "std::thread".
const char* thread_source();

}  // namespace flux
