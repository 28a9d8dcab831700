// Which ISA level runs: the best one that this processor has, or the one named by MOELORA_CPU_ISA.
// Compiled with baseline flags only: nothing here may need more than any processor has.

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu/kernels.h"

namespace moelora {

#define MOELORA_DECLARE(level)     \
  namespace level {                \
  extern const Kernels kTables[4]; \
  }
#ifdef MOELORA_X86_LEVELS
MOELORA_DECLARE(avx512_bf16)
MOELORA_DECLARE(avx512)
MOELORA_DECLARE(avx2)
#endif
MOELORA_DECLARE(portable)

namespace {

struct Level {
  const char* name;
  const Kernels* tables;
  bool (*runs_here)();
};

#ifdef MOELORA_X86_LEVELS
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first.
const Level kLevels[] = {
#ifdef MOELORA_X86_LEVELS
    {"avx512_bf16", avx512_bf16::kTables, has_avx512_bf16},
    {"avx512", avx512::kTables, has_avx512},
    {"avx2", avx2::kTables, has_avx2},
#endif
    {"portable", portable::kTables, [] { return true; }},
};

const Level& choose() {
  const char* wanted = std::getenv("MOELORA_CPU_ISA");
  if (wanted && *wanted) {
    for (const Level& level : kLevels)
      if (!std::strcmp(level.name, wanted) && level.runs_here()) return level;
    std::fprintf(stderr,
                 "moelora_ops: MOELORA_CPU_ISA=%s is not one of %s, or this processor lacks it; "
                 "taking the best level instead\n",
                 wanted, isa_levels_built());
  }
  for (const Level& level : kLevels)
    if (level.runs_here()) return level;
  std::abort();  // portable always runs
}

const Level& current() {
  static const Level& level = choose();
  return level;
}

}  // namespace

const Kernels& kernels(DType dtype) { return current().tables[static_cast<int>(dtype)]; }
const char* isa_level() { return current().name; }
const char* cpu_vendor() {
#ifdef MOELORA_X86_LEVELS
  if (__builtin_cpu_is("amd")) return "amd";
  if (__builtin_cpu_is("intel")) return "intel";
#endif
  return "other";
}
const char* isa_levels_built() {
#ifdef MOELORA_X86_LEVELS
  return "avx512_bf16,avx512,avx2,portable";
#else
  return "portable";
#endif
}

}  // namespace moelora
