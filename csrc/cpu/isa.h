// Which instruction sets this machine has, and which one kernels may use now.
#pragma once

#include <string>
#include <vector>

namespace lamina {

// One enumerator per row of isa.def; the values are the rows' positions, so that "at least" is a comparison.
enum class Isa : int {
#define ISA_ROW(name, flags, portable, predicate) name,
#include "cpu/isa.def"
#undef ISA_ROW
};

inline constexpr int kIsaCount = 0
#define ISA_ROW(name, flags, portable, predicate) +1
#include "cpu/isa.def"
#undef ISA_ROW
    ;

const char* isa_name(Isa isa);

// The instruction sets of this processor that the operating system also saves and restores, in rising order.
const std::vector<Isa>& available_isas();

// The highest one kernels may use: the highest available, or the one set by force_isa.
Isa active_isa();

// Makes `name` the active ISA for the whole process. Throws std::invalid_argument, naming the available ones, when
// it is unknown or this machine lacks it; nothing changes then.
void force_isa(const std::string& name);

}  // namespace lamina
