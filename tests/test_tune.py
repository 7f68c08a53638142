"""Which strategy won, and with which tile: how tiles are tried, and the table that is made of it."""

import dataclasses
import os

import gpu_report
import peers
import pytest
import torch
from gpu import arms, layer, plan, tune, workers
from gpu import markdown as shown
from gpu import results as files
from gpu import table as strategies
from gpu_cases import CPU, HERE, OneSet, layer_row, made_up


def test_the_strategy_table_is_read_by_the_kernels(tmp_path):
    pytest.importorskip("triton")
    from ilora.kernels import strategy
    from ilora.kernels.launch import Device
    from ilora.kernels.table import load_table

    file = tmp_path / "strategy-table.json"
    assert strategies.write(made_up(), file)
    rows = load_table(str(file))
    assert {(row.direction, row.M, row.R, row.strategy) for row in rows} == {
        ("forward", 4096, 16, "gemm"),
        ("backward", 4096, 16, "beta"),
    }
    device = Device(132, 227 * 1024, tma=True, name="NVIDIA TEST")
    for direction, wanted in (("forward", "gemm"), ("backward", "beta")):
        choice = strategy.choose(device, direction, 4096, 4096, 4096, 16, torch.bfloat16, str(file))
        assert choice.strategy == wanted
    nothing = made_up()
    nothing["parts"]["layer"]["rows"] = []
    assert not strategies.write(nothing, tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def table_of(rows):
    results = made_up()
    results["parts"]["layer"]["rows"] = rows
    return strategies.rows_of(results)


def test_with_dropout_another_strategy_may_win_and_experts_count_alike():
    times = {(0.0, 4): 0.9, (0.1, 4): 1.3, (0.0, 8): 1.05, (0.1, 8): 1.2}
    rows = [
        layer_row(name, ratio, p=p) | {"experts": experts} for (p, experts), gemm in times.items()
        for name, ratio in (("ilora[beta]", 1.0), ("ilora[gemm]", gemm))
    ]  # fmt: skip
    assert {(row["dropout"], row["strategy"]) for row in table_of(rows)} == {(False, "gemm"), (True, "beta")}


@pytest.mark.parametrize(
    ("times", "wanted"),
    [({"gemm": 0.95, "whole": 0.8}, ["whole", "gemm"]), ({"gemm": 1.05, "whole": 0.8}, ["whole", "beta"]),
     ({"gemm": 0.8, "whole": 0.9}, ["gemm"]), ({"gemm": 0.995, "whole": 1.3}, ["beta"]),
     ({"whole": 0.9}, ["whole", "beta"])],
)  # fmt: skip
def test_what_is_to_be_where_whole_cannot_is_in_the_table(times, wanted):
    rows = [layer_row(f"ilora[{name}]", ratio) for name, ratio in ({"beta": 1.0} | times).items()]
    for direction in ("forward", "backward"):
        assert [row["strategy"] for row in table_of(rows) if row["direction"] == direction] == wanted


def test_experts_that_one_strategy_failed_with_decide_nothing():
    times = {("beta", 4): 1.0, ("gemm", 4): 0.95, ("whole", 4): 0.97, ("beta", 8): 1.0, ("gemm", 8): 1.2}
    rows = [layer_row(f"ilora[{name}]", ratio) | {"experts": E} for (name, E), ratio in times.items()]
    assert {row["strategy"] for row in table_of(rows)} == {"beta"}  # gemm's mean; whole has none


def test_strategies_are_timed_and_tell_which_won():
    pytest.importorskip("triton")
    settings = peers.Settings(16, 24, 2, 4, 8, 2, 0.1, torch.float16, CPU)
    arms = [
        arm for arm in layer.arms_of(settings, False)[0] if arm.name == "frozen" or arm.strategy not in (None, "auto")
    ]
    assert [arm.strategy for arm in arms] == [None, "beta", "gemm", "whole"]
    rows = layer.run_case(OneSet(*HERE), 1, settings, arms)
    assert not any("error" in row or "graph_error" in row for row in rows)
    table = strategies.rows_of({"machine": {"device": "interpreter"}, "parts": {"layer": {"rows": rows}}})
    assert {(row["direction"], row["M"], row["R"]) for row in table} == {("backward", 8, 8), ("forward", 8, 8)}


def test_tiles_are_tried_for_the_main_layers_and_ranks_far_from_theirs():
    planned = tune.wanted(plan.layers(plan.FULL, torch.bfloat16, torch.device("cuda")))
    assert len(planned) == 7 * 2 * 2
    assert [each.level for each in planned] == sorted(each.level for each in planned)
    assert {(s.batch * s.length, s.rank, s.experts) for _, s in planned} == {(4096, 16, 4), (4096, 64, 4)}


def test_every_tile_is_tried_by_a_table_of_its_own(monkeypatch):
    pytest.importorskip("triton")
    from ilora.kernels import gemm, update, whole

    seen = set()
    for name, module in (("gemm_launch", gemm), ("whole_launch", whole)):
        launch = getattr(module, name)
        monkeypatch.setattr(update, name, lambda *a, n=name, f=launch: seen.add((n, tuple(a[1]))) or f(*a))
    monkeypatch.setattr(tune, "DRY_TILES", ((64, 128, 64, 8, (4, 3)), (64, 64, 32, 4, (40, 2))))
    settings = peers.Settings(16, 24, 2, 40, 8, 2, 0.1, torch.float16, CPU)
    kept = []
    part = tune.measure(OneSet(*HERE), [plan.Planned(0, settings)], False, 0, lambda: 600.0, kept.append)
    rows = {row["peer"]: row for row in part["rows"]}
    assert not any("error" in row or "graph_error" in row for row in rows.values())
    assert list(rows) == [
        "frozen", "beta",
        "gemm 64×128×64, 8 warps, 4 stages", "gemm 64×64×32, 4 warps, 2 stages",
        "whole 64×128×64, 8 warps, 4 stages", "whole 64×64×32, 4 warps, 2 stages",
    ]  # fmt: skip
    tiles = ((64, 128, 64, 8, 4, tune.GROUP), (64, 64, 32, 4, 2, tune.GROUP))  # as many stages as fit
    assert seen == {(f"{name}_launch", tile) for name in ("gemm", "whole") for tile in tiles}
    assert part["warm_up"]["run"] == part["warm_up"]["jobs"] == 4  # each was checked
    assert len(kept) == 1
    table = strategies.rows_of({"machine": {"device": "interpreter"}, "parts": {"tune": part}})
    assert {(row["direction"], row["dropout"]) for row in table} == {("backward", True), ("forward", True)}


def test_an_option_that_is_wrong_at_a_small_size_is_not_timed(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(tune, "work", lambda check: {"problem": "y is off" if check.table else None})
    settings = peers.Settings(16, 24, 2, 40, 64, 2, 0.0, torch.float16, CPU)  # 64 ranks: no "whole"
    part = tune.measure(OneSet(*HERE), [plan.Planned(0, settings)], False, 0, lambda: 600.0, lambda part: None)
    rows = {row["peer"]: row for row in part["rows"]}
    name = "gemm 64×128×64, 8 warps, 3 stages"
    assert list(rows) == ["frozen", "beta", name]
    assert "graph" in rows["beta"]
    assert rows[name]["error"] == "y is off"
    assert strategies.rows_of({"machine": {"device": "interpreter"}, "parts": {"tune": part}}) == []


def tuned_row(strategy, tile, forward, backward):
    row = layer_row(strategy, forward, backward)
    return row | {"peer": f"{strategy} {tile}", "strategy": strategy, "tile": tile}


def tuned():
    """A report whose layers say gemm in forward and whose tiles say something else."""
    small, large = [64, 128, 64, 4, 4, 8], [128, 256, 64, 8, 4, 8]
    rows = [tuned_row("beta", None, 1.0, 1.0), tuned_row("gemm", large, 0.9, 1.1), tuned_row("gemm", small, 0.95, 0.97)]
    rows += [tuned_row("whole", small, 0.85, 1.2), layer_row("frozen", 0.7)]
    rows.append({"peer": "whole broken", "error": "RuntimeError: no", "dtype": "bfloat16"})
    results = made_up()
    results["parts"]["tune"] = {"rows": rows, "seconds": 1.0}
    return results, small, large


def test_tiles_that_won_go_ahead_of_the_sweep_and_are_put_in_force(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    from ilora.kernels import strategy
    from ilora.kernels.launch import Device

    results, small, large = tuned()
    monkeypatch.setenv("ILORA_TABLE", "")
    monkeypatch.delenv("ILORA_TABLE")
    gpu_report.put_in_force(results, tmp_path)
    assert "ILORA_TABLE" not in os.environ  # nothing was written
    files.render(results, tmp_path, plots=False)
    gpu_report.put_in_force(made_up(), tmp_path)
    assert "ILORA_TABLE" not in os.environ  # nothing was tried
    gpu_report.put_in_force(results, tmp_path)
    device, shape = Device(132, 227 * 1024, tma=True, name="NVIDIA TEST"), (4096, 4096, 4096, 16, torch.bfloat16)
    file = os.environ["ILORA_TABLE"]
    assert file == str(tmp_path / "strategy-table.json")
    assert strategy.choose(device, "forward", *shape, file) == ("whole", tuple(small))
    assert strategy.choose(device, "forward", *shape, file, whole=False) == ("gemm", tuple(large))
    assert strategy.choose(device, "backward", *shape, file) == ("gemm", tuple(small))
    text = shown.markdown(results)
    assert "| forward, M=4096, R=16 | whole 64×128×64/4/4, else gemm 128×256×64/8/4 |" in text
    assert text.count("Which strategy won") == 1
    assert "| gemm [128, 256, 64, 8, 4, 8] | 0.900 ; 1.100 |" in text


def test_the_sweep_decides_where_no_tile_was_tried_near():
    results, *_ = tuned()
    far = [layer_row(f"ilora[{name}]", ratio, M=M, R=R) for M, R in ((8192, 16), (1024, 16), (4096, 64))
           for name, ratio in (("beta", 1.0), ("gemm", 0.5))]  # fmt: skip
    results["parts"]["layer"]["rows"] = far
    shapes = {(row["M"], row["R"]) for row in strategies.rows_of(results)}
    assert shapes == {(4096, 16), (1024, 16), (4096, 64)}  # 8192 rows are near
    results["parts"]["tune"] = {"error": "no device", "seconds": 1.0}
    assert (8192, 16) in {(row["M"], row["R"]) for row in strategies.rows_of(results)}
    assert shown.markdown(results).count("Which strategy won") == 1


def test_what_is_tried_first_is_what_matters_most(monkeypatch):
    pytest.importorskip("triton")
    settings = peers.Settings(16, 24, 2, 40, 8, 2, 0.0, torch.float16, CPU)
    planned = [plan.Planned(level, dataclasses.replace(settings, rank=rank)) for level, rank in ((0, 8), (2, 64))]
    tried = []
    monkeypatch.setattr(tune, "tried", lambda job: tried.append((job.check.R, job.warm.arm.name.split()[0])))
    monkeypatch.setattr(tune, "_case", lambda here, each, known, broken: [broken])
    part = tune.measure(OneSet(*HERE), planned, False, 0, lambda: 600.0, lambda part: None)
    assert tried == [(8, "gemm"), (8, "whole"), (64, "gemm")]
    assert part["rows"] == [{}, {}]
    monkeypatch.setattr(workers, "done", lambda function, jobs, *_: iter([(0, function(jobs[0]))]))
    (broken, _) = tune.measure(OneSet(*HERE), planned, False, 0, lambda: 600.0, lambda part: None)["rows"]
    assert len(broken) == 2
    assert set(broken.values()) == {"there was no time to try it"}


def test_what_is_launched_early_has_a_row_and_no_part_in_the_table():
    pytest.importorskip("triton")
    settings = peers.Settings(16, 24, 2, 40, 8, 2, 0.1, torch.float16, CPU)
    (arm,) = (arm for arm, reason in arms.ours(settings, True) if arm.name == "ilora[pdl]" and reason is None)
    assert arm.under == ("auto", None, "1")
    rows = [layer_row(f"ilora[{name}]", ratio) for name, ratio in (("beta", 1.0), ("gemm", 0.95), ("pdl", 0.5))]
    assert {row["strategy"] for row in table_of(rows)} == {"gemm"}
