"""The CUDA sources without a GPU: nvcc takes them without a spill, and the kernels' own source runs on the CPU."""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import BF16, F16, F32, F64, ROUNDING
from torch.utils import cpp_extension

import ilora

ROOT = Path(__file__).resolve().parent.parent
TYPES = {F32: 0, BF16: 1, F16: 2}
STRICT = ["-std=c++17", "-O3", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage", "-Werror", "all-warnings"]
STRICT += ["-Xcompiler", "-Wall,-Wextra"]
EMULATED = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-clobbered", "-shared", "-fPIC"]

POINTERS = ("x", "weight", "bias", "base", "A", "B", "gate", "segments", "y", "xa")
STRIDES = ("x_row", "w_row", "base_row", "a_row", "b_row", "gate_row", "gate_col")


class Decode(ctypes.Structure):
    """struct Decode of csrc/cuda/decode.h."""

    _fields_ = (
        [(name, ctypes.c_int) for name in ("M", "d_in", "d_out", "R", "N", "E")]
        + [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_int64) for name in STRIDES]
        + [("scaling", ctypes.c_float)]
        + [(name, ctypes.c_int) for name in ("type", "adapter_type", "gate_type")]
        + [(name, ctypes.c_bool) for name in ("vec_w", "vec_a", "vec_b")]
    )


