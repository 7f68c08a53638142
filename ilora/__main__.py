"""`python -m ilora [report | check | bench]`: needs nothing that is not installed with ilora."""

from __future__ import annotations

import argparse
import sys

from ilora import diagnostics


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ilora", description="About ilora on this machine.")
    add = parser.add_argument
    add(
        "job",
        nargs="?",
        default="report",
        choices=("report", "check", "bench"),
        help="report: versions, devices, backends and why not (default); check: test every backend that works here, in "
        "under a minute; bench: a short benchmark",
    )
    job = parser.parse_args(argv).job
    if job == "report":
        print(diagnostics.report())
    if job == "bench":
        for line in diagnostics.bench():
            print(line, flush=True)
    right = True
    if job == "check":
        for line, well in diagnostics.check():
            print(line, flush=True)
            right &= well
        print(
            "everything that works here is right"
            if right
            else "something is WRONG: please report it with `python -m ilora`"
        )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
