"""Counting memory: what a call allocates at its peak, and what autograd keeps from forward to backward."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own notices would break up a table

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """The most memory that is allocated at once while the function runs, above what was allocated before it.

    On the CPU this counts what torch's allocator hands out, as torch's profiler records it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        allocated += event["args"]["Bytes"]
        peak = max(peak, allocated)
    return peak


def saved_bytes(call: Callable[[], Tensor], left_out: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps from the call to its backward: each storage once, without those left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    total = sum(kept.values())
    del y  # only now: while y lives, no kept storage is freed and its address cannot be used again
    return total
