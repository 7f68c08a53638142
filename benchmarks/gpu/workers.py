"""Jobs in processes of their own, side by side: kernels compile there into Triton's cache, and one that crashes takes
its process with it and not the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import TimeoutError as NotYet
from multiprocessing import get_context
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def _start() -> None:
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # these processes are the threads
    torch.set_num_threads(1)


def _numbered(function: Callable[[Job], Result], numbered: tuple[int, Job]) -> tuple[int, Result]:
    return numbered[0], function(numbered[1])


def done(
    function: Callable[[Job], Result], jobs: Sequence[Job], processes: int, left: Callable[[], float]
) -> Iterator[tuple[int, Result]]:
    """(index of the job, its result) as they come, until `left()` seconds are over; the others are given up.

    processes = 0: one after another in this process.
    """
    if processes == 0 or not jobs:
        for index, job in enumerate(jobs):
            if left() <= 0:
                return
            yield index, function(job)
        return
    with get_context("spawn").Pool(min(processes, len(jobs)), _start) as pool:  # leaving it ends the processes
        results = pool.imap_unordered(partial(_numbered, function), list(enumerate(jobs)))
        for _ in jobs:
            end = time.monotonic() + left()
            try:
                yield results.next(timeout=max(end - time.monotonic(), 0.01))
            except NotYet:
                return
