// The four primitives on plain memory: packing, threads and sums of partial gradients around the kernels.
// The caller fills in everything of a struct but packed_a, packed_b and dgate_rows, which live only during the call.
#pragma once
#include "kernels.h"

namespace ilora {

const Kernels& best_kernels(Element);  // of the best instruction set that the processor has and ILORA_ISA allows

void shrink_x(const Kernels&, ShrinkX, const Factor& A);
void expand_xa(const Kernels&, ExpandXa, const Factor& Bt);
void backward_dy(const Kernels&, BackwardDy, const Factor& Bt, const Factor& dBt, void* dgate);  // dgate: C [N, E]
void backward_x(const Kernels&, BackwardX, const Factor& A, const Factor& dA);

}  // namespace ilora
