// The four passes over the rows, compiled once for each instruction set. The including file defines ILORA_ISA (a
// namespace), ILORA_BYTES (the size of a vector) and ILORA_TARGET (a function attribute), and ILORA_PAIRS if there are
// instructions for bfloat16.
// Include no standard header but the one of kernels.h: the linker might take an inline function of it that was compiled
// for AVX-512 for every instruction set. (What immintrin.h defines is always inlined.)
#include "kernels.h"

#if ILORA_BYTES == 64
#include <immintrin.h>
#endif

#define FN ILORA_TARGET inline __attribute__((always_inline))

namespace ilora::ILORA_ISA {
namespace {

#include "vectors.inl"
#include "products.inl"
#include "packing.inl"
#include "rows.inl"
#include "shrink_expand.inl"
#include "backward.inl"

}  // namespace

template <class T, class C, class D> static const Kernels table = {
    sizeof(C),         pack_for_dot<T, C, D>, pack_for_expand<T, C, D>, shrink_x<T, C, D>,  expand_xa<T, C, D>,
    backward_dy<T, C, D>, backward_x<T, C, D>,   add_partials<T, C, D>,    sum_gates<C>};

const Kernels& kernels(Element element) {
  switch (element) {
    case kFloat: return table<float, float, float>;
    case kBFloat16: return table<bf16, float, float>;
    case kBFloat16All: return table<bf16, float, PairsOr<float>>;
    default: return table<double, double, double>;
  }
}

}  // namespace ilora::ILORA_ISA
