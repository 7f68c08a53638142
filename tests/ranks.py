"""Starts a worker in several processes that talk over gloo on this machine."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

import ilora


def run_ranks(worker, folder, world):
    """What rank 0 wrote to results.pt; exit codes do not count, since gloo may abort a process that is done."""
    root = str(Path(ilora.__file__).parents[1])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    common |= {"PYTHONPATH": os.pathsep.join([root, *sys.path]), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = []
    try:
        for rank in range(world):
            env = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"log{rank}").open("wb") as log:
                command = [sys.executable, worker.__file__, str(folder)]
                ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
        for process in ranks:
            process.wait(timeout=400)
    finally:
        for process in ranks:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    logs = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("log*")))
    assert (folder / "results.pt").exists(), logs
    return torch.load(folder / "results.pt", weights_only=True)
