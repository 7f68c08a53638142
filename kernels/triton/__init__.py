"""The Triton backend of ilora: `forward` and `backward`, see update.py; and their halves, see halves.py.

x̃ = x ⊙ keep,  xa = x̃ Aᵀ,  h = γ ⊙ xa,  y = h Bᵀ + …          shrink → gate → expand → the frozen product on top
dh = dy B,  dxa = γ ⊙ dh,  dB = dyᵀ h,  dA = dxaᵀ x̃,  dx = keep ⊙ (dxa A) + …   pair → gate → outer → expand

Each job is written once: `shrink` reads a wide matrix and leaves a narrow one, `outer`
reads a wide matrix and leaves a weight gradient, `pair` does both to one wide matrix, which comes from memory once,
`expand` writes a wide matrix, `gate_ranks` is everything between.
Up to 64 rows without dropout take one launch instead, `decode`, which up to 16 rows holds the frozen product too.
Where strategy.py says so, `gemm` takes the place of `expand` and of the frozen product on top, or `whole` that of all
but `outer`: forward is one launch then, backward three (`whole`, `outers`, `sums`).
"""

from .halves import backward_dy, backward_x, expand_xa, shrink_x
from .update import backward, forward

__all__ = ["backward", "backward_dy", "backward_x", "expand_xa", "forward", "shrink_x"]
