"""Layers split over two and four processes equal those of one process, and their files are the same."""

import pytest
import torch
from torch import nn

import ilora
from ilora import tensor_parallel

pytest.importorskip("transformers", reason="transformers is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import tensor_parallel_worker as worker  # noqa: E402
from ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # processes start, where there may be two cores
WORLDS = (2, 4)
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """(folder, results) by the number of processes."""
    found = {}
    for world in WORLDS:
        folder = tmp_path_factory.mktemp(f"split{world}")
        worker.base("llama", "float64").save_pretrained(folder / "base")
        found[world] = folder, run_ranks(worker, folder, world)
    return found


def alone(variant):
    family, gate, dropout_p, dtype = variant
    model = worker.injected(worker.base(family, dtype), gate, dropout_p)
    return model, worker.trained(model, gate)


def assert_equal(found, expected, tolerance):
    for kind in ("gradients", "parameters"):
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            scale = max(1.0, float(value.abs().max()))
            assert (found[kind][name] - value).abs().max() <= tolerance * scale, (kind, name)
    assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance)


@pytest.mark.parametrize("variant", worker.VARIANTS[2], ids=lambda variant: "-".join(map(str, variant)))
def test_five_steps_equal_those_of_one_process(split, variant):
    _, expected = alone(variant)
    for world in WORLDS:
        if variant in worker.VARIANTS[world]:
            assert_equal(split[world][1][variant], expected, TOLERANCE[variant[3]])


@pytest.mark.parametrize("world", WORLDS)
def test_transformers_own_plan(split, world):
    results = split[world][1]
    assert results["auto split"]
    _, expected = alone(("llama", "sequence", 0.1, "float64"))
    assert_equal(results["auto"], expected, 1e-10)


def test_fsdp_over_tensor_parallel(split):
    _, expected = alone(("llama", "sequence", 0.0, "float64"))
    assert_equal(split[4][1]["fsdp"], expected, 1e-10)


def test_a_frozen_weight_that_ddp_has_made_trainable_is_refused(split):
    words = split[4][1]["ddp"]
    assert words.startswith("model.layers.0.self_attn.q_proj: its frozen weight is split over processes")
    assert "use fully_shard on the mesh's other dimension" in words


def test_the_files_are_those_of_one_process_and_training_goes_on(split, tmp_path):
    for world in WORLDS:
        folder, results = split[world]
        model = worker.injected(worker.base("llama", "float32"), "sequence", 0.0)
        ilora.load_adapter(model, folder / "saved")
        for name, value in worker.whole(model).items():
            assert torch.equal(value, results[worker.SAVED]["parameters"][name]), name
        ilora.save_adapter(model, tmp_path / str(world))
        files = sorted(path.name for path in (folder / "saved").iterdir())
        assert files == sorted(path.name for path in (tmp_path / str(world)).iterdir())
        for name in files:
            assert (folder / "saved" / name).read_bytes() == (tmp_path / str(world) / name).read_bytes(), name
        assert torch.equal(results["generated"], worker.generated(model, "sequence"))
        assert_equal(results["continued"], worker.trained(model.train(), "sequence"), 1e-5)


def test_what_needs_whole_weights_is_refused_by_name(split):
    merge, to_peft = split[2][1]["refused"]
    assert "q_proj has a Linear base, whose DTensor weight cannot be added to" in merge
    assert "lora_A is split over processes; save_adapter, then load_adapter and to_peft in one process" in to_peft


def test_a_copy_of_a_split_model_computes_the_same(split):
    for world in WORLDS:
        copied, expected = split[world][1]["copied"]
        assert torch.equal(copied, expected)


@pytest.mark.parametrize("world", WORLDS)
def test_the_update_sums_ranks_over_the_processes_and_no_activations(split, world):
    M, R, N, E = 3 * 7, 8, 3, 4
    sums = split[world][1]["sums"]
    (forward, backward), frozen = sums["rows"]
    assert (sorted(forward), backward) == (sorted([M * R, *frozen[0]]), frozen[1])
    (forward, backward), frozen = sums["columns"]
    assert (forward, sorted(backward)) == (frozen[0], sorted([M * R, N * E, *frozen[1]]))
    assert sums["rows"][1] == [[M * 32], []]  # the frozen layer's own
    assert sums["columns"][1] == [[], [M * 32]]


def test_sequences_cut_between_the_blocks_are_refused(split):
    for world in WORLDS:
        assert all("name it in exclude_modules" in words for words in split[world][1]["sequence parallel"])
        assert len(split[world][1]["sequence parallel"]) == 2


class Weight:
    """What `split_of` reads of a DTensor."""

    device_mesh = None

    def __init__(self, *placements):
        self.placements = placements


@pytest.mark.parametrize("kind", ["replicated", "two dimensions", "not a linear"])
def test_another_split_is_refused(kind):
    from torch.distributed.tensor import Replicate, Shard

    base = nn.Embedding(4, 4) if kind == "not a linear" else nn.Linear(4, 4)
    del base.weight
    base.weight = Weight(*{"replicated": [Replicate()], "two dimensions": [Shard(0), Shard(1)]}.get(kind, [Shard(0)]))
    base.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="split over processes as .* name it in exclude_modules"):
        tensor_parallel.split_of(base)


class Local:
    """A parameter that is split."""

    def __init__(self, tensor):
        self.tensor = tensor

    def to_local(self):
        return self.tensor


@pytest.mark.parametrize(("d_in", "d_out", "name"), [(8, 3, "input"), (4, 6, "output")])
def test_a_layer_that_gathers_or_splits_by_itself_is_refused(d_in, d_out, name):
    split = tensor_parallel.Split(None, 0, 0)
    with pytest.raises(ValueError, match=f"its {name} is Tensor .* name it in exclude_modules"):
        tensor_parallel.add_update(
            split, torch.randn(2, d_in), torch.randn(2, d_out), Local(torch.randn(2, 4)), Local(torch.randn(3, 2)),
            torch.ones(1, 1), 1.0, None, 0.0, None, None,
        )  # fmt: skip


def test_segments_that_do_not_end_at_the_last_row_are_refused():
    A, B = Local(torch.randn(2, 4)), Local(torch.randn(3, 2))
    segments = torch.tensor([0, 1, 5], dtype=torch.int32)
    with pytest.raises(ValueError, match="segments"):
        tensor_parallel.add_update(
            tensor_parallel.Split(None, 0, 0), torch.randn(2, 4), torch.randn(2, 3), A, B,
            torch.ones(2, 1), 1.0, segments, 0.0, None, None,
        )  # fmt: skip
