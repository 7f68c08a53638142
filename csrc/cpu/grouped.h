// The four primitives for rows sorted by slot, on plain memory. A slot is a run of rows with an A and a B of its own.
// As in primitives.h, the caller leaves out packed_a, packed_b and dgate_rows.
#pragma once
#include "kernels.h"

namespace ilora {

struct Slots {
  int64_t count;
  const int32_t* offsets;  // [count + 1], rising from 0 to M: slot s has the rows [offsets[s], offsets[s + 1])
};

struct Factors {  // A or Bᵀ of every slot
  Factor first;
  int64_t stride;  // in bytes, from one slot's to the next's
  Factor of(int64_t slot) const {
    Factor f = first;
    f.data = static_cast<const char*>(f.data) + slot * stride;
    return f;
  }
};

void grouped_shrink_x(const Kernels&, ShrinkX, const Slots&, const Factors& A);
// bias_stride: in bytes, from one slot's bias to the next's.
void grouped_expand_xa(const Kernels&, ExpandXa, const Slots&, const Factors& Bt, int64_t bias_stride);
void grouped_backward_dy(const Kernels&, BackwardDy, const Slots&, const Factors& Bt, const Factors& dBt, void* dgate);
void grouped_backward_x(const Kernels&, BackwardX, const Slots&, const Factors& A, const Factors& dA);

}  // namespace ilora
