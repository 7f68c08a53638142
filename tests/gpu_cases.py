"""What tests of the GPU report share: a dry machine, rows as a sweep leaves them, a measurement file."""

import report
import torch
from gpu import machine, plan

CPU = torch.device("cpu")
HERE = machine.machine_of(CPU)
SMALL = plan.Sizes((72,), (16,), ((16, 24),), (4,), (2,), 8, (0.1,))


def timed(ms, ratio):
    one = {"ms": ms, "ratio": ratio, "low": ratio - 0.01, "high": ratio + 0.01}
    return {"rounds": 9, "forward": one, "backward": one, "both": one}


def layer_row(peer, ratio, backward=None, d=4096, M=4096, p=0.0, R=16, level=0):
    graph = timed(2.0 * ratio, ratio)
    graph["backward"] = timed(2.0 * (backward or ratio), backward or ratio)["both"]
    row = {"level": level, "M": M, "d_in": d, "d_out": d, "batch": 8, "length": M // 8, "rank": R, "experts": 4}
    row |= {"dropout": p, "dtype": "bfloat16", "device": "cuda", "peer": peer, "saved_bytes": 1e6, "peak_bytes": 2e6}
    return row | {"error_of_check": 1e-3, "eager": timed(3.0, ratio), "graph": graph}


def made_up():
    """A measurement file as a run leaves it; its figures are this test's."""
    rows = [layer_row(*each) for each in (("frozen", 1.0), ("ilora[beta]", 1.31), ("ilora[gemm]", 1.17, 1.4))]
    rows += [layer_row("ilora[beta]", 1.5, d=1024, R=64, level=2), layer_row("frozen", 1.0, d=1024, R=64, level=2)]
    failed = {key: value for key, value in layer_row("peft", 1.0).items() if key not in ("eager", "graph")}
    rows.append(failed | {"error": "RuntimeError: no"})
    about = {"d_in": 4096, "d_out": 4096, "rank": 16, "weight_bytes": 2**25}
    few = [{**about, "peer": name, "M": M, "eager": timed(0.02, 2.0), "graph": timed(0.0125, 1.1)}
           for name in ("frozen", "ilora") for M in (1, 16)]  # fmt: skip
    step = {"shape": "llama3-8b", "layers": 30, "of_layers": 32, "checkpointing": True, "batch": 8, "length": 512}
    step |= {"rank": 16, "step": "ilora", "dropout": 0.1, "seconds": 0.25, "ratio": 1.08, "low": 1.07, "high": 1.09}
    check = {
        "shape": "even",
        "strategy": "gemm",
        "dtype": "bf16",
        "R": 16,
        "p": 0.1,
        "fields": {"M": 3},
        "mixed": False,
    }
    parts = {
        "correctness": {"rows": [check | {"problem": None}], "failed": 0, "not_run": 2, "sanitizer": []},
        "ceilings": {"copy_bytes": 3e12, "flops": 8e14},
        "layer": {"rows": rows, "left_out": ["no time for 3 of: these"], "unavailable": {"loop": "it was not wanted"}},
        "decode": {"rows": few},
        "model": {"rows": [step | {"peak_bytes": 40e9, "trained": 5}]},
        "host": {"rows": [{"peer": "frozen", "M": 8} | dict.fromkeys(("inference", "forward", "both"),
                                                                       {"us": 7.0, "best_us": 6.0})]},
    }  # fmt: skip
    known = {**report.machine(CPU), "device": "NVIDIA TEST", "git_changed": False, "git_commit": "abc"}
    return {"kind": "gpu_report", "dry_run": False, "machine": known, "settings": {}, "started": "today",
            "parts": {name: part | {"seconds": 1.0} for name, part in parts.items()}}  # fmt: skip


class OneSet(machine.Machine):
    def sets(self, size):
        return 1
