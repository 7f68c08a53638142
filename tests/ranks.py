"""Runs the `main` of a worker in several processes that talk over gloo.

Importing takes longer than what the processes do. So this program, once started, reads WORKER FOLDER WORLD PORT from
each line of its input, imports the worker if it has not yet, and forks the processes.
"""

import functools
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch


def run_ranks(worker, folder, world):
    """What rank 0 wrote to results.pt; exit codes do not count, since gloo may abort a process that is done."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    server = started_server()
    try:
        print(worker.__name__, folder, world, port, sep="\t", file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], 400)[0]:
            raise TimeoutError(f"{worker.__name__} took over 400 s")
        if not server.stdout.readline():  # it could not import the worker
            started_server.cache_clear()
    except BaseException:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        started_server.cache_clear()
        raise
    log = folder / "log"
    assert (folder / "results.pt").exists(), log.read_text()[-6000:] if log.exists() else "the server of ranks.py ended"
    return torch.load(folder / "results.pt", weights_only=True)


@functools.cache
def started_server():
    """The process that forks ranks, for all workers of this test run. It ends when its input does."""
    root = Path(__file__).resolve().parents[1]
    env = {"PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
    return subprocess.Popen([sys.executable, __file__], env=os.environ | env, **pipes)


def write_results(results, folder):
    """Writes what `run_ranks` returns, whole or not at all."""
    torch.save(results, Path(folder) / "results.pt.part")
    os.replace(Path(folder) / "results.pt.part", Path(folder) / "results.pt")


def forked(worker, folder, rank):
    """Starts a process that runs the worker as this rank; its id. It ends at once after `main`, with status 0 or 1."""
    if process := os.fork():
        return process
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    status = 1
    try:
        worker.main(folder)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(name, folder, world, port):
    """Imports the worker, once, and runs its ranks in processes whose output goes to the folder's log."""
    log = os.open(Path(folder) / "log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    worker = importlib.import_module(name)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world}
    ranks = [forked(worker, folder, rank) for rank in range(int(world))]
    while ranks:  # a rank that failed leaves the others waiting for it
        process, status = os.wait()
        ranks.remove(process)
        if status and not (Path(folder) / "results.pt").exists():
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        run(*line.rstrip("\n").split("\t"))
        print("done", file=answers, flush=True)
