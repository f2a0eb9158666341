// Averages under a kernel in many dimensions for arguments in float32; see kernel_average.h.
//
// Included inside of a target's namespace.

static void kernel_average_floats(const AverageArguments& args) {
    if (args.is_plain()) return kde_floats(plain_of(args));
    kernel_average_with<Rows>(args);
}

static void kernel_average_backward_floats(const AverageBackwardArguments& args) {
    if (args.is_plain()) return kde_backward_floats(plain_of(args));
    kernel_average_backward_with<Rows>(args);
}
