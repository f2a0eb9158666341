// The Python module fluxkernels.cpu._kernels: chooses the instruction set, unpacks arguments, releases the GIL.
//
// No header of PyTorch is included, so one binary works with every release of PyTorch: a tensor is read by its Python
// methods. fluxkernels/cpu/host.py knows the shapes. A kernel writes into the last tensors of its arguments, its
// results.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <stdexcept>
#include <string>
#include <tuple>

#include "arguments.h"
#include "parallel.h"

namespace py = pybind11;
using namespace flux;

namespace {

std::vector<const Kernels*> supported() {
    std::vector<const Kernels*> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        list.push_back(&avx512_kernels);
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) list.push_back(&avx2_kernels);
#endif
    list.push_back(&baseline_kernels);
    return list;
}

std::atomic<const Kernels*> chosen{supported().front()};

void use(const std::string& name) {
    for (const Kernels* kernels : supported())
        if (kernels->name == name) {
            chosen = kernels;
            return;
        }
    throw std::invalid_argument("this machine runs no target '" + name + "'");
}

/// Python objects that a tensor is read with; they live as long as the process.
struct Reader {
    py::object dtypes[4];  // by Type
    py::str data_ptr{"data_ptr"}, dtype{"dtype"}, stride{"stride"};

    Reader() {
        const py::module_ torch = py::module_::import("torch");
        const char* const names[] = {"float64", "float32", "bfloat16", "float16"};
        std::transform(std::begin(names), std::end(names), dtypes, [&](auto name) { return torch.attr(name); });
    }

    Type type(const py::object& tensor) const {
        const py::object wanted = py::getattr(tensor, dtype);
        const auto found = std::find_if(std::begin(dtypes), std::end(dtypes), [&](auto& d) { return d.is(wanted); });
        if (found == std::end(dtypes)) throw std::invalid_argument("a kernel takes tensors of floating types");
        return static_cast<Type>(found - std::begin(dtypes));
    }

    static py::object call(const py::object& tensor, const py::str& method) {
        PyObject* result = PyObject_CallMethodNoArgs(tensor.ptr(), method.ptr());
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }
};

const Reader* reader = nullptr;  // made with the module

/// Where the numbers of a tensor begin, and what they are.
Array numbers(const py::object& tensor) {
    constexpr int64_t SIZES[] = {8, 4, 2, 2};
    Array result;
    result.data = static_cast<char*>(PyLong_AsVoidPtr(Reader::call(tensor, reader->data_ptr).ptr()));
    static char nothing;
    if (!result.data) result.data = &nothing;  // of a tensor without numbers, which is there all the same
    result.type = reader->type(tensor);
    result.item = SIZES[static_cast<int>(result.type)];
    return result;
}

Array array(const py::object& tensor) {
    if (tensor.is_none()) return {};
    Array result = numbers(tensor);
    const py::tuple strides = Reader::call(tensor, reader->stride);
    if (strides.size() > std::size(result.stride))
        throw std::invalid_argument("a kernel takes tensors of three dimensions");
    for (size_t k = 0; k < strides.size(); ++k) result.stride[k] = PyLong_AsLongLong(strides[k].ptr());
    return result;
}

/// Whether no exponent has all bits set, as those of NaN and infinity. `exponent` is the mask of its bits: adding one
/// to such an exponent carries into the sign's bit.
template <class Bits>
bool all_finite(Bits exponent, const void* data, int64_t count) {
    const Bits* bits = static_cast<const Bits*>(data);
    const Bits one = exponent & -exponent, sign = exponent + one;
    Bits carried = 0;
    for (int64_t i = 0; i < count; ++i) carried |= (bits[i] & exponent) + one;
    return !(carried & sign);
}

bool is_finite(const py::object& tensor, int64_t count) {
    const Array values = numbers(tensor);
    switch (values.type) {
        case Type::float64:
            return all_finite<uint64_t>(0x7ff0000000000000, values.data, count);
        case Type::float32:
            return all_finite<uint32_t>(0x7f800000, values.data, count);
        case Type::bfloat16:
            return all_finite<uint16_t>(0x7f80, values.data, count);
        default:
            return all_finite<uint16_t>(0x7c00, values.data, count);
    }
}

