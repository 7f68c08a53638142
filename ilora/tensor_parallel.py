"""The update of a layer whose frozen weight is split over processes (tensor parallel), split in the same way.

The weight is a DTensor that somebody else split: transformers' tp_plan or torch's parallelize_module. The base layer
communicates by itself; here is what the update sends.

Split by columns (each process computes some outputs): lora_A is replicated, lora_B split as the weight is. Forward
sends nothing; backward sums dxa [M, R] and dgate [N, E], so that every process has the same gradients.
Split by rows (each process has some inputs): lora_A is split as the weight is, lora_B replicated. Forward sums xa
[M, R], and every process adds the whole update to the whole output; backward sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .op import backends, reference
from .op.checks import check_dtypes, check_segments, check_tensors, rows
from .op.registration import dense


@dataclass(frozen=True)
class Split:
    """How a weight [d_out, d_in] is split: dimension 0 is by columns, 1 by rows; this process has from `start` on."""

    mesh: Any  # a torch.distributed DeviceMesh of one dimension
    dimension: int
    start: int

    @property
    def by_rows(self) -> bool:
        return self.dimension == 1

    def distribute(self, tensor: Tensor, dimension: int) -> nn.Parameter:
        """The parameter, split where its dimension is the weight's that is split, else replicated; as rank 0 has it."""
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        placement = Shard(dimension) if dimension == self.dimension else Replicate()
        return nn.Parameter(distribute_tensor(tensor.detach(), self.mesh, [placement]))


def split_of(base: nn.Module) -> Split | None:
    """How the base's weight is split over processes; None if it is whole. Raises ValueError for an unknown split."""
    weight: Any = getattr(base, "weight", None)
    if not hasattr(weight, "device_mesh") or not ("forward" in base.__dict__ or base._forward_hooks):
        return None  # FSDP2 splits weights too, but gathers them before each forward
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    placements = weight.placements
    if placements not in ((Shard(0),), (Shard(1),)) or not isinstance(base, nn.Linear):
        raise ValueError(
            f"the weight of this {type(base).__name__} is split over processes as {placements}: expected an nn.Linear "
            "split by columns (Shard(0)) or rows (Shard(1)) on a mesh of one dimension; name it in exclude_modules"
        )
    dimension = placements[0].dim
    _, offsets = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, placements)
    return Split(weight.device_mesh, dimension, offsets[dimension])


def refuse_trained_weight(name: str, base: nn.Module) -> None:
    """Raises RuntimeError where the split weight of the layer called `name` is trained. torch's
    DistributedDataParallel(..., device_mesh=) makes new parameters of all that are split, and forgets which are frozen.
    """
    if torch.is_grad_enabled() and cast(Tensor, base.weight).requires_grad:
        raise RuntimeError(
            f"{name}: its frozen weight is split over processes and requires a gradient, as DistributedDataParallel "
            "makes split weights do: for copies of a split model use fully_shard on the mesh's other dimension, or "
            "freeze the weight again (requires_grad_(False))"
        )


