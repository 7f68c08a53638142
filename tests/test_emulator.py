"""The PTX emulator computes as a GPU does, and notices what nothing puts in order. It runs a layer's real kernels."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import Memory, emulate, parse

ROOT = Path(__file__).resolve().parent.parent
HEAD = """.visible .entry kernel(
    .param .u64 .ptr .global kernel_param_0,
    .param .u32 kernel_param_1
) .reqntid 64 {
    .reg .b32 %r<9>;
    ld.param.b64 %rd1, [kernel_param_0];
    ld.param.b32 %r1, [kernel_param_1];
    mov.u32 %r2, %tid.x;
    mul.wide.s32 %rd2, %r2, 4;
    add.s64 %rd3, %rd1, %rd2;
    shl.b32 %r3, %r2, 2;
    mov.b32 %r4, global_smem;
    add.s32 %r5, %r4, %r3;
    xor.b32 %r6, %r3, 128;
    add.s32 %r7, %r4, %r6;  // of the other warp
"""
TAIL = """
    ret;
$L__func_end0:
}
"""


def run(body, number=0):
    """(the 64 words that the kernel leaves, the kinds of hazards). The words are 0, 1, 2, … before."""
    words = np.arange(64, dtype=np.uint32)
    memory = Memory(2**20, words.view(np.uint8))
    hazards = emulate(parse(HEAD + body + TAIL), [2**20, number], [memory], {}, 256, (1, 1, 1))
    return words, {hazard.split(" in kernel")[0] for hazard in hazards}


EXCHANGE = """
    ld.global.b32 %r8, [%rd3];
    st.shared.b32 [%r5], %r8;
    bar.sync 0;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd3], %r8;
"""


def test_warps_exchange_words_across_a_barrier():
    words, hazards = run(EXCHANGE)
    assert words.tolist() == [*range(32, 64), *range(32)]
    assert hazards == set()
    _, hazards = run(EXCHANGE.replace("bar.sync 0;", ""))
    assert hazards == {"read without a barrier after the write of another warp"}
    _, hazards = run(f"{EXCHANGE} st.shared.b32 [%r5], %r8;")
    assert hazards == {"write without a barrier after the read of another warp"}


COPY = """
    cp.async.ca.shared.global [%r5], [%rd3], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    ld.shared.b32 %r8, [%r7];
    st.global.b32 [%rd3], %r8;
"""


def test_a_copy_arrives_when_it_is_waited_for():
    words, hazards = run(COPY)
    assert words[0] == 32
    assert hazards == set()
    words, _ = run(COPY.replace("wait_group 0", "wait_group 1"))
    assert set(words.tolist()) == {0xFFFFFFFF}
    _, hazards = run(COPY.replace("bar.sync 0;", ""))
    assert hazards == {"read without a barrier after the write of another warp"}


@pytest.mark.parametrize(("place", "kind"), [("%rd3 + 4", "outside the tensor"), ("%rd3 + 2", "not aligned")])
def test_addresses_that_cannot_be(place, kind):
    assert kind in run(f"ld.global.b32 %r8, [{place}];")[1]
    assert run("ld.shared.b32 %r8, [%r5 + 4];")[1] == {"outside shared memory"}


def test_a_loop_and_a_guard():
    loop = """
$L__again:
    add.s32 %r8, %r8, 3;
    add.s32 %r1, %r1, -1;
    setp.ne.s32 %p1, %r1, 0;
    @%p1 bra $L__again;
    setp.lt.u32 %p2, %r2, 2;
    @%p2 st.global.b32 [%rd3], %r8;
"""
    assert run("mov.b32 %r8, 0;" + loop, 5)[0][:4].tolist() == [15, 15, 2, 3]
    with pytest.raises(NotImplementedError, match="part at @%p2 bra"):
        run("mov.b32 %r8, 0;" + loop.replace("st.global.b32 [%rd3], %r8", "bra $L__again"), 5)
    with pytest.raises(NotImplementedError, match="sin.approx"):
        run("sin.approx.f32 %r8, %r2;")


def matrices(rows, columns):
    rng = np.random.default_rng(0)
    return rng.integers(-4, 5, (rows, columns)).astype(np.float32)


def bfloat16_pairs(matrix):
    """Two neighbours of a row in a word."""
    bits = (matrix.view(np.uint32) >> 16).reshape(len(matrix), -1, 2)
    return bits[..., 0] | bits[..., 1] << 16


def test_mma_multiplies_fragments():
    A, B = matrices(16, 16), matrices(16, 8)
    lane = np.arange(32)
    group, place = lane // 4, lane % 4
    left, right = bfloat16_pairs(A), bfloat16_pairs(np.ascontiguousarray(B.T))
    words = [left[group, place], left[group + 8, place], left[group, place + 4], left[group + 8, place + 4],
             right[group, place], right[group, place + 4]]  # fmt: skip
    memory = np.concatenate([np.tile(each, 2) for each in words]).astype(np.uint32)
    loads = "".join(f"ld.global.b32 %f{i}, [%rd3 + {256 * i}];" for i in range(6))
    stores = "".join(f"st.global.b32 [%rd3 + {256 * i}], %d{i};" for i in range(4))
    fragments = "{%d0, %d1, %d2, %d3}, {%f0, %f1, %f2, %f3}, {%f4, %f5}, {%r8, %r8, %r8, %r8}"
    body = f"{loads} mov.b32 %r8, 0; mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {fragments}; {stores}"
    emulate(parse(HEAD + body + TAIL), [2**20, 0], [Memory(2**20, memory.view(np.uint8))], {}, 0, (1, 1, 1))
    found = memory.view(np.float32).reshape(6, 2, 32)[:4, 1]  # of the second warp
    want = A @ B
    for i in range(4):
        np.testing.assert_array_equal(found[i], want[group + 8 * (i // 2), 2 * place + i % 2])


def test_kernels_of_a_layer_are_right():
    """In a process of its own: here the kernels may belong to the interpreter already."""
    pytest.importorskip("triton")
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    options = ["--plans=beta,fused", "--ranks=16", "--gates=segments", "--dropouts=0.1", "--shape=72,144,80", "--sms=4"]
    command = [sys.executable, str(ROOT / "benchmarks" / "emulated_layers.py"), *options]
    done = subprocess.run(command, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" fine: ") == 2
