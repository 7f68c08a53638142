#!/usr/bin/env python3
"""Checks and times everything on the GPU that is here: `python benchmarks/gpu_report.py`.

The parts, in order: *correct* (every kernel 200 times on the same input, comparing bits; then all tests marked gpu),
*profile* (each kernel's time, bytes and share of what the device reaches), *layer*, *decode*, *model* (the benchmarks
of this folder), *sanitizer* (NVIDIA's memory checker, whose findings are advice). A part is made of jobs, each a
process of its own with a time limit, so a hang or a lost device costs one job. The report is written whole after every
job: its numbers to report.json, what the jobs print to report.md. A later call goes on where this one stopped and tries
again what failed; --only names the parts to run. After a failure in *correct* nothing is timed without --force.
By estimate no part takes more than 8 minutes, and three calls of 8.5 minutes, one after another, do everything.

Install the checkout first, as README.md says. `--device cpu` is a dry run on tiny tensors, whose figures mean nothing.
Exit status: 0; 1 if something was wrong or there was no time for it; 2 for arguments that cannot be.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import arguments
import torch
from machine import heading, machine
from report import gate_markdown, layer_markdown, load, write_json, write_text

import ilora

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("correct", "profile", "layer", "decode", "model", "sanitizer")
CHECKS = ("correct", "sanitizer")  # these run even after a failure
SAME = ("device", "torch", "triton", "git_commit", "git_changed")  # what all jobs of one report have in common
SHORTEST = 20.0  # seconds; no job starts with less time left
SQUARES = ("4096x4096,1024x1024", "2048x2048,8192x8192")  # a process for each pair
OTHERS = "5120x5120,4096x1024,4096x14336,14336x4096"  # the last three are Llama-3-8B's
OURS = "ilora[triton],ilora[ungated]"  # one over the other is what the gate costs
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


class Job(NamedTuple):
    """A command of one part. seconds: what it should take on an H100, by estimate. environment: variables to set."""

    name: str
    part: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = {}

    @property
    def limit(self) -> float:
        return 3.0 * self.seconds

    @property
    def writes_json(self) -> bool:
        return self.part not in CHECKS


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", metavar="PART", choices=PARTS, default=PARTS, help=f"some of {', '.join(PARTS)}")
    add("--out", type=Path, default=ROOT / "benchmarks/results", help="where its folder goes (benchmarks/results)")
    add("--minutes", type=arguments.number, default=8.5, help="to end after; jobs are cut to it (default 8.5)")
    add("--again", action="store_true", help="also run the jobs that are done already")
    add("--force", action="store_true", help="time even after a failure in correct")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is a dry run")
    cores = min(os.cpu_count() or 1, 8)
    add("--processes", type=arguments.count, default=cores, help="for the tests (default: cores, at most 8)")
    return parser.parse_args(argv)


def jobs(device: str, processes: int) -> list[Job]:
    """All jobs in the order they run: within a part the most important first."""
    fused = device == "cpu" or torch.cuda.get_device_capability()[0] >= 9
    strategies = ("beta", "fused") if fused else ("beta",)
    repeats = [*PYTEST, "tests/test_kernel_repeats.py"]
    if device == "cpu":
        timed = [*_dry_jobs(), *profile_jobs(strategies, widths="64")]
        tests = [*PYTEST, "--collect-only", "-qq", "tests/test_decode.py"]
    else:
        timed = [*profile_jobs(strategies), *layer_jobs(strategies), *decode_jobs(), *model_jobs()]
        tests = [*PYTEST, "-m", "gpu", "-n", str(processes), "--ignore=tests/test_kernel_repeats.py"]
    checker = ["compute-sanitizer", "--report-api-errors", "no", "--tool"]
    # torch's memory pool would hide writes beyond a tensor's end
    watched = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "ILORA_TEST_REPEATS": "2"}
    return [
        Job("repeats", "correct", repeats, 80),
        Job("tests", "correct", tests, 200),
        *sorted(timed, key=lambda job: PARTS.index(job.part)),
        Job("memcheck", "sanitizer", [*checker, "memcheck", *repeats, "-k", "small"], 80, watched),
        Job("racecheck", "sanitizer", [*checker, "racecheck", *repeats, "-k", "small"], 80, watched),
    ]


def profile_jobs(strategies: tuple[str, ...], widths: str = "1024,4096") -> Iterator[Job]:
    for each in strategies:
        command = _python("gpu_profile.py", "--strategy", each, "--widths", widths)
        yield Job(f"profile-{each}", "profile", command, 35)
        yield Job(f"profile-{each}-no-early-start", "profile", command, 35, {"ILORA_EARLY_START": "0"})


def layer_jobs(strategies: tuple[str, ...]) -> Iterator[Job]:
    """M = 4096 and R = 16 against all peers, then against the quick ones at other shapes; then each strategy for small
    layers; then other M and R against PEFT."""
    common = ("bench_moe_lora.py", "--full", "--dtypes", "bfloat16", "--seconds", "0.1")
    main = (*common, "--no-calls", "--ranks", "16", "--length", "512")
    quick = f"peft,eager,unsloth,axolotl,automodel,lorafusion,{OURS}"
    for number, shapes in enumerate(SQUARES, 1):
        yield Job(f"layer-{number}", "layer", _python(*main, "--shapes", shapes), 95)
    yield Job("layer-3", "layer", _python(*main, "--shapes", OTHERS, "--peers", quick), 70)
    for each in strategies:
        command = _python(*main, "--shapes", "1024x1024,2048x2048", "--peers", OURS)
        yield Job(f"layer-{each}", "layer", command, 30, {"ILORA_STRATEGY": each})
    for rank, lengths in (("16", "256,1024"), ("64", "512")):
        more = ("--ranks", rank, "--length", lengths, "--peers", f"peft,{OURS}", "--no-calls")
        shapes = "1024x1024,4096x4096,8192x8192,4096x1024,4096x14336"
        yield Job(f"layer-rank-{rank}", "layer", _python(*common, "--shapes", shapes, *more), 60)
    yield Job("calls", "layer", _python(*common, "--shapes", "64x64", "--length", "16", "--peers", "ilora[triton]"), 25)


def decode_jobs() -> Iterator[Job]:
    few = ("--ranks", "16", "--batch", "1,8,16,64", "--length", "1", "--seconds", "0.05")
    for shape in ("4096x4096", "1024x1024", "4096x14336", "14336x4096"):
        command = _python("bench_moe_lora.py", "--full", "--inference", "--shapes", shape, *few)
        yield Job(f"decode-{shape}", "decode", command, 30)


def model_jobs() -> Iterator[Job]:
    common = ("bench_model.py", "--dtype", "bfloat16", "--rank", "16", "--model")
    llama = (*common, "llama3-8b", "--batch", "1", "--length", "4096", "--rounds", "5", "--only", "steps")
    yield Job("model-llama3-8b-checkpointing", "model", _python(*llama, "--checkpointing"), 80)
    yield Job("model-llama3-8b", "model", _python(*llama), 80)
    yield Job("model-smollm2", "model", _python(*common, "smollm2", "--length", "512"), 60)


def _dry_jobs() -> list[Job]:
    """The same programs on tiny shapes, all peers but the compiled one."""
    tiny = ("bench_moe_lora.py", "--full", "--shapes", "24x40", "--seconds", "0", "--ranks", "4", "--experts", "2",
            "--dtypes", "float32", "--no-calls", "--peers")  # fmt: skip
    few = "peft,published,loop,eager,ilora[reference]"
    peers = f"{few},unsloth,axolotl,automodel,lorafusion,{OURS}"
    model = ("bench_model.py", "--model", "tiny", "--batch", "2", "--length", "8", "--rounds", "2", "--tokens", "2")
    return [
        Job("layer-1", "layer", _python(*tiny, peers, "--length", "8"), 40),
        Job("decode-24x40", "decode", _python(*tiny, few, "--inference", "--batch", "1,2", "--length", "1"), 40),
        Job("model-tiny", "model", _python(*model), 40),
    ]


def _python(script: str, *options: str) -> list[str]:
    return [sys.executable, f"benchmarks/{script}", *options]


def run(job: Job, device: str, seconds: float) -> dict[str, Any]:
    """Runs the job for at most so many seconds. Its status is "ok", or says what happened."""
    found: dict[str, Any] = {"part": job.part, "environment": job.environment}
    found["command"] = " ".join(job.command).replace(sys.executable, "python")
    if shutil.which(job.command[0]) is None:
        return {**found, "status": f"not run: {job.command[0]} is not on the PATH", "seconds": 0.0, "printed": ""}
    environment = {**os.environ, "KINETO_LOG_LEVEL": "99", **job.environment}
    if device == "cpu" and job.part in ("profile", "layer"):
        environment["TRITON_INTERPRET"] = "1"  # the tests see to it themselves
    with tempfile.TemporaryDirectory() as folder:
        file, printed, errors = (Path(folder) / name for name in ("result.json", "printed", "errors"))
        command = [*job.command, "--json", str(file), "--device", device] if job.writes_json else job.command
        start = time.monotonic()
        found["status"] = _run(command, environment, printed, errors, seconds)
        found["seconds"] = time.monotonic() - start
        found["printed"] = printed.read_text(errors="replace").strip()
        if found["status"] != "ok":
            found["printed"] += "\n" + errors.read_text(errors="replace")[-3000:].strip()
        if file.exists():
            found["result"] = load(file)
    return found


def _run(command: list[str], environment: dict[str, str], printed: Path, errors: Path, seconds: float) -> str:
    with printed.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(timeout=seconds)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its children are in the session that was started for it
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"stopped after {seconds:.0f} s"
            raise
    return "ok" if code == 0 else f"exit status {code}"


def earlier_jobs(file: Path, known: dict[str, Any]) -> dict[str, Any]:
    """The jobs of a report that is there already; ValueError if it is of another device, commit or version."""
    if not file.exists():
        return {}
    earlier = load(file)
    if differing := [name for name in SAME if earlier["machine"].get(name) != known[name]]:
        now = ", ".join(f"{name} {earlier['machine'].get(name)}, now {known[name]}" for name in differing)
        raise ValueError(f"{file} is another report ({now}): move it away, or name another --out")
    found: dict[str, Any] = earlier["jobs"]
    return found


def failed(found: dict[str, Any], parts: tuple[str, ...] = PARTS[:-1]) -> list[str]:
    """Names of the jobs of these parts that failed; by default all but the sanitizer's, whose findings are advice."""
    return [name for name, job in found.items() if job["part"] in parts and job["status"] != "ok"]


