"""How the benchmarks capture, check and time CUDA graphs, with stand-ins for the device."""

from contextlib import contextmanager

import checking
import measure
import pytest
import torch


def test_graphs_are_captured_after_warm_up_part_by_part_from_one_pool(monkeypatch):
    events = []

    class Graph:
        def pool(self):
            return self

        def replay(self):
            events.append(("replay", self))

    @contextmanager
    def capture(graph, pool=None):
        events.append(("capture", pool))
        yield

    @contextmanager
    def stream(which):
        yield

    class Stream:
        def wait_stream(self, other):
            events.append("wait")

    for name, value in (("CUDAGraph", Graph), ("graph", capture), ("stream", stream), ("Stream", Stream)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)

    outputs = [torch.ones(2)]
    two = measure.Program([lambda: events.append("forward"), lambda: events.append("backward")], outputs, 3)

    def replay(graph):
        events.append(("replay", graph))
        outputs[0].fill_(1.0)  # as the graph would

    monkeypatch.setattr(Graph, "replay", replay)
    graphed = measure.graphed(two)
    assert events[:10] == ["wait", *["forward", "backward"] * 3, "forward", "forward", "wait"]
    (first, _), forward, (checked, _), (second, pool), backward = events[10:]
    assert (first, forward, checked, second, backward) == ("capture", "forward", "replay", "capture", "backward")
    assert graphed.sets == 3
    for part in graphed.parts:
        part()
    assert events[-2] == ("replay", pool)
    assert events[-1][1] is not pool


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


def test_a_capture_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    streams = ["mine"]

    class Stream:
        def wait_stream(self, other):
            pass

    @contextmanager
    def stream(which):
        yield

    @contextmanager
    def capture(graph, pool=None):
        streams[0] = "the capture's"
        yield

    mine = Stream()
    names = {"CUDAGraph": object, "graph": capture, "stream": stream, "Stream": Stream, "current_stream": lambda: mine}
    for name, value in names.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda which: streams.__setitem__(0, which))
    calls = []

    def part():
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("not permitted while capturing")

    with pytest.raises(RuntimeError, match="while capturing"):
        measure.graphed(measure.Program([part], [torch.ones(1)], 1))
    assert streams == [mine]


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
