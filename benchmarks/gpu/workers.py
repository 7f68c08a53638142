"""Jobs in processes of their own, side by side: kernels compile there into Triton's cache, and one that crashes takes
its process with it and not the report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import TimeoutError as NotYet
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
DIED = "its process died"
POLL = 1.0  # seconds between two looks at whether the processes live

_begun: Any = None  # of this process: for each job the process that has begun it, shared by all


def _start(begun: Any) -> None:
    global _begun
    _begun = begun
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # these processes are the threads
    torch.set_num_threads(1)


def _numbered(function: Callable[[Job], Result], numbered: tuple[int, Job]) -> tuple[int, Result]:
    index, job = numbered
    _begun[index] = os.getpid()
    return index, function(job)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def done(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    processes: int,
    left: Callable[[], float],
    lost: Callable[[Job], Result],
) -> Iterator[tuple[int, Result]]:
    """(index of the job, its result) as they come, until `left()` seconds are over; the others are given up.

    lost: the result of a job whose process died of it. processes = 0: one after another in this process.
    """
    if processes == 0 or not jobs:
        for index, job in enumerate(jobs):
            if left() <= 0:
                return
            yield index, function(job)
        return
    context = get_context("spawn")
    begun, waiting = context.Array("q", len(jobs), lock=False), set(range(len(jobs)))
    with context.Pool(min(processes, len(jobs)), _start, (begun,)) as pool:  # leaving it ends the processes
        results = pool.imap_unordered(partial(_numbered, function), list(enumerate(jobs)))
        end = time.monotonic() + left()
        while waiting:
            try:
                index, result = results.next(timeout=max(min(end - time.monotonic(), POLL), 0.01))
            except NotYet:
                for index in [i for i in waiting if begun[i] and not _lives(begun[i])]:
                    waiting.remove(index)
                    yield index, lost(jobs[index])
                if time.monotonic() >= end:
                    return
                continue
            if index in waiting:  # else its process ended between its answer and this reading of it
                waiting.remove(index)
                yield index, result
                end = time.monotonic() + left()
