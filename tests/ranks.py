"""Runs the `main` of a worker in several processes that talk over gloo: python ranks.py WORKER FOLDER WORLD.

This program imports the worker once and forks the processes, because importing takes longer than what they do.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from pathlib import Path

import torch


def run_ranks(worker, folder, world):
    """What rank 0 wrote to results.pt; exit codes do not count, since gloo may abort a process that is done."""
    root = Path(__file__).resolve().parents[1]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": os.pathsep.join([str(root), *sys.path]), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, worker.__name__, str(folder), str(world)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env=os.environ | env, stdout=log, stderr=log, start_new_session=True)
        try:
            process.wait(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert (folder / "results.pt").exists(), (folder / "log").read_text()[-6000:]
    return torch.load(folder / "results.pt", weights_only=True)


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


def main(name, folder, world):
    torch.set_num_threads(1)
    worker = importlib.import_module(name)
    ranks = [forked(worker, folder, rank) for rank in range(int(world))]
    while ranks:  # a rank that failed leaves the others waiting for it
        process, status = os.wait()
        ranks.remove(process)
        if status and not (Path(folder) / "results.pt").exists():
            for rank in ranks:
                os.kill(rank, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
