"""Pipelines, and sequences cut over ranks, on gloo processes equal one process."""

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
    pytest.skip("torch was built without gloo", allow_module_level=True)

import parallel_worker as worker  # noqa: E402
from ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # processes start, where there may be two cores
DTYPES = {torch.float64: ((0, 1), 1e-10), torch.float32: ((2, 3), 1e-5)}  # ranks, tolerance


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_ranks(worker, tmp_path_factory.mktemp("parallel"), 4)


def assert_close(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, float(value.abs().max()))
        assert (found[name] - value).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", worker.CASES)
def test_a_pipeline_of_micro_batches_equals_one_process(results, case, dtype):
    (first, last), tolerance = DTYPES[dtype]
    first, last = results[first][case], results[last][case]
    expected = worker.alone(case, dtype)
    assert not first["gradients"].keys() & last["gradients"].keys()
    assert_close(first["gradients"] | last["gradients"], expected["gradients"], tolerance)
    assert last["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    assert expected["losses"][-worker.MICRO_BATCHES] < expected["losses"][0] - 1e-2  # the steps did something


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_see_a_piece_of_each_sequence(results, dtype):
    (first, last), tolerance = DTYPES[dtype]
    model, (ids, z) = worker.model_of("recomputed", dtype), worker.batch(dtype)
    model(ids, ilora_z=z).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in worker.trainable(model).items()}
    assert expected["ilora_gate.weight"].abs().max() > 1e-3
    assert_close(results[first]["rows"], expected, tolerance)
    for name, gradient in results[last]["rows"].items():
        assert torch.equal(gradient, results[first]["rows"][name])


def test_a_gate_of_the_prompt_is_refused_under_context_parallel(results):
    for result in results:
        assert "context_parallel has cut the sequences" in result["refused"]