/// One thread for few multiply-adds, which are done before a second thread wakes up. `each` of them are needed per pair
/// in addition to its distance.
int threads_for(const Shape& shape, int threads, int64_t each = 10) {
    const double operations = double(shape.B) * shape.N * shape.M * (shape.D + each);
    return operations < 2e5 ? 1 : threads;
}

Shape shape_of(const std::vector<int64_t>& sizes) { return {sizes.at(0), sizes.at(1), sizes.at(2), sizes.at(3)}; }

template <class Arguments>
void run(void (*kernel)(const Arguments&), const Arguments& args) {
    py::gil_scoped_release release;
    kernel(args);
}

using Sizes = std::vector<int64_t>;
using View = const py::object&;

void kde(const Sizes& sizes, int threads, View z, View refs, View sigma2, View shift, View mean, View log_density) {
    const Shape shape = shape_of(sizes);
    run(chosen.load()->kde, KdeArguments{shape, threads_for(shape, threads), array(z), array(refs), array(sigma2),
                                         array(shift), array(mean), array(log_density)});
}

void kde_backward(const Sizes& sizes, int threads, View g_shift, View g_mean, View g_log_density, View z, View refs,
                  View sigma2, View g_z, View g_refs, View g_sigma2) {
    const Shape shape = shape_of(sizes);
    run(chosen.load()->kde_backward,
        KdeBackwardArguments{shape, threads_for(shape, threads), array(g_shift), array(g_mean), array(g_log_density),
                             array(z), array(refs), array(sigma2), array(g_z), array(g_refs), array(g_sigma2)});
}

AverageArguments average_of(const Sizes& sizes, int threads, const std::tuple<bool, bool, bool>& options,
                            const std::vector<py::object>& inputs) {
    const Shape shape = shape_of(sizes);
    const int64_t width = sizes.at(4);
    const auto [exclude_self, laplace, per_reference] = options;
    return {shape,
            threads_for(shape, threads, width + 10),
            width,
            exclude_self,
            laplace,
            per_reference,
            array(inputs.at(0)),
            array(inputs.at(1)),
            array(inputs.at(2)),
            array(inputs.at(3)),
            array(inputs.at(4)),
            {},
            {},
            {}};
}

/// Sizes: those of the shape, and the width. Options: exclude_self, laplace, per_reference. Inputs: those from z to
/// log_weights.
void kernel_average(const Sizes& sizes, int threads, const std::tuple<bool, bool, bool>& options,
                    const std::vector<py::object>& inputs, View shift, View average, View log_sum) {
    AverageArguments args = average_of(sizes, threads, options, inputs);
    args.shift = array(shift);
    args.average = array(average);
    args.log_sum = array(log_sum);
    run(chosen.load()->kernel_average, args);
}

void kernel_average_backward(const Sizes& sizes, int threads, const std::tuple<bool, bool, bool>& options,
                             const std::vector<py::object>& inputs, View g_shift, View g_average, View g_log_sum,
                             View g_z, View g_refs, View g_sigma2, View g_values, View g_log_weights) {
    run(chosen.load()->kernel_average_backward,
        AverageBackwardArguments{average_of(sizes, threads, options, inputs), array(g_shift), array(g_average),
                                 array(g_log_sum), array(g_z), array(g_refs), array(g_sigma2), array(g_values),
                                 array(g_log_weights)});
}

/// Writes [B, N] indices to the address `out`.
void sample_reference(const Sizes& sizes, int threads, const std::tuple<bool, bool, bool>& options,
                      const std::vector<py::object>& inputs, uint64_t seed, uintptr_t out) {
    run(chosen.load()->sample_reference,
        SampleArguments{average_of(sizes, threads, options, inputs), seed, reinterpret_cast<int64_t*>(out)});
}

void residual_gradient(const Sizes& sizes, int threads, View z, View field, View refs, View sigma2, View factor,
                       View gradient) {
    const Shape shape = shape_of(sizes);
    run(chosen.load()->residual_gradient,
        ResidualArguments{shape, threads_for(shape, threads), array(z), array(field), array(refs), array(sigma2),
                          array(factor), array(gradient)});
}

