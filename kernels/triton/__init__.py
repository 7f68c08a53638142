"""The Triton backend: the four primitives of the operation, and `forward` and `backward` in as few launches as we know.

    shrink_x      xa = x̃ Aᵀ,  x̃ = x ⊙ keep                              shrink, sums
    expand_xa     y = x Wᵀ + bias + h Bᵀ,  h = γ ⊙ xa                     gate_ranks, expand, cuBLAS
    backward_dy   dh = dy B,  dB = dyᵀ h,  dxa = γ ⊙ dh,  dgate           gate_ranks, grad_dy, sums
    backward_x    dA = dxaᵀ x̃,  dx = dy W + keep ⊙ (dxa A)               grad_weights, sums, expand, cuBLAS

On the right are the kernels in order, one a file, and cuBLAS for the frozen product, which it adds to what `expand`
wrote. `forward` and `backward` join these launches where they can: forward keeps h for backward, and where programs
that take whole rows fill the device, `shrink` gates xa itself, and `grad_dy` dh; else `gate_ranks` does. For small
layers one kernel, fused_layer.py, computes the frozen product and the update together (see strategy.py), and so does
decode.py for a few rows.
plans.py lists the launches of each call, replay.py keeps the lists and runs them. grouped.py has the four primitives
for rows sorted by slot, from kernels of their own. Nothing here imports from ilora.
"""

from .primitives import KEPT, backward, backward_dy, backward_x, expand_xa, forward, shrink_x

__all__ = ["KEPT", "backward", "backward_dy", "backward_x", "expand_xa", "forward", "shrink_x"]
