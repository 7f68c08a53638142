"""Jobs in processes of their own, side by side: kernels compile there into Triton's cache, and one that crashes takes
its process with it and not the report."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing import TimeoutError as NotYet
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")
DIED = "its process died, or did not come back"
HUNG = 20.0  # seconds after which a job that the time is over for is one that hangs, not one that has just begun
POLL = 1.0  # seconds between two looks at whether the processes live

_begun: Any = None  # of this process: for each job the process that has begun it, and when; shared by all
_since: Any = None


def _start(begun: Any, since: Any) -> None:
    global _begun, _since
    _begun, _since = begun, since
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # these processes are the threads
    torch.set_num_threads(1)


def _numbered(function: Callable[[Job], Result], numbered: tuple[int, Job]) -> tuple[int, Result]:
    index, job = numbered
    _begun[index], _since[index] = os.getpid(), time.monotonic()
    return index, function(job)


def leave(reason: str) -> None:
    """Ends a process of these whose device is lost, so that another takes its place; elsewhere does nothing."""
    if _begun is not None:
        print(f"a process ends: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


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
    """(index of the job, its result) as they come, until `left()` seconds are over; the others are given up, and what
    hangs is lost.

    lost: the result of a job whose process died of it, or that hangs. processes = 0: one after another in this process.
    """
    if processes == 0 or not jobs:
        for index, job in enumerate(jobs):
            if left() <= 0:
                return
            yield index, function(job)
        return
    context = get_context("spawn")
    begun, since = (context.Array(kind, len(jobs), lock=False) for kind in "qd")
    waiting = set(range(len(jobs)))
    with context.Pool(min(processes, len(jobs)), _start, (begun, since)) as pool:  # leaving it ends the processes
        results = pool.imap_unordered(partial(_numbered, function), list(enumerate(jobs)))
        end = time.monotonic() + left()
        while waiting:
            try:
                index, result = results.next(timeout=max(min(end - time.monotonic(), POLL), 0.01))
            except NotYet:
                for index in [i for i in waiting if begun[i] and not _lives(begun[i])]:
                    waiting.remove(index)
                    yield index, lost(jobs[index])
                if (now := time.monotonic()) >= end:
                    for index in sorted(i for i in waiting if begun[i] and now - since[i] > HUNG):
                        yield index, lost(jobs[index])
                    return
                continue
            if index in waiting:  # else its process ended between its answer and this reading of it
                waiting.remove(index)
                yield index, result
                end = time.monotonic() + left()
