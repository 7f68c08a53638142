"""DDP and FSDP2 on two gloo processes equal one process on the joint batch, gate network included."""

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
pytest.importorskip("datasets", reason="datasets is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import distributed_worker as worker  # noqa: E402
from ranks import run_ranks  # noqa: E402
from training_worker import assert_same  # noqa: E402


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What two ranks wrote, and where."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_ranks(worker, folder, 2)


@pytest.fixture(scope="module")
def alone():
    """What one process makes of the joint batch, by whether the gate is a PromptGate."""
    models = {prompt: worker.injected(prompt) for prompt in (False, True)}
    for prompt, model in models.items():
        worker.steps(model, worker.batch(prompt=prompt))
    return {prompt: worker.gathered(model) for prompt, model in models.items()}


def assert_close(a, b):
    assert "ilora_gate.weight" in a
    assert_same(a, b, 1e-5)


def assert_saved(folder, expected):
    model = worker.injected()
    ilora.load_adapter(model, folder)
    assert_same(worker.gathered(model), expected)


@pytest.mark.parametrize("variant", [v for v in worker.VARIANTS if v != "trainer"])
def test_two_ranks_equal_one(results, alone, variant):
    prompt = variant.endswith("prompt")
    expected, start = alone[prompt], worker.gathered(worker.injected(prompt))
    assert all((expected[name] - start[name]).abs().max() > 1e-4 for name in start)  # three steps did something
    assert_close(results[1][variant], expected)


def test_trainer_on_two_ranks_equals_one_and_saves(results, tmp_path):
    folder, ranks = results
    assert_close(ranks["trainer"], worker.trainer(worker.injected(), tmp_path, 4))
    assert_saved(folder / "trainer" / f"checkpoint-{worker.STEPS}", ranks["trainer"])


@pytest.mark.parametrize("variant", ["fsdp", "fsdp-torch"])
def test_sharded_models_save_whole_tensors(results, variant):
    assert_saved(results[0] / variant, results[1][variant])
