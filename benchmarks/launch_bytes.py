"""Bytes that a launch moves, counted from its grid, and the least that a layer must move."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def size(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def tensors(launch: Any) -> dict[str, Tensor]:
    bases = {name: getattr(value, "base", value) for name, value in launch.args.items()}  # a descriptor's is its tensor
    return {name: value for name, value in bases.items() if isinstance(value, Tensor)}


def moved(launch: Any) -> int:
    """Bytes the grid asks for: every program's reads and writes, re-reads of small operands (from L2) included."""
    name, args = launch.kernel.fn.__name__, launch.args
    times: dict[str, float] = {}
    if name == "shrink":
        times = {"w_ptr": launch.grid[0]}
    elif name == "outer":
        times = {"h_ptr": launch.grid[0]}
    elif name == "pair":
        times = {"x_ptr": 2, "h_ptr": -(-args["D"] // args["DOWN_N"]), "w_ptr": -(-args["M"] // args["ALONG_M"])}
    elif name == "expand":
        columns = -(-args["D"] // args["BLOCK_N"])
        times = {"h_ptr": columns, "w_ptr": launch.grid[0] // columns, "bias_ptr": launch.grid[0] // columns}
    elif name == "outers":
        times = {"dxa_ptr": -(-args["D_IN"] // args["BLOCK_N"]), "h_ptr": -(-args["D_OUT"] // args["BLOCK_N"])}
    elif name in ("gemm", "whole"):
        down, across = -(-args["M"] // args["BLOCK_M"]), -(-args["D"] // args["BLOCK_N"])
        times = {"x": across, "w": down, "h_ptr": across, "low_ptr": down, "bias_ptr": down}
        if name == "whole":  # all of A and a row of the gate for each tile's row; h is written, once
            times |= {"a": down * across, "gate_ptr": args["M"] * across / args["N"], "h_ptr": 1, "parts_ptr": across}
    elif name == "decode":
        across, down = launch.grid
        times = {"x_ptr": across, "a_ptr": across * down, "b_ptr": down, "bias_ptr": down}
    elif name == "gate_ranks":  # a row of the gate for each row, however few there are
        times = {"gate_ptr": args["M"] / args["N"]}
    return sum(round(size(t) * times.get(key, 1)) for key, t in tensors(launch).items())


def least(case: Any, x: int, a: int) -> tuple[int, int]:
    """Bytes that must move, forward and backward: x, dy and x again; y and dx once; the small tensors once. x, a: bytes
    of an element of the activations, and of A and B.

    By strategy "gemm" the frozen product is among the launches, and with it the weight and x, or dy, once more; but
    "whole" without dropout needs x just once in forward.
    """
    gate = (case.M if case.token else 32) * 4 * 4
    factors, ranks = case.R * (case.d_in + case.d_out) * a, case.M * case.R * max(x, a)
    activations = case.M * (case.d_in + case.d_out) * x
    forward = activations + factors + gate + ranks + case.d_out * x
    backward = activations + case.M * case.d_in * x + 2 * factors + 2 * gate + ranks
    if case.strategy == "beta":
        return forward, backward
    if case.strategy == "decode":
        return forward + (case.d_in * case.d_out * x if case.M <= 16 else 0), 0
    weight = case.d_in * case.d_out * x
    again = 0 if case.strategy == "whole" and not case.p else case.M * case.d_in * x
    return forward + weight + again, backward + weight + case.M * case.d_out * x