def trouble(device: str) -> str | None:
    """Why nothing can be measured here, or None."""
    if not Path(ilora.__file__).is_relative_to(ROOT):
        return f"ilora is imported from {ilora.__file__}, not from this checkout: install it, as README.md says"
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU here; --device cpu makes a dry run, whose figures mean nothing"
    if device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set: the kernels would run in the interpreter; unset it"
    return None


def report_markdown(results: dict[str, Any]) -> str:
    """The report as Markdown: how each job went, the main layers in one table, then what the jobs printed."""
    known, found = results["machine"], results["jobs"]
    texts = [f"# GPU report: {known['device']}", heading(known), f"Commit {known['git_commit']}."]
    texts += ["**Changed since that commit.**"] * bool(known["git_changed"]) + [known.get("state") or ""]
    texts += ["**A dry run on a CPU: every part was gone through, no figure means anything.**"] * results["dry_run"]
    texts.append("\n".join(f"- {name}: {job['status']}, {job['seconds']:.0f} s" for name, job in found.items()))
    rows = {name: job.get("result", {}).get("rows", []) for name, job in found.items() if job["part"] == "layer"}
    main = [row for name in ("layer-1", "layer-2", "layer-3") for row in rows.get(name, [])]
    if any("graph" in row for row in main):
        timed = [row for row in main if "graph" in row or "error" in row]
        texts += ["Forward plus backward, CUDA graphs, dropout 0 / 0.1:", layer_markdown(timed)]
    every = [row for name in rows if not found[name]["environment"] for row in rows[name]]
    if cost := gate_markdown(every):
        texts += ["What the gate costs, over our layer without one (the goal is 2%):", cost]
    for name, job in found.items():
        texts += [f"## {name}", f"`{job['command']}` {job['environment'] or ''}", f"```\n{job['printed']}\n```"]
    return "\n\n".join(text for text in texts if text) + "\n"


