"""How the benchmarks capture, check and time CUDA graphs, with stand-ins for the device."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import checking
import measure
import pytest
import torch


@pytest.fixture
def cuda(monkeypatch):
    """torch's graph interface without a device. cuda.events: what happens; cuda.current: the current stream."""
    cuda = SimpleNamespace(events=[], current="mine")

    class Graph:
        def pool(self):
            return self

        def replay(self):
            cuda.events.append(("replay", self))
            cuda.outputs[0].fill_(1.0)  # as the graph would

    class Stream:
        def wait_stream(self, other):
            cuda.events.append("wait")

    @contextmanager
    def capture(graph, pool=None):
        cuda.events.append(("capture", pool))
        cuda.current = "the capture's"
        yield
        cuda.current = "mine"

    stand_ins = {
        "CUDAGraph": Graph,
        "graph": capture,
        "stream": nullcontext,
        "Stream": Stream,
        "current_stream": Stream,
    }
    for name, value in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda which: setattr(cuda, "current", "mine"))
    cuda.outputs = [torch.ones(2)]
    return cuda


def test_graphs_are_captured_after_warm_up_part_by_part_from_one_pool(cuda):
    events = cuda.events
    parts = [lambda: events.append("forward"), lambda: events.append("backward")]
    graphed = measure.graphed(measure.Program(parts, cuda.outputs, 3))
    assert events[:10] == ["wait", *["forward", "backward"] * 3, "forward", "forward", "wait"]
    (first, _), forward, (checked, _), (second, pool), backward = events[10:]
    assert (first, forward, checked, second, backward) == ("capture", "forward", "replay", "capture", "backward")
    assert graphed.sets == 3
    assert graphed.queued
    graphed.run()
    assert events[-2] == ("replay", pool)
    assert events[-1][1] is not pool


def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda):
    calls = []

    def part():
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("not permitted while capturing")

    with pytest.raises(RuntimeError, match="while capturing"):
        measure.graphed(measure.Program([part], cuda.outputs, 1))
    assert cuda.current == "mine"


def test_a_program_that_cannot_be_captured_is_timed_as_calls_alone(monkeypatch):
    def graphed(program):
        if program.sets == 2:
            raise RuntimeError("offset increment outside graph capture\nand more")
        return measure.Program(program.parts, [], program.sets, queued=True)

    monkeypatch.setattr(measure, "graphed", graphed)
    monkeypatch.setattr(measure, "_raise_clocks", lambda device: None)
    monkeypatch.setattr(measure, "time_once", lambda program, device: (2.0 - program.queued, 4.0))
    programs = {name: measure.Program([], [], sets) for name, sets in (("frozen", 1), ("eager", 2), ("loop", 3))}
    rows = {name: {} for name in programs}
    measure.time_rows(rows, programs, torch.device("cuda"), 0.0, 9)
    assert [list(row) for row in rows.values()] == [["eager", "graph"], ["eager", "graph_error"], ["eager", "graph"]]
    assert rows["eager"]["graph_error"] == "RuntimeError: offset increment outside graph capture"
    assert (rows["loop"]["eager"]["forward"]["ms"], rows["loop"]["graph"]["forward"]["ms"]) == (2.0, 1.0)
    assert rows["loop"]["graph"]["both"] == {"ms": 5.0, "ratio": 1.0, "low": 1.0, "high": 1.0}


def test_inputs_are_more_than_three_caches_hold(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50e6))
    cuda = torch.device("cuda")
    assert [measure.input_sets(size, cuda) for size in (200e6, 100e6, 18e6, 1e3)] == [1, 2, 9, measure.MAX_SETS]
    assert measure.input_sets(1e3, torch.device("cpu")) == 1


class Replayed:
    """A graph that writes `written` to y."""

    def __init__(self, y, written):
        self.y, self.written = y, written

    def replay(self):
        self.y[: len(self.written)] = self.written


def test_a_replay_that_computes_something_else_is_found():
    y, right = torch.zeros(4), torch.arange(4.0)
    measure._check_replay(Replayed(y, right), [y], right, right)
    measure._check_replay(Replayed(y, right + 1), [y], right, right + 1)  # dropout: two calls differ as well
    with pytest.raises(checking.WrongPeer, match="does not write all of y"):
        measure._check_replay(Replayed(y, right[:3]), [y], right, right)
    with pytest.raises(checking.WrongPeer, match="differs from its call by 0.33"):
        measure._check_replay(Replayed(y, right + 1), [y], right, right)


@pytest.mark.parametrize("queued", [False, True])
def test_graphs_are_queued_before_the_first_begins(queued, monkeypatch):
    events = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            events.append("record")

        def elapsed_time(self, other):
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: events.append("sleep"))
    program = measure.Program([lambda: events.append("part")], [], 3, queued)
    assert measure.time_once(program, torch.device("cuda")) == (2.0,)
    assert events == ["synchronize", *["sleep"] * queued, "record", "part", "record", "synchronize"]
