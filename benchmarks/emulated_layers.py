#!/usr/bin/env python3
"""Runs a layer's kernels in the PTX emulator and compares forward and backward with the definition in float64.

    python benchmarks/emulated_layers.py [--plans beta,fused,primitives,decode,grouped] [--dtypes bf16,fp16,mixed,fp32]
        [--gates runs,segments,rows] [--dropouts 0,0.1] [--ranks 8,16,32,64] [--shape M,d_in,d_out]

No GPU is needed. The launches are the package's own, compiled for sm_90 by the Triton that is installed. For another
Triton, `pip install --target DIR triton==3.6.0`, and set PYTHONPATH=DIR. Exit status 1 on a wrong result, an access to
shared memory that nothing puts in order, or an instruction that the emulator does not know.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import arguments
import numpy as np
import torch
from emulator import Descriptor, Memory, emulate, parse
from emulator.formats import Array
from launch_cases import DTYPES, KIB, kernels
from launch_compile import compiled, job
from torch import Tensor

import ilora
from ilora.grouped.reference import grouped_linear

SCALING, SEED, EXPERTS = 2.0, 123456789012, 4
SPANS = {1: 32, 2: 64, 3: 128}  # bytes of a swizzled row, by Triton's number for it
PLANS = ("beta", "fused", "primitives", "decode", "grouped")
GATES = ("runs", "segments", "rows")  # instances of equal length, of any, of one row
LIMITS = {"bf16": 0.06, "fp16": 0.01, "mixed": 1e-3, "fp32": 1e-4}  # the worst error, in root mean squares
ROUNDED = ("y", "dx")  # in the dtype of the activations


class Layer(NamedTuple):
    """Random inputs, and the results in float64 by name. With instances it is one of rows sorted by slot: weight, bias,
    A and B have a first dimension for the slots, and segments says where these begin."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    A: Tensor
    B: Tensor
    gate: Tensor
    segments: Tensor | None
    seed: Tensor | None
    dy: Tensor
    instances: Tensor | None
    expected: dict[str, Tensor]


