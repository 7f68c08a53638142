"""The GPU report without a GPU: what it plans, keeps and writes, and every part gone through on the CPU."""

import json
import os
import signal
import time
from pathlib import Path

import checking
import gpu_report
import peers
import pytest
import report
import torch
from gpu import correctness, decode, figures, layer, machine, model, plan, sanitizer, workers
from gpu import markdown as shown
from gpu import results as files
from gpu.budget import PARTS, SHARES, Budget
from gpu_cases import CPU, HERE, SMALL, layer_row, made_up

from ilora.op import backends


def test_the_main_layers_come_first_and_every_layer_once():
    planned = plan.layers(plan.FULL, torch.bfloat16, torch.device("cuda"))
    assert len(planned) == len(set(planned)) == 4 * 7 * 3 * 2 * 2
    first = [each.settings for each in planned[:8]]
    assert {(s.batch * s.length, s.rank, s.experts) for s in first} == {(4096, 16, 4)}
    assert [(s.d_in, s.dropout) for s in first] == [(d, p) for d in (4096, 1024, 2048, 8192) for p in (0.0, 0.1)]
    assert {(s.d_in, s.d_out) for _, s in planned[8:14]} == {(4096, 1024), (4096, 14336), (14336, 4096)}
    assert [each.level for each in planned] == sorted(each.level for each in planned)
    assert plan.left_out(planned[10:16])[0].startswith("no time for 4 of: the main M, oblong")
    assert set(plan.layers(plan.QUICK, torch.bfloat16, torch.device("cuda"))) <= set(planned)


