// Headers that kernels/all.h needs. A target includes them first, while the compiler still compiles for any machine: an
// inline function of the standard library must not be compiled with instructions that another machine lacks.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <limits>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "../arguments.h"
#include "../array.h"
#include "../memory.h"
#include "../parallel.h"
