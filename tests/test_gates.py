"""Which instance a row belongs to, as the kernels look it up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ilora.op import backends

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if reason := backends.why_not("triton", DEVICE):
    pytest.skip(reason, allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from ilora.kernels.gates import instances, search_width  # noqa: E402


@triton.jit(do_not_specialize=["N", "run", "width"])  # as every kernel has it
def looked_up(segments_ptr, found_ptr, N, run, width, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(found_ptr + rows, instances(rows, segments_ptr, N, run, width))


def found(segments, M, N, run=1):
    rows = torch.empty(-(-M // 16) * 16, dtype=torch.int32, device=DEVICE)
    looked_up[(len(rows) // 16,)](segments, rows, N, run, search_width(N), BLOCK=16)
    return rows[:M].cpu()


@given(lengths=st.lists(st.integers(0, 3), min_size=1, max_size=300).filter(any))
def test_rows_find_the_last_instance_that_starts_at_or_before_them(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = found(ends.to(DEVICE), sum(lengths), len(lengths))
    assert torch.equal(rows, torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths)))


def test_thousands_of_instances():
    lengths = torch.randint(0, 3, (5000,), generator=torch.Generator().manual_seed(0))
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    rows = found(ends.to(DEVICE), int(ends[-1]), 5000)
    assert torch.equal(rows, torch.arange(5000, dtype=torch.int32).repeat_interleave(lengths))


@given(segments=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=2, max_size=60))
def test_whatever_the_segments_say_the_instance_is_one(segments):
    """They are not checked on a GPU."""
    N = len(segments) - 1
    rows = found(torch.tensor(segments, dtype=torch.int32, device=DEVICE), 40, N)
    assert rows.min() >= 0
    assert rows.max() < N


def test_equal_lengths_and_rows_beyond():
    assert found(None, 13, 3, run=4).tolist() == [0] * 4 + [1] * 4 + [2] * 5


@pytest.mark.parametrize(("n", "width"), [(1, 1), (2, 1), (16, 1), (17, 16), (256, 16), (257, 256)])
def test_the_search_starts_wide_enough(n, width):
    assert search_width(n) == width
