"""One rank of four, started by ranks.py: runs examples/distributed/train.py with the arguments in FOLDER/arguments.

Rank 0 prints into the log of all; what the others print goes to FOLDER/quiet1 and so on.
"""

import os
from pathlib import Path

import train
from ranks import write_results


def main(folder):
    rank = int(os.environ["RANK"])
    if rank:
        quiet = os.open(Path(folder) / f"quiet{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
    os.chdir(folder)
    train.main(Path("arguments").read_text().split())
    if rank == 0:
        write_results({}, folder)
