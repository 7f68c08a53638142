"""The GPU report without a GPU: its jobs, what it keeps and writes, and a dry run on the CPU."""

import json
import sys
import time

import gpu_profile
import gpu_report
import pytest
import report
import torch
from gpu_report import Job
from peers import Settings

WRITES = "import sys, json; json.dump({'machine': {}, 'rows': []}, open(sys.argv[sys.argv.index('--json') + 1], 'w'))"
CPU = torch.device("cpu")


def job(name="a job", part="layer", code="print('done')", seconds=20.0, **environment):
    return Job(name, part, [sys.executable, "-c", code], seconds, environment)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs these jobs as the report; returns its exit status and what report.json has of them."""

    def run(*jobs, options=()):
        monkeypatch.setattr(gpu_report, "jobs", lambda device, processes: list(jobs))
        status = gpu_report.main(["--device=cpu", f"--out={tmp_path}", *options])
        file = tmp_path / "dry-run" / "report.json"
        return status, json.loads(file.read_text())["jobs"] if file.exists() else {}

    return run


def test_the_jobs_fit_their_time_and_are_of_programs_that_are_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for device in ("cuda", "cpu"):
        jobs = gpu_report.jobs(device, 4)
        assert len({each.name for each in jobs}) == len(jobs)
        assert list(dict.fromkeys(each.part for each in jobs)) == list(gpu_report.PARTS)
        needed = {part: sum(each.seconds for each in jobs if each.part == part) for part in gpu_report.PARTS}
        assert max(needed.values()) <= 8 * 60
        assert sum(needed.values()) <= 3 * 8.5 * 60
        programs = {part.removeprefix("--ignore=") for each in jobs for part in each.command if part.endswith(".py")}
        assert all((gpu_report.ROOT / part).exists() for part in programs)
    main = [each.command for each in gpu_report.jobs("cuda", 4) if each.name == "layer-1"]
    assert "--peers" not in main[0]  # all of them


def test_every_command_is_one_that_its_program_takes(monkeypatch):
    import bench_model
    import bench_moe_lora

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(bench_moe_lora, "unavailable", lambda *of: None)
    for each in gpu_report.jobs("cuda", 4):
        for program in (bench_moe_lora, bench_model):
            if each.command[1].endswith(f"{program.__name__}.py"):
                program.parse([*each.command[2:], "--device", "cpu"])


def test_a_job_is_kept_with_its_result_its_words_and_its_variables(run, tmp_path):
    code = f"import os; print('x' + os.environ['ILORA_STRATEGY']); {WRITES}"
    status, kept = run(job(code=code, ILORA_STRATEGY="beta"))
    assert status == 0
    assert kept["a job"]["result"]["rows"] == []
    assert (kept["a job"]["status"], kept["a job"]["printed"]) == ("ok", "xbeta")
    assert sys.executable not in kept["a job"]["command"]
    text = (tmp_path / "dry-run" / "report.md").read_text()
    assert "- a job: ok," in text
    assert "xbeta" in text
    assert "A dry run on a CPU" in text
    assert not list((tmp_path / "dry-run").glob("*.tmp"))


@pytest.mark.parametrize(
    ("part", "code", "status", "words"),
    [
        ("layer", "import sys; print('half'); sys.exit(3)", 1, "exit status 3"),
        ("layer", "import os; print('half', flush=True); os.kill(os.getpid(), 9)", 1, "exit status -9"),
        ("layer", "import time; print('half', flush=True); time.sleep(60)", 1, "stopped after 3 s"),
        ("sanitizer", "import sys; print('half'); sys.exit(3)", 0, "exit status 3"),  # this is advice
    ],
)
def test_a_job_that_fails_or_hangs_costs_itself_alone(part, code, status, words, run, monkeypatch):
    monkeypatch.setattr(gpu_report, "SHORTEST", 0.0)
    found, kept = run(job("bad", part, code, seconds=1.0), job("good"))
    assert found == status
    assert (kept["bad"]["status"], kept["good"]["status"]) == (words, "ok")
    assert kept["bad"]["printed"].startswith("half")


def test_a_job_that_is_stopped_takes_its_children_along(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_report, "SHORTEST", 0.0)
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(4); open({str(mark)!r}, 'w')"
    run(job(code=f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", seconds=0.7))
    time.sleep(3.5)
    assert not mark.exists()


@pytest.mark.parametrize("force", [False, True])
def test_nothing_is_timed_after_a_failed_check_unless_forced(force, run):
    bad = job("check", "correct", "import sys; sys.exit(1)")
    last = job("watched", "sanitizer")
    status, kept = run(bad, job("timed"), last, options=["--force"] * force)
    assert status == 1
    assert ("timed" in kept) is force
    assert "watched" in kept


def test_no_job_begins_that_there_is_no_time_for(run, capsys):
    status, kept = run(job(), options=["--minutes=0.1"])
    assert (status, kept) == (1, {})
    assert "a job: left out: no time; call again" in capsys.readouterr().out


def test_a_later_run_goes_on_and_tries_again_what_failed(tmp_path, monkeypatch):
    ran, results = [], {"dry_run": True, "machine": {**dict.fromkeys(gpu_report.SAME), "load_before": 0.0}}
    kept = {"done": {"status": "ok", "part": "layer"}, "failed": {"status": "exit status 1", "part": "layer"}}
    ok = {"status": "ok", "part": "layer", "seconds": 0}
    monkeypatch.setattr(gpu_report, "run", lambda job, device, left: ran.append(job.name) or ok)
    monkeypatch.setattr(gpu_report, "report_markdown", lambda results: "")
    for arguments, wanted in ([], ["failed", "new"]), (["--again"], ["done", "failed", "new"]):
        ran.clear()
        todo = [job(name) for name in ("done", "failed", "new")]
        options = gpu_report.parse(["--device=cpu", *arguments])
        assert gpu_report.run_jobs(todo, options, results | {"jobs": dict(kept)}, tmp_path) == []
        assert ran == wanted


def test_jobs_are_added_to_a_report_of_the_same_commit_only(tmp_path):
    file, known = tmp_path / "report.json", dict.fromkeys(gpu_report.SAME, "same")
    assert gpu_report.earlier_jobs(file, known) == {}
    report.write_json({"machine": known, "jobs": {"one": 1}}, file)
    assert gpu_report.earlier_jobs(file, known) == {"one": 1}
    with pytest.raises(ValueError, match="git_commit same, now other"):
        gpu_report.earlier_jobs(file, known | {"git_commit": "other"})
    file.write_text("[]")
    with pytest.raises(ValueError, match="no file that a benchmark wrote"):
        gpu_report.earlier_jobs(file, known)


def test_what_cannot_run_here_says_so(tmp_path, monkeypatch, capsys):
    if not torch.cuda.is_available():
        assert gpu_report.main([f"--out={tmp_path}"]) == 2
        assert "finds no GPU here; --device cpu makes a dry run" in capsys.readouterr().err
    monkeypatch.setattr(gpu_report.ilora, "__file__", "/elsewhere/ilora/__init__.py")
    assert gpu_report.main(["--device=cpu", f"--out={tmp_path}"]) == 2
    assert "not from this checkout: install it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    missing = gpu_report.run(Job("checker", "sanitizer", ["no-such-program"], 9.0), "cpu", 9.0)
    assert missing["status"] == "not run: no-such-program is not on the PATH"


def test_the_main_layers_make_one_table_and_the_gates_cost_another():
    row = {"peer": "frozen", "dropout": 0.0, "dtype": "bfloat16", "batch": 8, "length": 2, "rank": 4, "experts": 2}
    row |= {"saved_bytes": 0, "graph": {"both": {"ratio": 1.0}}}
    cost = {"both": {"ratio": 1.015, "low": 0.99, "high": 1.02}}
    ours = row | {"peer": "ilora[triton]", "graph": {"both": {"ratio": 1.5}, "gate": cost}}
    none = row | {"peer": "unsloth", "error": "NotImplementedError: no dropout"}
    jobs, strategy = {}, {"ILORA_STRATEGY": "beta"}
    for name, d_out, environment in (("layer-1", 4096, {}), ("layer-3", 1024, {}), ("layer-beta", 512, strategy)):
        rows = [each | {"d_in": 4096, "d_out": d_out} for each in (row, ours, none)]
        told = {"status": "ok", "part": "layer", "seconds": 1.0, "command": "", "printed": ""}
        jobs[name] = told | {"environment": environment, "result": {"rows": rows}}
    known = gpu_report.machine(CPU)
    text = gpu_report.report_markdown({"machine": known, "jobs": jobs, "dry_run": False})
    assert "|               | 4096→4096   | 4096→1024   | saved for backward   |" in text
    assert "| unsloth       | –           | –           |" in text
    costs = [line.split(" | ") for line in text.splitlines() if "+1.5% (-1.0% to +2.0%)" in line]
    assert [line[0].strip() for line in costs] == ["| 4096→4096, 16 rows, R = 4", "| 4096→1024, 16 rows, R = 4"]


def test_a_dry_run_of_a_benchmark(tmp_path, capsys):
    pytest.importorskip("peft")
    assert gpu_report.main(["--device=cpu", f"--out={tmp_path}", "--only", "decode"]) == 0
    results = json.loads((tmp_path / "dry-run" / "report.json").read_text())
    assert results["dry_run"]
    jobs = results["jobs"]
    assert [each["status"] for each in jobs.values()] == ["ok"]
    assert {row["peer"] for row in jobs["decode-24x40"]["result"]["rows"]} >= {"frozen", "peft", "ilora[reference]"}
    with pytest.raises(ValueError, match="dry run"):
        report.markdown(results)


def test_a_profile_says_where_the_time_goes(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("ILORA_STRATEGY", "beta")
    file = tmp_path / "profile.json"
    gpu_profile.main(["--device=cpu", "--strategy=beta", "--widths=16", f"--json={file}"])
    results = json.loads(file.read_text())
    assert [(row["layer"], row["direction"]) for row in results["rows"][:4]] == [
        (layer, direction) for layer in ("frozen", "ours") for direction in ("forward", "backward")
    ]
    kernels = results["rows"][0]["kernels"]
    assert kernels == sorted(kernels, key=lambda row: -row["us"])
    assert kernels[0]["bytes"] == 2 * (72 * 16 + 16 * 16 + 72 * 16)  # x, W and y in float16
    assert "ours, backward, 16→16, M = 72, R = 16, p = 0.1, strategy beta" in capsys.readouterr().out


def test_bytes_and_roofs():
    settings = Settings(4096, 4096, 8, 512, 16, 4, 0.0, torch.bfloat16, CPU)
    moved = gpu_profile.bytes_of_launches(settings, "beta", "forward")
    assert moved["shrink"] >= 2 * 4096 * 4096  # x
    kernels = [{"kernel": name, "us": us} for name, us in (("gemm of cuBLAS", 200.0), ("shrink", 20.0), ("other", 1.0))]
    roofs = {"copy_bytes": 3e12, "flops": 8e14}
    gpu_profile.compare_to_roofs(kernels, moved, settings, "forward", roofs)
    product, shrink, other = kernels
    assert product["bytes"] == 2 * 4 * 4096 * 4096  # x, W, and y read and written
    assert product["share_of_roof"] == pytest.approx(2 * 4096**3 / 8e14 / 200e-6)
    assert shrink["share_of_roof"] == pytest.approx(moved["shrink"] / 3e12 / 20e-6)
    assert shrink["gb_per_s"] == pytest.approx(moved["shrink"] / 20e-6 / 1e9)
    assert "bytes" not in other