def make_layer(grouped: bool, dtype: str, gates: str, p: float, M: int, d_in: int, d_out: int, R: int) -> Layer:
    torch.manual_seed(0)
    wide, narrow = DTYPES[dtype]
    N = {"runs": 4, "segments": 6, "rows": M}[gates]
    M -= 0 if gates == "segments" else M % N
    segments: Any = None
    instances: Any = None
    if grouped or gates == "segments":  # some of them empty
        segments = torch.tensor([0, 0, M // 19, M // 19, M // 19 + 1, M, M], dtype=torch.int32)
    if grouped:
        instances = torch.randint(N, (M,), dtype=torch.int32)
    X = (6,) if grouped else ()
    x, dy, bias = (torch.randn(*shape).to(wide) for shape in ((M, d_in), (M, d_out), (*X, d_out)))
    weight, A = (torch.randn(*X, rows, d_in) / d_in**0.5 for rows in (d_out, R))
    B, gate = (torch.randn(*X, d_out, R) / 4).to(narrow), torch.rand(N, EXPERTS)
    weight, A = weight.to(wide), A.to(narrow)
    seed = torch.tensor([SEED]) if p else None
    leaves = [t.double().requires_grad_() for t in (x, A, B, gate)]
    x64, A64, B64, gate64 = leaves
    inputs = x64, weight.double(), bias.double(), A64, B64, gate64, SCALING
    if grouped:
        y = grouped_linear(*inputs, segments, instances, p, seed)
    else:
        y = ilora.reference.ilora_linear(*inputs, segments, p, seed)
    grads = torch.autograd.grad(y, leaves, dy.double())
    expected = dict(zip(("y", "dx", "dA", "dB", "dgate"), (y.detach(), *grads), strict=True))
    return Layer(x, weight, bias, A, B, gate, segments, seed, dy, instances, expected)


def layer_plans(name: str, this: Layer, p: float, sms: int) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """Plans in order, each with the results that it completes; ValueError where the package refuses.

    A plan reads results of those before, so the next is made when the one before has run.
    """
    package = kernels()
    device, made = package.device.Device(sms, 227 * KIB, early=True, tma=True), package.plans
    scaling = SCALING / (1 - p)
    gating, dropping = (this.gate, this.segments), (this.seed, scaling, p)
    if name == "primitives":
        plan = made.shrink_x(device, this.x, this.A, this.seed, p)
        yield plan, {}
        (xa,) = plan.results
        plan = made.expand_xa(device, this.x, xa, this.bias, this.B, *gating, scaling)
        yield plan, {"y": plan.results[0]}
        plan = made.backward_dy(device, this.dy, xa, this.B, *gating, scaling)
        dxa, dB, dgate = plan.results
        yield plan, {"dB": dB, "dgate": dgate}
        plan = made.backward_x(device, this.x, dxa, this.A, this.seed, p, True)
        yield plan, dict(zip(("dx", "dA"), plan.results, strict=True))
        return
    if name == "grouped":
        yield from grouped_layer_plans(package.grouped_plans, device, this, p, scaling)
        return
    if name == "decode" and not package.decode.decodes(this.x, this.A, p):
        raise ValueError("decoding takes few rows, without dropout")
    strategy = "auto" if name == "decode" else name
    low = (this.A, this.B, *gating, *dropping)
    plan = made.forward(device, this.x, this.weight, this.bias, None, *low, strategy)
    y, (xa, h) = plan.results
    yield plan, {"y": y}
    plan = made.backward(device, this.dy, this.x, xa, h, this.weight, *low, True, strategy)
    yield plan, dict(zip(("dx", "dA", "dB", "dgate"), plan.results, strict=True))


def grouped_layer_plans(
    made: Any, device: Any, this: Layer, p: float, scaling: float
) -> Iterator[tuple[Any, dict[str, Tensor]]]:
    """The four primitives, each frozen product before the one that adds onto it."""
    assert this.segments is not None
    assert this.instances is not None
    offsets, gating = this.segments, (this.segments, this.gate, this.instances, scaling)
    first, product, back = (
        made.shrink_x(device, this.x, this.A, offsets, this.seed, p),
        made.frozen(device, this.x, this.weight, offsets),
        made.frozen(device, this.dy, this.weight.mT, offsets),
    )
    for plan in (first, product, back):
        yield plan, {}
    (xa,), (base,), (dx,) = first.results, product.results, back.results
    plan = made.expand_xa(device, this.x, xa, this.bias, base, this.B, *gating, True)
    plan.has_product = True
    yield plan, {"y": base}
    plan = made.backward_dy(device, this.dy, xa, this.B, *gating)
    dxa, dB, scores = plan.results
    ordered, order = torch.sort(this.instances, stable=True)
    segments = torch.searchsorted(ordered, torch.arange(len(this.gate) + 1, dtype=torch.int32), out_int32=True)
    yield plan.returning(dxa, dB, scores, segments), {"dB": dB}
    scores.copy_(scores[order])
    plan = made.gate_sums(device, scores, segments, this.gate)
    yield plan, {"dgate": plan.results[0]}
    plan = made.backward_x(device, this.x, dxa, this.A, offsets, dx, this.seed, p, True)
    plan.has_product = True
    yield plan, {"dx": dx, "dA": plan.results[1]}


def memory_of(tensor: Tensor) -> Memory:
    storage = tensor.untyped_storage()
    data = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    return Memory(storage.data_ptr(), np.ctypeslib.as_array(data))


def matrix_of(tensor: Tensor) -> Array:
    """A matrix of 2-byte elements, as uint16."""
    memory = memory_of(tensor)
    flat = memory.bytes[tensor.data_ptr() - memory.address :].view(np.uint16)
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, [2 * stride for stride in tensor.stride()])


PROGRAMS: dict[Any, tuple[Any, Any]] = {}  # each specialisation is compiled once


def run_launch(launch: Any) -> Counter[str]:
    """Emulates a launch on its tensors; returns the hazards."""
    this = job(launch, "sm_90")
    if this not in PROGRAMS:
        kernel = compiled(this)
        PROGRAMS[this] = parse(kernel.asm["ptx"]), kernel.metadata
    program, facts = PROGRAMS[this]
    boxes = list(getattr(facts, "tensordesc_meta", None) or ())
    values, memory, descriptors = list[int](), dict[int, Memory](), dict[int, Descriptor]()
    for name, kind in this.signature:
        value = launch.args[name]
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            box, address = boxes.pop(0), 64 * (len(descriptors) + 1)  # stands for the descriptor's
            rows, columns = box["block_size"]
            descriptors[address] = Descriptor(matrix_of(value.base), rows, columns, SPANS[box["swizzle"]])
            values += [address, *value.shape, *value.strides]
        elif isinstance(value, Tensor):
            place = memory_of(value)
            memory[place.address] = place
            values.append(value.data_ptr())
        else:
            values.append(int(np.float32(value).view(np.uint32)) if isinstance(value, float) else value % 2**64)
    values += [0] * (len(program.parameters) - len(values))  # Triton's scratch memory: none
    return emulate(program, values, list(memory.values()), descriptors, facts.shared, (*launch.grid, 1, 1)[:3])


def run_plan(plan: Any, given: set[int]) -> Counter[str]:
    """All launches in order, after what they are to write has been filled with NaN. given: addresses of the inputs."""
    for launch in plan.launches:
        for value in launch.args.values():
            tensor = getattr(value, "base", value)
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                memory_of(tensor).bytes[:] = 0xFF
    return sum(map(run_launch, plan.launches), Counter[str]())


def check_layer(name: str, this: Layer, dtype: str, p: float, sms: int) -> tuple[str, list[str]]:
    """The errors of all results in one line, and what is wrong."""
    given = {t.untyped_storage().data_ptr() for t in this[:-1] if isinstance(t, Tensor)}
    errors, wrong = [], []
    for plan, results in layer_plans(name, this, p, sms):
        wrong += [f"HAZARD {what} ({count} times)" for what, count in run_plan(plan, given).items()]
        given |= {t.untyped_storage().data_ptr() for t in plan.results if t is not None}
        for result, value in results.items():
            expected, value = this.expected[result], value.double()
            if result in ROUNDED and not plan.has_product:  # the frozen product is cuBLAS's
                left, right = (this.x, this.weight.T) if result == "y" else (this.dy, this.weight)
                value = value + left.double() @ right.double()
            error = float((value - expected).abs().max() / expected.square().mean().sqrt())
            limit = LIMITS["bf16" if dtype == "mixed" and result in ROUNDED else dtype]
            errors.append(f"{result} {error:.1e}")
            wrong += [] if error <= limit else [f"WRONG {result}: {error:.1e}, allowed {limit}"]  # NaN is wrong too
    return ", ".join(errors), wrong


def check_all(cases: list[tuple[str, str, str, float, int]], shape: tuple[int, int, int], sms: int) -> int:
    """Prints a line for each (plan, dtype, gates, dropout, rank); returns how many have findings."""
    bad = 0
    for name, dtype, gates, p, R in cases:
        print(f"{name} {dtype} {gates} p={p:g} R={R}: ", end="", flush=True)
        start = time.perf_counter()
        try:
            errors, wrong = check_layer(name, make_layer(name == "grouped", dtype, gates, p, *shape, R), dtype, p, sms)
        except ValueError as refusal:
            print(f"refused: {refusal}")
            continue
        except NotImplementedError as unknown:
            errors, wrong = "", [f"NOT KNOWN TO THE EMULATOR: {unknown}"]
        print(f"{'WRONG' if wrong else 'fine'}: {errors} ({time.perf_counter() - start:.0f} s)")
        print("".join(f"  {line}\n" for line in wrong), end="", flush=True)
        bad += bool(wrong)
    print(f"{bad} layers with findings")
    return bad


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def names(text: str) -> list[str]:
        return text.split(",")

    add = parser.add_argument
    add("--plans", type=names, default=list(PLANS), help=f"of {','.join(PLANS)}")
    add("--dtypes", type=names, default=["bf16"], help=f"of {','.join(DTYPES)}")
    add("--gates", type=names, default=["segments", "rows"], help=f"of {','.join(GATES)}")
    add("--dropouts", type=arguments.probabilities, default=[0.0, 0.1])
    add("--ranks", type=arguments.counts, default=[8, 16, 32, 64])
    add("--shape", type=arguments.counts, default=[200, 272, 144], help="M,d_in,d_out (200,272,144)")
    add("--sms", type=arguments.count, default=7, help="multiprocessors that the launches are cut to (7)")
    options = parser.parse_args(argv)
    for option, known in (("plans", PLANS), ("dtypes", DTYPES), ("gates", GATES)):
        if unknown := set(getattr(options, option)) - set(known):
            parser.error(f"--{option}: {','.join(sorted(unknown))} is none of {','.join(known)}")
    if len(options.shape) != 3:
        parser.error("--shape: expected M,d_in,d_out")
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: kernels for the interpreter cannot be compiled; unset it")
    every = itertools.product(options.plans, options.dtypes, options.gates, options.dropouts, options.ranks)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:  # a fresh one: what was compiled before is not this code
        os.environ["TRITON_CACHE_DIR"] = cache
        return int(check_all(list(every), tuple(options.shape), options.sms) > 0)


if __name__ == "__main__":
    sys.exit(main())
