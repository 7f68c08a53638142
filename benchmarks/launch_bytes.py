"""The bytes that a launch moves, counted from its grid, and the fewest that a layer must move."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def size(tensor: Tensor | None) -> int:
    """Bytes of a tensor."""
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def tensors(launch: Any) -> dict[str, Tensor]:
    """The tensors among a launch's arguments, by name; for a tensor descriptor, the tensor that it describes."""
    bases = {name: getattr(value, "base", value) for name, value in launch.args.items()}
    return {name: value for name, value in bases.items() if isinstance(value, Tensor)}


def moved(launch: Any) -> int:
    """Bytes that all programs of the grid read and write, including what they read again from L2."""
    name, args = launch.kernel.fn.__name__, launch.args

    def blocks(size: str, block: str) -> int:
        return -(-args[size] // args[block])

    times: dict[str, float] = {}
    if name == "shrink":
        times = {"a_ptr": launch.grid[0], "gate_ptr": args["M"] / args["N"]}
    elif name == "grad_weights":
        times = {"dxa_ptr": blocks("D_IN", "BLOCK_N"), "h_ptr": blocks("D_OUT", "BLOCK_N")}
    elif name == "grad_dy":
        times = {"dy_ptr": 2, "h_ptr": blocks("D", "DOWN_N"), "b_ptr": blocks("M", "ALONG_M")}
        times["gate_ptr"] = args["M"] / args["N"]
    elif name == "expand":
        down, across = blocks("M", "BLOCK_M"), blocks("D", "BLOCK_N")
        times = {"h_ptr": across, "b_ptr": down, "bias_ptr": down}
    elif name == "fused_layer":  # each tile reads all of A and a gate row for each of its rows
        down, across = blocks("M", "BLOCK_M"), blocks("D", "BLOCK_N")
        times = {"x": across, "w": down, "b_ptr": down, "bias_ptr": down, "parts_ptr": across}
        times |= {"a": down * across, "gate_ptr": args["M"] * across / args["N"]}
    elif name == "decode":
        across, down = launch.grid
        times = {"x_ptr": across, "a_ptr": across * down, "b_ptr": down, "bias_ptr": down}
    elif name == "grouped_shrink":  # each block of rows reads its slot's matrix
        times = {"a_ptr": max(launch.grid[0] / args["X"], 1)}
    elif name == "grouped_expand":
        across = blocks("D", "BLOCK_N")
        times = {"h_ptr": across, "b_ptr": max(launch.grid[0] / across / args["X"], 1)}
    elif name == "grouped_grad_weights":
        times = {"h_ptr": blocks("D", "BLOCK_N")}
    elif name == "gate_ranks":  # a gate row for each row, however few there are
        times = {"gate_ptr": args["M"] / args["N"]}
    return sum(round(size(t) * times.get(key, 1)) for key, t in tensors(launch).items())


def least(case: Any, x: int, a: int) -> tuple[int, int]:
    """The fewest bytes that can move in forward and in backward: x, dy and x again, y and dx once, small tensors once.

    x, a: bytes of an element of the activations, and of A and B. In "fused" and "grouped" the frozen product is among
    the launches, which reads the weight, and x or dy once more; except that without dropout "fused" needs x just once.
    """
    X = max(case.slots, 1)
    gate = (case.M if case.token else 32) * 4 * 4
    factors, ranks = X * case.R * (case.d_in + case.d_out) * a, case.M * case.R * max(x, a)
    activations = case.M * (case.d_in + case.d_out) * x
    forward = activations + factors + gate + ranks + X * case.d_out * x
    backward = activations + case.M * case.d_in * x + 2 * factors + 2 * gate + ranks
    weight = X * case.d_in * case.d_out * x
    if case.strategy == "beta":
        return forward, backward
    if case.strategy == "decode":
        return forward + (weight if case.M <= 16 else 0), 0
    again = case.M * case.d_in * x if case.p or case.slots else 0
    return forward + weight + again, backward + weight + case.M * case.d_out * x