def compiled(arch, directory, cache):
    """ptxas's report on every kernel; the one kept in pytest's cache where compiler, flags and sources are the same."""
    command = ["nvcc", *STRICT, "-gencode", f"arch=compute_{arch},code=sm_{arch}", "-c", "csrc/cuda/decode.cu"]
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True).stdout
    sources = [path.read_bytes() for path in sorted((ROOT / "csrc" / "cuda").iterdir())]
    key = f"nvcc/{arch}-{hashlib.sha256(b'|'.join([' '.join(command).encode(), version, *sources])).hexdigest()}"
    report = cache and cache.get(key, None)
    if not report:
        done = subprocess.run([*command, "-o", f"{directory}/{arch}.o"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        report = done.stderr
        assert "warning" not in report.lower()
        if cache:
            cache.set(key, report)
    return report


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
def test_nvcc_compiles_the_kernels_without_a_warning_or_a_spill(tmp_path, pytestconfig):
    cache = getattr(pytestconfig, "cache", None)  # none under -p no:cacheprovider
    with ThreadPoolExecutor(min(3, os.cpu_count() or 1)) as pool:
        reports = list(pool.map(lambda arch: compiled(arch, tmp_path, cache), ("80", "90a", "100")))
    for report in reports:
        used = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        assert len(used) == 20  # 5 pairs of types × with W or without × up to 8 rows or 16
        assert all(numbers == ("0", "0", "0") for numbers in used)


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on the PATH")
def test_the_ops_compile_against_the_stable_abi_of_the_oldest_torch():
    """Its headers declare the CUDA stream without CUDA, so a torch for CPUs can say what a GPU's would."""
    headers = [flag for path in cpp_extension.include_paths() for flag in ("-isystem", path)]
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command = ["g++", "-fsyntax-only", *flags, *headers, "csrc/cuda/ops_cuda.cpp"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not on the PATH")
    library = tmp_path_factory.mktemp("emulated") / "decode.so"
    done = subprocess.run(
        [compiler, *EMULATED, "-o", str(library), "tests/cuda/decode.cpp"], cwd=ROOT, capture_output=True, text=True
    )
    if "_Float16" in done.stderr:
        pytest.skip("this g++ has no _Float16")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    return ctypes.CDLL(str(library))


def problem(M, d_in, d_out, R, E=1, N=1, dtype=F32, adapter=None, lengths=None, gate=F32, pad=0, **absent):
    """The tensors of one call; pad: a gap behind each row of x and W, which may break 16-byte alignment."""
    rng = torch.Generator().manual_seed(M * d_in + R)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng, dtype=F64).to(dtype)

    N = N if lengths is None else len(lengths)
    t = {
        "x": draw(M, d_in + pad)[:, :d_in],
        "weight": draw(d_out, d_in + pad)[:, :d_in] / d_in**0.5,
        "bias": draw(d_out),
        "base": draw(M, d_out + pad)[:, :d_out],
        "A": draw(R, d_in, dtype=adapter or dtype) / d_in**0.5,
        "B": draw(d_out, R, dtype=adapter or dtype) / 4,
        "gate": torch.rand(N, E, generator=rng).to(gate),
        "segments": None if lengths is None else torch.tensor((0, *lengths)).cumsum(0).to(torch.int32),
    }
    return t | {name: None for name, gone in absent.items() if gone}


def decode(library, t, cluster, scaling=2.0):
    """(y, xa) by the kernels' source on the CPU, each output bounded by canaries."""
    x, A, B, gate = t["x"], t["A"], t["B"], t["gate"]
    (M, d_in), (R, d_out), (N, E) = x.shape, (A.shape[0], B.shape[0]), gate.shape
    outputs = torch.full((M * d_out + 2,), 7.0, dtype=x.dtype), torch.full((M * R + 2,), 7.0, dtype=A.dtype)
    size, wide = x.element_size(), {"x": x, "w": t["weight"], "a": A, "b": B}
    vec = {k: v is not None and v.data_ptr() % 16 == v.stride(0) * v.element_size() % 16 == 0 for k, v in wide.items()}
    row = {k: 0 if v is None else v.stride(0) for k, v in {**wide, "base": t["base"]}.items()}
    library.clear_buffers()
    for tensor in t.values():
        if tensor is not None:
            span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            library.add_buffer(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(span * tensor.element_size()))
    starts = [None if t[name] is None else t[name].data_ptr() for name in POINTERS[:8]]
    starts += [outputs[0].data_ptr() + size, outputs[1].data_ptr() + A.element_size()]
    strides = (row["x"], row["w"], row["base"], row["a"], row["b"], *gate.stride())
    kinds = (TYPES[x.dtype], TYPES[A.dtype], TYPES[gate.dtype])
    flags = (vec["x"] and vec["w"], vec["x"] and vec["a"], vec["b"])
    library.decode(
        ctypes.byref(Decode(M, d_in, d_out, R, N, E, *starts, *strides, scaling, *kinds, *flags)), ctypes.c_int(cluster)
    )
    for out in outputs:
        assert out[0] == out[-1] == 7.0
    return outputs[0][1:-1].view(M, d_out), outputs[1][1:-1].view(M, R)


def exact(t):
    wide = {k: v if v is None or k == "segments" else v.to(F64) for k, v in t.items()}
    weight = torch.zeros(len(t["B"]), t["x"].shape[1], dtype=F64) if wide["weight"] is None else wide["weight"]
    y = ilora.reference.ilora_linear(
        wide["x"], weight, wide["bias"], wide["A"], wide["B"], wide["gate"], 2.0, wide["segments"]
    )
    return y if wide["base"] is None else y + wide["base"], wide["x"] @ wide["A"].T


PROBLEMS = {
    "one row": partial(problem, M=1, d_in=1024, d_out=48, R=16, E=4, dtype=BF16),
    "eight rows": partial(problem, M=8, d_in=256, d_out=16, R=16, E=4, N=2, dtype=F16),
    "nine rows": partial(problem, M=9, d_in=600, d_out=40, R=24, E=3, N=9, dtype=BF16),
    "sixteen rows, float32": partial(problem, M=16, d_in=264, d_out=33, R=8, E=2, N=4),
    "one row, float32": partial(problem, M=1, d_in=520, d_out=130, R=1),
    "float32 adapter": partial(
        problem, M=5, d_in=320, d_out=20, R=40, E=4, dtype=BF16, adapter=F32, lengths=(0, 3, 0, 2)
    ),
    "float32 adapter beside float16": partial(
        problem, M=12, d_in=130, d_out=50, R=128, dtype=F16, adapter=F32, gate=F16
    ),
    "odd everything": partial(problem, M=7, d_in=131, d_out=97, R=5, E=5, dtype=F16, lengths=(7, 0)),
    "a gap behind rows": partial(problem, M=3, d_in=96, d_out=17, R=8, E=8, dtype=BF16, pad=5, N=3, gate=BF16),
    "features of one": partial(problem, M=2, d_in=1, d_out=1, R=2, E=2, dtype=BF16),
    "no weight": partial(problem, M=33, d_in=160, d_out=70, R=16, E=4, N=33, dtype=BF16, weight=True, bias=True),
    "no weight, a few rows": partial(problem, M=4, d_in=100, d_out=300, R=64, E=4, weight=True, bias=True, base=True),
    "no weight, 64 rows": partial(
        problem, M=64, d_in=77, d_out=31, R=48, E=4, dtype=F16, adapter=F32, lengths=(10, 0, 50, 4), weight=True
    ),
}


@pytest.mark.parametrize("cluster", [1, 8])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_kernels_source_on_the_cpu(emulated, name, cluster):
    t = PROBLEMS[name]()
    outputs, again = decode(emulated, t, cluster), decode(emulated, t, cluster)
    for got, repeated, want in zip(outputs, again, exact(t), strict=True):
        assert torch.equal(got, repeated)
        error = (got.double() - want).abs().max().item()
        assert error <= ROUNDING[got.dtype] * want.abs().max().item() + ROUNDING[F32]
