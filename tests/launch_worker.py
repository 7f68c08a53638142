"""One rank of four, started by ranks.py: runs examples/distributed/train.py as each line of FOLDER/plan says, one after
another: the number of processes, then the arguments.

Rank 0 prints into the log of all; what the others print goes to FOLDER/quiet1 and so on.
"""

import os
from pathlib import Path

import train
from ranks import write_results


def main(folder):
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    if rank:
        quiet = os.open(Path(folder) / f"quiet{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    os.chdir(folder)
    for i, (world, *arguments) in enumerate(map(str.split, Path("plan").read_text().splitlines())):
        os.environ |= {"WORLD_SIZE": world, "MASTER_PORT": str(port + i)}  # a port each: the last store may still close
        if rank < int(world):
            print(f"run {i}", flush=True)
            train.main(arguments)
    if rank == 0:
        write_results({}, folder)
