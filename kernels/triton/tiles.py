"""The matrix product every kernel accumulates with."""

import triton
import triton.language as tl


@triton.jit
def accumulate(wide, narrow, acc, PIECES: tl.constexpr, PRECISION: tl.constexpr):
    """acc + wide @ narrow in float32, on the tensor cores of wide's dtype.

    wide [a, k] is a tile of an activation, narrow [k, b] of a rank-sized matrix. A float32 narrow beside a bfloat16
    wide is fed as PIECES = 3 bfloat16 summands (8 bits each, 24 in all): exact products, hence float32's accuracy,
    while the big tile stays 16 bits wide.
    """
    for _ in tl.static_range(PIECES):
        piece = narrow.to(wide.dtype)
        acc = tl.dot(wide, piece, acc, input_precision=PRECISION)
        if PIECES > 1:
            narrow = narrow - piece.to(tl.float32)
    return acc