def add_update(
    split: Split,
    x: Tensor,
    base: Any,
    A: Any,
    B: Any,
    gate: Tensor,
    scaling: float,
    segments: Tensor | None,
    dropout_p: float,
    seed: Tensor | None,
    backend: str | None,
) -> Tensor:
    """base + ((dropout(x) Aᵀ) ⊙ γ) Bᵀ, where x, base and the results are what this process has of them.

    x: [..., d_in], or this process's columns of it if the weight is split by rows; base [..., d_out], or this process's
    columns of it if the weight is split by columns. A, B: DTensors [R, d_in], [d_out, R] (see `Split.distribute`).
    gate, segments, seed: as in `ilora_linear`, the same in every process, except that the seed of the first counts.
    Dropout's mask is that of one process.
    Raises ValueError if x or base is not the part that belongs to this process, and as `ilora_linear` does.
    """
    A, B = A.to_local(), B.to_local()
    for name, tensor, width in (("input", x, A.shape[1]), ("output", base, B.shape[0])):
        if hasattr(tensor, "device_mesh") or tensor.shape[-1] != width or x.shape[:-1] != base.shape[:-1]:
            raise ValueError(
                f"its {name} is {type(tensor).__name__} {list(tensor.shape)}, expected a local tensor [..., {width}] "
                "and as many rows of input and output: a layer that gathers or splits them by itself, as under "
                "sequence parallelism, cannot be adapted; name it in exclude_modules"
            )
    gate = check_tensors(x, None, None, base, A, B, gate, segments)
    check_segments(segments, rows(x))
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, A, B = x.to(dtype), A.to(dtype), B.to(dtype)
    check_dtypes(x, None, None, base, A, B)
    if dropout_p:
        seed = reference.as_seed(seed, x.device).clone()
        dist.broadcast(seed, group=split.mesh.get_group(), group_src=0)  # processes may have drawn different ones
    y: Tensor = _Update.apply(
        x.reshape(-1, x.shape[-1]), base.reshape(-1, base.shape[-1]), A, B, gate, dense(segments),
        scaling / (1.0 - dropout_p), dropout_p, seed, backend, split,
    )  # fmt: skip
    return y.reshape(base.shape)


class _Update(torch.autograd.Function):
    """Forward and backward of the four primitives, with sums over the processes between them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor, A: Tensor, B: Tensor, gate: Tensor, *settings: Any) -> Tensor:
        segments, scaling, dropout_p, seed, backend, split = settings
        x, base = _awaited(x), _awaited(base)
        primitives: Any = backends.select(backend, x.device.type, x.dtype)
        if dropout_p and split.by_rows:
            primitives = _FromColumn(split.start)
        xa = primitives.shrink_x(x, A, dropout_p, seed)
        if split.by_rows:
            dist.all_reduce(xa, group=split.mesh.get_group())
        ctx.save_for_backward(x, xa, A, B, gate, segments, seed)
        ctx.settings = (primitives, scaling, dropout_p, split)
        y: Tensor = primitives.expand_xa(x, xa, None, None, base, B, gate, segments, scaling)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, xa, A, B, gate, segments, seed = ctx.saved_tensors
        dy = _awaited(dy)
        primitives, scaling, dropout_p, split = ctx.settings
        dxa, dB, dgate = primitives.backward_dy(dy, xa, B, gate, segments, scaling)
        if not split.by_rows:
            group = split.mesh.get_group()
            dist.all_reduce(dxa, group=group)
            dist.all_reduce(dgate, group=group)
        dx, dA = primitives.backward_x(dxa, x, A, dropout_p, seed, [], ctx.needs_input_grad[0])
        return dx, dy, dA, dB, dgate, *[None] * 6


def _awaited(tensor: Any) -> Tensor:
    """The values of an AsyncCollectiveTensor, which is a sum over processes that has only been started. Call it where
    autograd does not record, because the values have no history."""
    return tensor.trigger_wait() if hasattr(tensor, "trigger_wait") else tensor


class _FromColumn:
    """The primitives with a dropout mask that starts at a later column; kernels start at the first."""

    expand_xa, backward_dy = staticmethod(reference.expand_xa), staticmethod(reference.backward_dy)

    def __init__(self, start: int) -> None:
        self.start = start

    def _mask(self, x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
        return reference.keep_mask(seed, x.shape[0], x.shape[1], dropout_p, self.start)

    def shrink_x(self, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
        return reference.shrink_x(torch.where(self._mask(x, dropout_p, seed), x, 0), A, 0.0, None)

    def backward_x(
        self, dxa: Tensor, x: Tensor, A: Tensor, dropout_p: float, seed: Tensor, products: list[Any], need_dx: bool
    ) -> tuple[Tensor | None, Tensor]:
        mask = self._mask(x, dropout_p, seed)
        dx, dA = reference.backward_x(dxa, torch.where(mask, x, 0), A, 0.0, None, products, need_dx)
        return None if dx is None else torch.where(mask, dx, 0), dA
