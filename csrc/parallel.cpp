// A second pool of threads would compete with PyTorch's for the cores: the idle threads of an OpenMP pool spin for a
// while before they sleep. So the work runs on PyTorch's own pool where that is found: PyTorch loads its OpenMP library
// (GNU's) for the whole process, and the library's entry point is looked up by name. Elsewhere each call starts
// threads.

#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace flux {
namespace {

using OpenMPParallel = void (*)(void (*function)(void*), void* data, unsigned threads, unsigned flags);

OpenMPParallel openmp_parallel() {
#if defined(__linux__)
    static const auto found = reinterpret_cast<OpenMPParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
#else
    return nullptr;
#endif
}

struct Work {
    int64_t tasks;
    const std::function<void(int64_t)>& task;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};

    void run() noexcept {
        for (int64_t i = next++; i < tasks; i = next++) {
            try {
                task(i);
            } catch (...) {
                if (!failed.exchange(true)) error = std::current_exception();
                next = tasks;
            }
        }
    }
};

}  // namespace

const char* thread_source() { return openmp_parallel() ? "PyTorch's OpenMP pool" : "std::thread"; }

MatrixProduct matrix_product() {
#if defined(__linux__)
    static const auto found = [] {
        void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
        return reinterpret_cast<MatrixProduct>(library ? dlsym(library, "sgemm_") : nullptr);
    }();
    return found;
#else
    return nullptr;
#endif
}

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task) {
    Work work{tasks, task};
    const int workers = static_cast<int>(std::min<int64_t>(threads, tasks));
    if (workers <= 1) {
        work.run();
    } else if (const auto parallel = openmp_parallel()) {
        parallel([](void* data) { static_cast<Work*>(data)->run(); }, &work, static_cast<unsigned>(workers), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < workers; ++i) others.emplace_back([&work] { work.run(); });
        } catch (const std::system_error&) {
            // The system has no more threads: those that started do the work.
        }
        work.run();
        for (auto& thread : others) thread.join();
    }
    if (work.error) std::rethrow_exception(work.error);
}

}  // namespace flux