def run_jobs(todo: list[Job], options: argparse.Namespace, results: dict[str, Any], folder: Path) -> list[str]:
    """Runs the jobs and writes the report after each; names of those that were left out."""
    end, left, found = time.monotonic() + 60.0 * options.minutes, [], results["jobs"]
    for job in todo:
        if found.get(job.name, {}).get("status") == "ok" and not options.again:
            continue
        doubtful = job.part not in CHECKS and bool(failed(found, ("correct",))) and not options.force
        seconds = min(job.limit, end - time.monotonic())
        if doubtful or seconds < SHORTEST:
            reason = "a check failed; --force times it all the same" if doubtful else "no time; call again to go on"
            print(f"{job.name}: left out: {reason}", flush=True)
            left.append(job.name)
            continue
        print(f"{job.name} ...", end=" ", flush=True)
        found[job.name] = run(job, options.device, seconds)
        print(f"{found[job.name]['status']}, {found[job.name]['seconds']:.0f} s", flush=True)
        write_json(results, folder / "report.json")
        write_text(report_markdown(results), folder / "report.md")
    return left


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    dry = options.device == "cpu"
    try:
        if reason := trouble(options.device):
            raise ValueError(reason)
        known = machine(torch.device(options.device))
        name = "dry-run" if dry else "gpu-" + re.sub(r"[^a-z0-9]+", "-", known["device"].lower()).strip("-")
        folder = options.out / name
        found = {} if dry else earlier_jobs(folder / "report.json", known)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu_report.py: {error}", file=sys.stderr)
        return 2
    results = {"kind": "gpu_report", "dry_run": dry, "machine": known, "jobs": found}
    todo = [job for job in jobs(options.device, options.processes) if job.part in options.only]
    left = run_jobs(todo, options, results, folder)
    print(f"{folder}: report.json, report.md", *(f"failed: {name}" for name in failed(found)), sep="\n")
    return int(bool(failed(found) or left))


if __name__ == "__main__":
    sys.exit(main())
