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

}  // namespace flux