void langevin(const Sizes& sizes, int threads, int64_t steps, View noise, int64_t between, uint64_t seed, View x,
              View refs, View sigma2, View tau, View x0, View shift0, View xt, View shift_t) {
    const Shape shape = shape_of(sizes);
    LangevinArguments args{shape,         threads_for(shape, threads),
                           array(x),      array(refs),
                           array(sigma2), array(tau),
                           steps,         {},
                           seed,          array(x0),
                           array(shift0), array(xt),
                           array(shift_t)};
    Array drawn = array(noise);  // in the first step
    for (int64_t k = 0; drawn && k < steps + (args.x0 ? 1 : 0); ++k, drawn.data += drawn.item * between)
        args.noise.push_back(drawn);
    run(chosen.load()->langevin, args);
}

void transition_weights(const Sizes& sizes, int threads, View x0, View shift0, View xt, View sigma2, View tau,
                        View weights) {
    const Shape shape = shape_of(sizes);
    run(chosen.load()->transition_weights, TransitionArguments{shape,
                                                               threads_for(shape, threads),
                                                               array(x0),
                                                               array(shift0),
                                                               array(xt),
                                                               array(sigma2),
                                                               array(tau),
                                                               {},
                                                               0,
                                                               array(weights)});
}

void transition_average(const Sizes& sizes, int threads, int64_t values_count, View x0, View shift0, View xt,
                        View sigma2, View tau, View values, View average) {
    const Shape shape = shape_of(sizes);
    run(chosen.load()->transition_average,
        TransitionArguments{shape, threads_for(shape, threads, values_count + 10), array(x0), array(shift0), array(xt),
                            array(sigma2), array(tau), array(values), values_count, array(average)});
}

}  // namespace

PYBIND11_MODULE(_kernels, module) {
    module.doc() = "Compiled kernels of the cpu backend; use them through fluxkernels.";
    reader = new Reader;
    module.def(
        "targets",
        [] {
            std::vector<std::string> names;
            for (const Kernels* kernels : supported()) names.push_back(kernels->name);
            return names;
        },
        "Instruction sets that this machine runs, best first.");
    module.def("target", [] { return std::string(chosen.load()->name); }, "The instruction set in use.");
    module.def("use", &use, "Use an instruction set by name.");
    module.def(
        "thread_source", [] { return std::string(thread_source()); }, "Source of the threads that the kernels run on.");
    module.def("is_finite", &is_finite);
#define FLUX_DEFINE(kernel, Arguments) module.def(#kernel, &kernel);
    FLUX_FOR_EACH_KERNEL(FLUX_DEFINE)
#undef FLUX_DEFINE
    module.def("normals", [](uint64_t seed, uint64_t stream, int64_t steps, int64_t first, int64_t count, int threads,
                             uintptr_t out) {
        py::gil_scoped_release release;
        constexpr int64_t CHUNK = 1 << 14;
        const int64_t chunks = (count + CHUNK - 1) / CHUNK;
        parallel_for(steps * chunks, threads, [&](int64_t task) {
            const int64_t step = task / chunks, done = task % chunks * CHUNK;
            chosen.load()->normals(seed, stream, step, first + done, std::min(CHUNK, count - done),
                                   reinterpret_cast<double*>(out) + step * count + done);
        });
    });
    module.def(
        "float_counts",
        [] {
            FloatDebug* debug = chosen.load()->float_debug;
            return std::make_pair(debug->seen.exchange(0), debug->rejected.exchange(0));
        },
        "Queries computed in float32 since the last call, and how many of them were repeated in float64.");
    module.def(
        "float_estimates",
        [](uintptr_t out) { chosen.load()->float_debug->estimates = reinterpret_cast<double*>(out); },
        "For tests with one block of queries: write the estimated error of each query's logits, -1 for those "
        "rejected.");
    module.def(
        "coarse", [](bool on) { chosen.load()->float_debug->coarse = on; },
        "A fault for tests: round coordinates to bfloat16 in the instruction set in use.");
    module.def(
        "rates",
        [](int threads, bool floats) {
            py::gil_scoped_release release;
            return chosen.load()->rates(threads, floats);
        },
        "(exponentials, multiply-adds) of floats or doubles per second on this machine with that number of threads.");
}