def test_what_one_part_leaves_over_is_the_nexts():
    now = [100.0]
    budget = Budget(100.0, PARTS, lambda: now[0])
    assert sum(SHARES.values()) == pytest.approx(1.0)
    assert budget.left("correctness") == pytest.approx(22.0)
    assert budget.left("host") == pytest.approx(100.0)
    now[0] += 10.0
    assert budget.left("ceilings") == pytest.approx(14.0)
    alone = Budget(60.0, ["model"], lambda: now[0])
    assert alone.left("model") == pytest.approx(60.0)
    now[0] += 61.0
    assert alone.left("model") < 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "everything"], "everything"),
        (["--minutes=0"], "--minutes"),
        (["--processes=-1"], "--processes"),
        (["--peer-path=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        gpu_report.parse(arguments)
    assert message in capsys.readouterr().err


def test_parts_run_in_order_and_quick_takes_less():
    assert gpu_report.parse(["--only", "host", "layer"]).only == ["layer", "host"]
    assert gpu_report.parse(["--quick"]).minutes < gpu_report.parse([]).minutes == 8.0
    assert gpu_report.parse(["--quick", "--minutes=5"]).minutes == 5.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    assert gpu_report.main([f"--out={tmp_path}"]) == 2
    assert "finds no GPU here; --device cpu makes a dry run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture
def compiled(monkeypatch):
    """Without Triton's interpreter, which is slow: the native kernels run, or else the definition."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backends.why_not.cache_clear()
    yield
    backends.why_not.cache_clear()


def test_a_dry_run_goes_through_every_part(compiled, tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.setattr(plan, "TINY", SMALL)
    monkeypatch.setattr(plan, "decode_rows", lambda dry, quick: (1, 17))
    monkeypatch.setattr(decode, "decode_rows", plan.decode_rows)
    monkeypatch.setattr(model, "RUNS", (("llama3-8b", False, (0.1,)),))
    monkeypatch.setattr(peers, "_compiler_trouble", lambda device: "it is slow")
    assert gpu_report.main(["--device=cpu", f"--out={tmp_path}", "--minutes=5"]) == 0
    folder = tmp_path / "dry-run"
    results = json.loads((folder / "report.json").read_text())
    assert list(results["parts"]) == list(PARTS)
    parts = results["parts"]
    assert parts["correctness"]["failed"] == parts["correctness"]["not_run"] == 0
    assert all(row["problem"] is None for row in parts["correctness"]["rows"])
    assert parts["ceilings"]["copy_bytes"] > 0
    assert parts["ceilings"]["flops"] > 0
    rows = parts["layer"]["rows"]
    assert {row["peer"] for row in rows} >= {"frozen", "ilora", "published", "loop", "eager"}
    assert all(row[variant]["both"]["ms"] > 0 for row in rows for variant in ("eager", "graph"))
    assert all(row[variant]["forward"]["ms"] > 0 for row in parts["decode"]["rows"] for variant in ("eager", "graph"))
    assert {row["step"] for row in parts["model"]["rows"]} >= {"frozen", "ilora"}
    assert all(row["both"]["us"] > 0 for row in parts["host"]["rows"])
    assert "DRY RUN" in (folder / "report.md").read_text()
    assert not list(folder.glob("*.tmp"))
    assert not (folder / "strategy-table.json").exists()
    assert "no figure means anything" in capsys.readouterr().out
    with pytest.raises(ValueError, match="dry run"):
        report.markdown(results)


@pytest.mark.parametrize("force", [False, True])
def test_a_wrong_kernel_stops_the_report_unless_forced(compiled, tmp_path, monkeypatch, force, capsys):
    backend = backends.select(machine.backend_of(CPU, torch.float16), "cpu", torch.float16)
    right = backend.forward
    monkeypatch.setattr(backend, "forward", lambda *args: (right(*args)[0] * 1.05, right(*args)[1]))
    arguments = ["--device=cpu", f"--out={tmp_path}", "--only", "correctness", "ceilings"]
    assert gpu_report.main(arguments + ["--force"] * force) == 1
    results = json.loads((tmp_path / "dry-run" / "report.json").read_text())
    part = results["parts"]["correctness"]
    assert part["failed"] == len(part["rows"])
    assert "AssertionError: y: error" in part["rows"][0]["problem"]
    assert ("flops" in results["parts"]["ceilings"]) == force
    assert "WRONG" in capsys.readouterr().out


def test_two_runs_with_other_bits_are_a_finding(monkeypatch):
    (check, *_) = correctness.checks(CPU, True, True)
    count = iter(range(9))
    run = correctness.CASES.run

    def restless(*args, **more):
        found = run(*args, **more)
        return found | {"dA": found["dA"] + 1e-3 * next(count)} if args[1] and not more else found

    monkeypatch.setattr(correctness.CASES, "check", lambda *args: None)
    monkeypatch.setattr(correctness.CASES, "run", restless)
    assert correctness.work(check)["problem"] == "two runs differ in dA"


def test_a_failing_part_leaves_the_others_and_what_it_had(tmp_path, monkeypatch, capsys):
    def breaks(here, planned, processes, left, keep):
        keep({"rows": [], "left_out": ["half"]})
        assert "half" in (tmp_path / "dry-run" / "report.json").read_text()  # kept before the part is over
        raise RuntimeError("the device is on fire")

    monkeypatch.setattr(layer, "measure", breaks)
    arguments = ["--device=cpu", f"--out={tmp_path}", "--only", "ceilings", "layer", "host"]
    assert gpu_report.main(arguments) == 1
    parts = json.loads((tmp_path / "dry-run" / "report.json").read_text())["parts"]
    assert parts["layer"]["error"] == "RuntimeError: the device is on fire"
    assert parts["layer"]["left_out"] == ["half"]
    assert parts["host"]["rows"]
    assert "layer: the part failed: RuntimeError" in capsys.readouterr().out


def test_the_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    results = made_up()
    files.save(results, tmp_path)
    before = (tmp_path / "report.json").read_text()
    with pytest.raises(TypeError):
        files.save(results | {"parts": object()}, tmp_path)

    def full(self, text):
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        files.save(results | {"started": "later"}, tmp_path)
    assert (tmp_path / "report.json").read_text() == before


def test_parts_are_added_to_a_report_of_the_same_commit_only(tmp_path):
    results = made_up()
    file = tmp_path / "report.json"
    assert files.earlier_parts(file, results) == {}
    files.save(results, tmp_path)
    assert files.earlier_parts(file, results) == results["parts"]
    other = results | {"machine": results["machine"] | {"git_commit": "def"}}
    with pytest.raises(ValueError, match="git_commit abc, now def"):
        files.earlier_parts(file, other)
    file.write_text("{}")
    with pytest.raises(ValueError, match=r"is no report of gpu_report\.py"):
        files.earlier_parts(file, results)
    assert files.folder_of(tmp_path, {"device": "NVIDIA H100 80GB HBM3"}, False).name == "gpu-nvidia-h100-80gb-hbm3"


def test_the_markdown_of_a_measurement_file():
    text = shown.markdown(made_up())
    assert "1 checks passed." in text
    assert "**Not run for want of time: 2**" in text
    assert "| ilora[gemm] | 1.17 (1.16–1.18) |" in text
    assert "| frozen | 2.000 ms |" in text
    assert "137 TFLOP/s, 17%" in text  # 4 · 4096³ operations in 2 ms, of 8e14 a second
    assert "| ilora | 12.5 µs, 1.10, 89% | 12.5 µs, 1.10, 89% |" in text
    assert "- Left out: no time for 3 of: these" in text
    assert "- **Failed in 1 rows:** peft: RuntimeError: no" in text
    assert "| llama3-8b, 8×512, R=16 | 30 of 32 | on | 0.1 | ilora | 250.0 ms | 1.080 |" in text
    assert "| frozen | 7 (6); 7 (6); 7 (6) |" in text
    wrong = made_up()
    wrong["parts"]["correctness"]["failed"] = 1
    wrong["parts"]["correctness"]["rows"][0]["problem"] = "y: error 3"
    assert "**WRONG: 1 findings. No figure below counts.**" in shown.summary(wrong)
    assert "R=16, p=0.1: y: error 3" in shown.summary(wrong)
    del wrong["parts"]["correctness"]
    assert "correctness: NOT CHECKED" in shown.summary(wrong)


def test_a_peer_without_one_of_the_dropouts_has_a_dash():
    rows = [layer_row("frozen", 1.0, p=p) for p in (0.0, 0.1)] + [layer_row("unsloth", 1.25)]
    results = made_up()
    results["parts"]["layer"]["rows"] = [*rows, layer_row("lorafusion", 1.5, p=0.1)]
    text = shown.markdown(results)
    assert "| unsloth | 1.25 / – (1.24–1.26) |" in text
    assert "| lorafusion | – / 1.50 (1.49–1.51) |" in text
    assert "| unsloth | 1.25 / – | 1.0 / – MB |" in report.markdown(results)


def test_what_cannot_be_rendered_is_still_measured(tmp_path, monkeypatch, capsys):
    def fails(results, folder):
        raise ValueError("a font is missing")

    monkeypatch.setattr(figures, "draw", fails)
    assert gpu_report.main(["--device=cpu", f"--out={tmp_path}", "--only", "ceilings"]) == 1
    assert json.loads((tmp_path / "dry-run" / "report.json").read_text())["parts"]["ceilings"]["flops"] > 0
    assert "a font is missing" in capsys.readouterr().err


def test_the_readmes_table_of_a_measurement_file():
    lines = report.markdown(made_up()).splitlines()
    assert lines[0] == "| | 4096→4096 | saved for backward |"
    assert "| ilora[gemm] | 1.17 | 1.0 MB |" in lines


def test_plots_and_rendering_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert figures.draw(made_up(), tmp_path) == ["layer.png", "decode.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("layer.png", "decode.png"))
    files.save(made_up(), tmp_path)
    assert gpu_report.main([f"--render={tmp_path / 'report.json'}"]) == 0
    assert capsys.readouterr().out.split() == ["report.md", "strategy-table.json", "layer.png", "decode.png"]
    (tmp_path / "report.json").write_text("[]")
    assert gpu_report.main([f"--render={tmp_path / 'report.json'}"]) == 2


def test_a_sweep_without_time_says_what_is_missing(compiled):
    planned = plan.layers(SMALL._replace(dropouts=(0.0, 0.1)), torch.float32, CPU)
    planned = [each._replace(level=each.level + 1) for each in planned]  # few peers
    kept = []
    part = layer.measure(HERE, planned, 0, lambda: -1.0 if kept else 60.0, lambda part: kept.append(len(part["rows"])))
    assert {(row["d_out"], row["dropout"]) for row in part["rows"]} == {(16, 0.0)}
    assert kept == [len(part["rows"])]
    assert [int(line.split()[3]) for line in part["left_out"]] == [1, 2]


def test_a_table_that_is_named_already_stays_in_force(tmp_path, monkeypatch, compiled):
    monkeypatch.setenv("ILORA_TABLE", "mine.json")
    monkeypatch.setattr(gpu_report, "put_in_force", lambda *_: pytest.fail("it was replaced"))
    monkeypatch.setattr(gpu_report, "parts_of", lambda *_: {"host": lambda left, keep: {"rows": []}})
    assert gpu_report.main(["--device=cpu", f"--out={tmp_path}", "--only", "host"]) == 0


def test_an_arm_that_breaks_is_a_row_and_the_others_go_on(compiled):
    (_, settings), *_ = plan.layers(SMALL, torch.float32, CPU)
    arms, _ = layer.arms_of(settings, False)

    def broken(case):
        raise RuntimeError("no such kernel")

    rows = layer.run_case(HERE, 1, settings, [*arms, layer.Arm("broken", broken)])
    assert rows[-1]["error"] == "RuntimeError: no such kernel"
    assert all("eager" in row for row in rows[:-1])
    with pytest.raises(checking.WrongPeer, match="the frozen layer itself failed"):
        layer.run_case(HERE, 1, settings, [layer.Arm("frozen", broken)])


def test_an_arm_runs_under_its_settings_only(monkeypatch):
    names = ("ILORA_STRATEGY", "ILORA_TABLE", "ILORA_PDL")
    monkeypatch.setenv("ILORA_STRATEGY", "mine")
    monkeypatch.setenv("ILORA_TABLE", "my table")
    monkeypatch.delenv("ILORA_PDL", raising=False)
    seen = []

    class Looking:
        sets, queued, outputs = 1, False, []
        parts = [lambda: seen.append(tuple(map(os.environ.get, names)))]

    def build(case):
        raise NotImplementedError

    for arm in (layer.Arm("one", build, "gemm", table="", pdl="1"), layer.Arm("two", build)):
        for part in layer.Under(Looking(), *arm.under).parts:
            part()
    assert seen == [("gemm", "", "1"), ("mine", "my table", None)]
    assert tuple(map(os.environ.get, names)) == ("mine", "my table", None)


@pytest.mark.parametrize(("tail", "findings"), [("ERROR SUMMARY: 2 errors", 2), ("no such device", None)])
def test_what_a_memory_checker_says_is_kept(tmp_path, monkeypatch, tail, findings):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\necho "========= {tail}"\nexit 3\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rows = sanitizer.finish(sanitizer.start(), lambda: 20.0)
    assert [row["tool"] for row in rows] == ["memcheck", "racecheck"]
    assert all(row["status"] == 3 and row["findings"] == findings for row in rows)
    assert "--tool memcheck" in rows[0]["last_lines"][0]
    assert rows[0]["last_lines"][0].endswith("-m gpu.correctness")
    assert [sanitizer.faults(row) for row in rows] == [findings or 1] * 2


@pytest.mark.parametrize("findings", [0, 3])
def test_a_memory_checker_that_saw_everything_counts_by_its_findings(tmp_path, monkeypatch, findings):
    tool = tmp_path / "compute-sanitizer"
    said = f"RACECHECK SUMMARY: {findings + 2} hazards displayed ({findings} errors, 2 warnings)"
    tool.write_text(f'#!/bin/sh\necho "the small layers ran"\necho "========= {said}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    rows = sanitizer.finish(sanitizer.start(), lambda: 20.0)
    assert [sanitizer.faults(row) for row in rows] == [findings] * 2
    assert rows[0]["findings"] == findings + 2


def test_a_wrong_replay_is_a_finding(monkeypatch):
    if (reason := backends.why_not("triton", "cpu")) is not None:
        pytest.skip(reason)
    from ilora.kernels import replay

    again = replay.Replay.again
    check = next(check for check in correctness.checks(torch.device("cpu"), True, True) if check.strategy == "beta")
    assert correctness._update(check) is None
    monkeypatch.setattr(replay.Replay, "again", lambda *args: tuple(t if t is None else t * 0 for t in again(*args)))
    replay.forget()
    assert "two runs differ" in correctness._update(check)


def test_a_memory_checker_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\nsleep 60 & wait\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    start = time.monotonic()
    rows = sanitizer.finish(sanitizer.start(), lambda: 0.2)
    assert time.monotonic() - start < 10
    assert not any(row["finished"] or row["findings"] or sanitizer.faults(row) for row in rows)


def test_what_the_checker_watches_runs(compiled):
    correctness.small("cpu")


def test_jobs_run_side_by_side_and_what_takes_too_long_is_given_up():
    assert dict(workers.done(abs, [-1, -2], 0, lambda: 60.0, abs)) == {0: 1, 1: 2}
    left, came = [120.0], []
    start = time.monotonic()
    for index, _ in workers.done(time.sleep, [0.0, 300.0], 2, lambda: left[0], time.sleep):
        came.append(index)
        left[0] = 0.5
    assert came == [0]
    assert time.monotonic() - start < 120


@pytest.mark.parametrize(("hung", "wanted"), [(0.1, {0: None, 1: "lost"}), (100.0, {0: None})])
def test_what_hangs_is_lost_and_what_has_just_begun_is_given_up(hung, wanted, monkeypatch):
    monkeypatch.setattr(workers, "HUNG", hung)
    left, came = [120.0], {}
    for index, result in workers.done(time.sleep, [0.0, 300.0], 2, lambda: left[0], lambda job: "lost"):
        came[index] = result
        left[0] = 0.5
    assert came == wanted


def test_graphs_that_cannot_be_timed_leave_the_times_of_the_calls(compiled, monkeypatch):
    (_, settings), *_ = plan.layers(SMALL, torch.float32, CPU)
    time_all = layer.time_all

    def broken(here, rows, variant, programs, seconds):
        if variant == "graph":
            raise RuntimeError("offset increment outside graph capture")
        time_all(here, rows, variant, programs, seconds)

    monkeypatch.setattr(layer, "time_all", broken)
    rows = layer.run_case(HERE, 1, settings, layer.arms_of(settings, False)[0])
    assert all("eager" in row and "outside graph capture" in row["graph_error"] for row in rows)


def fatal(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_job_that_takes_its_process_along_is_said_so():
    came = dict(workers.done(fatal, [0, 1, 2, 3, 4], 2, lambda: 120.0, lambda job: f"{job} died"))
    assert came == {0: 0, 1: 1, 2: "2 died", 3: 3, 4: 4}


def losing(number):
    if number == 2:
        workers.leave("its device is lost")
    return number


def test_a_process_whose_device_is_lost_gives_way_to_another():
    workers.leave("this is none of those processes")
    came = dict(workers.done(losing, list(range(20)), 2, lambda: 120.0, lambda job: f"{job} died"))
    assert came == {number: number if number != 2 else "2 died" for number in range(20)}


@pytest.mark.parametrize("checked", [{"error": "no"}, {"rows": [], "failed": 0}, {"rows": [{}], "failed": 2}])
def test_nothing_is_timed_in_doubt(checked, tmp_path, monkeypatch):
    parts = {"correctness": lambda left, keep: checked, "host": lambda left, keep: {"rows": [1]}}
    monkeypatch.setattr(gpu_report, "parts_of", lambda here, options: parts)
    monkeypatch.setattr(gpu_report, "_rendered", lambda *arguments, **options: [])
    options = gpu_report.parse(["--device", "cpu", "--only", "correctness", "host"])
    for force in (False, True):
        options.force, results = force, {"parts": {}}
        gpu_report.run(HERE, options, results, tmp_path)
        assert ("rows" in results["parts"]["host"]) is force


def test_layers_that_fit_the_memory(monkeypatch):
    options = model.options_of(HERE, "llama3-8b", False, 3)
    options.model = "llama3-8b"
    needs = {1: (110, 70), 2: (120, 90)}  # a layer: 10 of weights, 20 of a step; besides 100 and 50
    monkeypatch.setattr(model, "_needs", lambda here, trial, dropout, kind: needs[trial.layers])
    for free, layers in ((1000, 25), (100, 1), (10**6, 32)):
        monkeypatch.setattr(machine.Machine, "free_bytes", lambda self, free=free: free)
        assert model.fitting(HERE, options, 0.1, ["frozen", "ilora"]) == layers


def test_a_model_that_does_not_fit_is_tried_with_fewer_layers(monkeypatch):
    tried = []

    def steps(options, dropouts, kinds):
        tried.append(options.layers)
        if options.layers > 8:
            raise torch.OutOfMemoryError("no")
        return [{"step": "frozen"}]

    monkeypatch.setattr(model, "_steps", steps)
    monkeypatch.setattr(model, "fitting", lambda *args: 20)
    rows = model._run(HERE, "llama3-8b", False, (0.1,), ["frozen"], 3)
    assert tried == [20, 15, 11, 8]
    assert rows[0]["layers"] == 8
