"""The layer benchmark: all peers compute one function, wrong ones are not timed, files are complete."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import bench_many_adapters as many
import bench_moe_lora as bench
import checking
import machine
import measure
import peers
import pytest
import report
import torch
import torch.nn.functional as F
from memory import peak_bytes, saved_bytes

CPU = torch.device("cpu")
TINY = ["--device=cpu", "--shapes=24x40", "--batch=2", "--length=8", "--ranks=4", "--experts=2", "--dtypes=float32"]
TINY += ["--seconds=0", "--repeats=4", "--threads=1", "--no-calls"]


def case_of(**changes):
    values = {"d_in": 24, "d_out": 40, "batch": 3, "length": 64, "rank": 4, "experts": 2, "dropout": 0.0}
    return peers.make_case(peers.Settings(**{**values, "dtype": torch.float32, "device": CPU, **changes}))


KNOWN = {**bench.TRAINING_PEERS, "ILoRALinear": peers.MODULES["ilora"], "nn.Linear": peers.MODULES["frozen"]}


@pytest.mark.parametrize("name", [name for name in KNOWN if name != "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_every_peer_equals_the_reference(name, dtype, dropout):
    if reason := peers.unavailable(name, CPU, dtype, asked=dtype == torch.float32):  # Triton's interpreter takes that
        pytest.skip(reason)
    length = 16 if name in peers.OF_TRITON else 64
    case = case_of(dropout=0.0 if name in ("ILoRALinear", "unsloth") else dropout, dtype=dtype, length=length)
    assert checking.check(KNOWN[name](case), KNOWN[name], case) <= checking.TOLERANCE[dtype]
    if not case.settings.dropout:
        assert checking.check_inference(KNOWN[name](case), case) <= checking.TOLERANCE[dtype]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_compiled_peer_equals_the_reference(dropout, monkeypatch):
    traced = torch.compile(peers._algebraic, backend="eager", fullgraph=True)  # inductor itself would take 15 seconds
    monkeypatch.setattr(peers, "_compiled_algebraic", lambda: traced)
    case = case_of(dropout=dropout)
    assert checking.check(peers.compiled(case), peers.compiled, case) <= checking.TOLERANCE[torch.float32]


def test_peers_that_cannot_be_compared_here_say_why():
    for name in peers.OF_TRITON:
        assert "interpreter is not for timing" in peers.unavailable(name, CPU, torch.float32)
    with pytest.raises(NotImplementedError, match="as PEFT does"):
        bench.TRAINING_PEERS["unsloth"](case_of(dropout=0.1))


def wrong_scaling(case):
    return peers.eager(replace(case, scaling=case.scaling * 1.01))


def wrong_gate(case):
    return replace(peers.eager(replace(case, gate=case.gate.roll(1, 0))), gate=case.gate)


def no_dropout(case):
    return replace(peers.eager(replace(case, settings=replace(case.settings, dropout=0.0))), mask=None)


def dropout_not_inverted(case):
    peer = peers.eager(replace(case, scaling=case.scaling * (1.0 - case.settings.dropout)))
    return peer if case.settings.dropout == 0.0 else replace(peer, mask=None)


def dropped_by(drop):
    """Builds a peer whose mask cannot be known beforehand: its update reads `drop(x, p)`."""

    def build(case):
        peer = peers.eager(case, lambda x, weight, bias, A, B, gate, s, p: layer(x, weight, bias, A, B, gate, s, p))
        return replace(peer, mask=None)

    def layer(x, weight, bias, A, B, gate, s, p):
        seen = drop(x, p) if p else x
        return F.linear(x, weight, bias) + peers._algebraic(seen, weight * 0, bias * 0, A, B, gate, s, 0.0)

    return build


class MaskForgotten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        return F.dropout(x, p)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


class OtherMaskForA(torch.autograd.Function):
    """x̃ Aᵀ whose mask is right in the result and in the gradient of x, but missing in the gradient of A."""

    @staticmethod
    def forward(ctx, x, A, p):
        mask = F.dropout(torch.ones_like(x), p)
        ctx.save_for_backward(x, A, mask)
        return F.linear(x * mask, A)

    @staticmethod
    def backward(ctx, dxa):
        x, A, mask = ctx.saved_tensors
        return dxa @ A * mask, torch.einsum("blr,blk->rk", dxa, x), None


def mask_not_in_the_gradient_of_A(case):
    peer, p = peers.eager(case), case.settings.dropout
    A, B, gate = peer.parameters

    def call(x):
        gamma = (gate * case.scaling).repeat_interleave(A.shape[0] // gate.shape[1], dim=1)
        return F.linear(x, case.weight, case.bias) + F.linear(OtherMaskForA.apply(x, A, p) * gamma[:, None], B)

    return peer if p == 0.0 else replace(peer, call=call, mask=None)


DROPOUTS = {  # each right at p = 0
    "no scale": lambda x, p: F.dropout(x, p) * (1.0 - p),
    "twice": lambda x, p: F.dropout(F.dropout(x, p), p),
    "another p": lambda x, p: F.dropout(x, 0.4 * p) * (1.0 - 0.4 * p) / (1.0 - p),
    "none in backward": MaskForgotten.apply,
    "two masks mixed": lambda x, p: 0.5 * F.dropout(x, p) + 0.5 * F.dropout(x, p),
}


def gradient_of_another_mask(case):
    peer = peers.eager(case)

    def call(x):
        y, other = peer.call(x), peer.call(x)
        return other + (y - other).detach()

    return replace(peer, call=call)


def gradient_of_nan(case):
    peer = peers.eager(case)

    def call(x):
        return peer.call(x) + (peer.parameters[0].sum() * 0.0).sqrt()  # 0, whose gradient is infinity times 0

    return replace(peer, call=call)


WRONG = [wrong_scaling, wrong_gate, no_dropout, dropout_not_inverted, gradient_of_another_mask]


@pytest.mark.parametrize("build", [*WRONG, mask_not_in_the_gradient_of_A, gradient_of_nan])
def test_check_refuses(build):
    case = case_of(dropout=0.3)
    with pytest.raises(checking.WrongPeer):
        checking.check(build(case), build, case)


SIZES = [(1, 1, 576, 576), (8, 8, 576, 576), (8, 64, 576, 1536), (2, 8, 24, 40), (1, 1, 8, 8)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_check_passes_every_right_dropout(size, dtype):
    right = dropped_by(F.dropout)
    for (rank, experts), dropout in itertools.product([(1, 1), (8, 4)], [0.1, 0.5, 0.9]):
        batch, length, d_in, d_out = size
        changes = {"batch": batch, "length": length, "d_in": d_in, "d_out": d_out, "rank": rank, "experts": experts}
        case = case_of(**changes, dropout=dropout, dtype=dtype)
        assert checking.check(right(case), right, case) <= checking.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DROPOUTS)
def test_check_refuses_every_wrong_dropout(name, dtype):
    wrong = dropped_by(DROPOUTS[name])
    for size, dropout in itertools.product([(3, 64), (2, 8)], [0.1, 0.5, 0.9]):
        case = case_of(batch=size[0], length=size[1], dropout=dropout, dtype=dtype)
        with pytest.raises(checking.WrongPeer):
            checking.check(wrong(case), wrong, case)


def test_sweep_writes_rows_tables_and_plot(tmp_path, capsys):
    file, image = tmp_path / "rows.json", tmp_path / "plot.png"
    names = ["peft", "published", "loop", "eager", "ilora[reference]"]
    assert bench.main([*TINY, f"--peers={','.join(names)}", f"--json={file}", f"--plot={image}"]) == 0
    results = json.loads(file.read_text())
    wanted = {"device", "cpu", "threads", "torch", "triton", "peft", "transformers", "ilora", "git_commit"}
    assert wanted <= results["machine"].keys()
    assert results["settings"]["shapes"] == [[24, 40]]
    assert [(row["peer"], row["dropout"]) for row in results["rows"]] == [
        (name, p) for p in (0.0, 0.1) for name in ["frozen", *names]
    ]
    for row in results["rows"]:
        assert row["eager"]["rounds"] == 3  # no time: the fewest
        assert row["eager"]["both"]["ms"] >= row["eager"]["forward"]["ms"] > 0
        assert row["peak_bytes"] >= 2 * 8 * (24 + 40) * 4  # dx and y at least
    frozen, published = results["rows"][0], results["rows"][2]
    assert frozen["eager"]["both"]["ratio"] == 1.0
    assert published["saved_bytes"] > frozen["saved_bytes"] == 0
    assert image.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "rows.json"]
    shown = capsys.readouterr().out
    assert "24→40, R=4, E=2, p=0.1" in shown
    assert all(name in shown for name in [*names, "add --full"])


def test_the_gate_costs_what_it_adds_to_our_layer_without_one(monkeypatch):
    now = [0.0]  # seconds; the programs alone move the clock on
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def waits(milliseconds):
        return measure.Program([lambda: now.__setitem__(0, now[0] + milliseconds / 1e3)] * 2, [], 1)

    programs = {"frozen": waits(2), measure.GATED: waits(6), measure.UNGATED: waits(4)}
    rows = {name: {} for name in programs}
    measure.time_rows(rows, programs, CPU, 0.0, 5)
    own, cost = rows[measure.GATED]["eager"], rows[measure.GATED]["eager"]["gate"]["both"]
    assert cost["ratio"] == pytest.approx(1.5)
    assert own["both"]["ratio"] == pytest.approx(3.0)
    assert cost["ms"] == own["both"]["ms"]
    assert "gate" not in rows[measure.UNGATED]["eager"]


def test_inference_times_forward_alone(tmp_path, capsys):
    file = tmp_path / "rows.json"
    assert bench.main([*TINY, "--inference", "--batch=1,2", "--length=1", "--peers=eager", f"--json={file}"]) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["peer"], row["dropout"]) for row in rows] == [
        (batch, name, 0.0) for batch in (1, 2) for name in ("frozen", "eager")
    ]
    assert all(row["eager"].keys() == {"rounds", "forward"} for row in rows)
    assert "float32, 2 × 1 rows, R = 4, E = 2:" in report.markdown({"rows": rows})


def test_calls_of_small_layers_are_timed_in_one_thread(monkeypatch):
    monkeypatch.setattr(bench, "SMALL_CALLS", ((1, 8, 8),))
    threads = torch.get_num_threads()
    rows = bench.call_costs(CPU)
    assert torch.get_num_threads() == threads
    assert [row["peer"] for row in rows] == ["frozen", "peft", "ilora"] * 2
    assert [set(row["eager"]) - {"rounds"} for row in rows[2::3]] == [{"forward"}, set(measure.PARTS)]
    us = 1e3 * rows[2]["eager"]["forward"]["ms"]
    text = report.markdown({"calls": rows})
    assert f"| ilora  | {us:.1f} ({rows[2]['eager']['forward']['ratio']:.2f})" in text
    assert "1 × 8→8, forward + backward" in text


def raises(case):
    raise ImportError("another version of torchao is wanted\nand more")


@pytest.mark.parametrize(
    ("name", "build", "status", "message"),
    [
        ("eager", wrong_scaling, 1, "eager: not timed: WrongPeer: the gradient of"),
        ("peft", raises, 0, "peft: not timed: ImportError: another version of torchao is wanted\n"),
        ("ilora[reference]", raises, 1, "ilora[reference]: not timed: ImportError"),
        ("frozen", raises, 1, "frozen: not timed: ImportError"),
    ],
)
def test_what_is_wrong_or_does_not_run_is_not_timed(name, build, status, message, monkeypatch, capsys):
    monkeypatch.setitem(bench.ALL_PEERS, name, build)
    assert bench.main([*TINY, f"--peers={name},loop", "--dropout=0"]) == status
    shown = capsys.readouterr().out
    assert message in shown
    assert ("eager, 3 rounds" in shown) == (name != "frozen")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes=5x"], "'5x': expected d_in x d_out"),
        (["--ranks=6", "--experts=4"], "divide the rank"),
        (["--dropout=1"], "0 <= p < 1"),
        (["--dtypes=float64"], "float64"),
        (["--peers=nobody"], "nobody"),
        (["--peers=ilora[cuda]"], "ilora[cuda]: expected frozen"),
        (["--inference", "--dropout=0.1"], "--inference has no dropout"),
        (["--device=tpu"], "tpu"),
        (["--batch=0"], "--batch: '0': expected a whole number"),
        (["--json=/no/such/folder/x.json"], "does not exist"),
        (["--json=."], "--json: .: a folder"),
        (["--plot=/no/such/folder/x.png"], "does not exist"),
        (["--plot=x.txt"], "x.txt: expected a name that ends in .png"),
        (["--dropout=0,,0.1"], "--dropout: '' is not a number"),
        (["--seconds=nan"], "--seconds nan"),
        (["--device=cuda:x"], "--device: 'cuda:x': expected cpu or cuda"),
    ],
)
def test_unusable_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse([*TINY, *arguments])
    assert message in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_refused_or_left_out(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        bench.parse([*TINY, "--plot=x.png"])
    assert "--plot: matplotlib is not installed" in capsys.readouterr().err
    options = bench.parse(TINY)
    assert "peft" not in options.peers[torch.float32]
    assert "peft is left out: peft is not installed" in options.notes


def test_the_default_is_small_and_options_take_precedence():
    options = bench.parse(["--device=cpu", "--length=7", "--peers=eager"])
    assert (options.length, options.dtypes, options.shapes) == ([7], [torch.float32], [(576, 1536)])
    full = bench.parse(["--device=cpu", "--full", "--length=7", "--peers=eager"])
    assert (full.length, full.shapes[-1]) == ([7], (2048, 2048))


def row_of(peer, ratio, d_in=24, dropout=0.0, dtype="float32", rank=4, experts=2):
    row = {"peer": peer, "d_in": d_in, "d_out": 40, "dropout": dropout, "dtype": dtype, "rank": rank}
    row |= {"experts": experts, "saved_bytes": 2e6, "batch": 2, "length": 8}
    return row | {"eager": {"both": {"ratio": ratio, "low": ratio, "high": ratio}}}


def refused(peer, **about):
    row = row_of(peer, 1.0, **about) | {"error": "WrongPeer: y differs"}
    return {name: value for name, value in row.items() if name not in ("eager", "saved_bytes")}


def test_a_refused_peer_is_wrong_in_the_table_and_what_is_not_there_is_a_dash():
    rows = [row_of("frozen", 1.0, dropout=p) for p in (0.0, 0.1)]
    rows += [row_of("eager", 1.25), refused("eager", dropout=0.1), row_of("loop", 1.5)]
    rows.append(refused("peft") | {"error": "ImportError: no"})
    assert report.markdown({"rows": rows}).splitlines() == [
        "|        | 24→40        | saved for backward   |",
        "|:-------|:-------------|:---------------------|",
        "| frozen | 1.00 / 1.00  | 2.0 / 2.0 MB         |",
        "| eager  | 1.25 / wrong | 2.0 / – MB           |",
        "| loop   | 1.50 / –     | 2.0 / – MB           |",
        "| peft   | failed / –   | – / – MB             |",
    ]


def test_every_dtype_rank_and_number_of_experts_has_its_table():
    about = [("float32", 4, 2), ("bfloat16", 4, 2), ("float32", 8, 2), ("float32", 8, 4)]
    rows = [row_of("eager", 1.0 + i / 10, 24, 0.0, *each) for i, each in enumerate(about)]
    tables = report.markdown({"rows": rows}).split("saved for backward")
    assert len(tables) == 1 + len(about)
    for i, (dtype, rank, experts) in enumerate(about):
        assert tables[i].split("\n")[-3] == f"{dtype}, 2 × 8 rows, R = {rank}, E = {experts}:"
        assert f"| eager | {1.0 + i / 10:.2f}    | 2.0 MB" in tables[i + 1]


def test_the_time_of_a_graph_comes_first_in_tables():
    row = row_of("eager", 2.0)
    assert "1.25" in report.markdown({"rows": [row | {"graph": {"both": {"ratio": 1.25}}}]})


@pytest.mark.parametrize(("results", "message"), [({"rows": []}, "no rows"), ({"dry_run": True}, "dry run")])
def test_a_file_without_figures_has_no_table(results, message):
    with pytest.raises(ValueError, match=message):
        report.markdown(results)


def test_report_prints_tables_and_draws(tmp_path, capsys):
    results, image = tmp_path / "rows.json", tmp_path / "plot.png"
    report.write_json({"machine": {"device": "a CPU"}, "rows": [row_of("frozen", 1.0), row_of("eager", 1.2)]}, results)
    report.main([str(results), str(image)])
    assert "| eager  | 1.20    | 2.0 MB" in capsys.readouterr().out
    assert image.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "other.json").write_text("[1]")
    for arguments, message in [
        (["--help"], "usage:"),
        ([], "usage:"),
        ([str(tmp_path / "none.json")], "none.json cannot be read"),
        ([str(tmp_path / "other.json")], "no file that a benchmark wrote"),
        ([str(results), str(tmp_path / "x.txt")], "x.txt: expected a name that ends in"),
    ]:
        with pytest.raises(SystemExit):
            report.main(arguments)
        shown = capsys.readouterr()
        assert message in shown.out + shown.err


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    with pytest.raises(IsADirectoryError):
        report.write_text("text", folder)
    matplotlib = pytest.importorskip("matplotlib.figure")

    def fails(figure, file, **options):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(matplotlib.Figure, "savefig", fails)
    with pytest.raises(OSError, match="no space"):
        report.plot({"machine": {"device": "a CPU"}, "rows": [row_of("eager", 1.2)]}, tmp_path / "x.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a folder"]


def test_peak_and_saved_bytes_of_a_known_function():
    x, w = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    size = 256 * 256 * 4
    assert 2 * size <= peak_bytes(lambda: (x @ w).exp().sum(), CPU) < 2.1 * size
    assert saved_bytes(lambda: (x @ w).exp(), [w]) == size  # exp keeps its result, the product keeps w


def test_busy_machine_is_reported():
    assert machine.busy({"load_before": 0.3, "cores": 2}) is None
    assert machine.busy({"load_before": None, "cores": 2}) is None
    assert "load 1.7 on 2 cores" in machine.busy({"load_before": 1.7, "cores": 2})


def test_interleave_stops_by_time_and_by_repeats():
    case = case_of()
    programs = {"frozen": measure.training([peers.frozen(case)], [case])}
    assert len(measure.interleave(programs, CPU, 0.0, 50)["frozen"]) == 3
    assert len(measure.interleave(programs, CPU, 60.0, 5)["frozen"]) == 5
    summary = measure.summarise([(2.0, 4.0), (2.0, 8.0), (1.0, 5.0)], [(1.0, 2.0), (2.0, 2.0), (1.0, 1.0)])
    assert summary["both"] == {"ms": 6.0, "ratio": 2.5, "low": 2.25, "high": 2.75}


def test_many_adapters_and_experts_are_checked_and_timed(tmp_path, monkeypatch):
    for package in ("peft", "transformers"):
        pytest.importorskip(package)
    sizes = ["--adapters=3", "--experts=4", "--width=24", "--instances=6", "--tokens=8", "--rank=4"]
    many.main([*sizes, "--seconds=0", "--repeats=2", "--json", str(tmp_path / "many.json")])
    results = report.load(tmp_path / "many.json")
    peers_of = {kind: {row["peer"] for row in results[kind]} for kind in ("adapters", "experts")}
    assert {"frozen", "ilora", "ilora, one-hot gate", "peft, adapter_names", "loop"} < peers_of["adapters"]
    assert {"frozen", "ilora", "peft, target_parameters", "loop"} == peers_of["experts"]
    assert "3 adapters" in report.markdown(results)
    monkeypatch.setattr(many, "_fill", lambda tensors, values: [torch.nn.init.normal_(tensor) for tensor in tensors])
    with pytest.raises(checking.WrongPeer, match=r": y differs from the loop's by"):
        many.main([*sizes, "--seconds=0", "--repeats=1"])
