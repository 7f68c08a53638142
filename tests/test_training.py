"""transformers' Trainer, accelerate and plain loops train an injected model: gates, checkpoints, precisions."""

import multiprocessing
import signal

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: Trainer drops columns of its kind only")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from training_worker import assert_same, batch, dataset, fell, injected, trained  # noqa: E402

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4}


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first in the process


@pytest.mark.parametrize(
    ("column", "gate", "bf16"),
    [
        ("ilora_z", "z", False),
        ("ilora_z", "z", True),
        ("ilora_gate", None, False),
        (None, ilora.PromptGate, False),
        (None, ilora.UniformGate, False),
    ],
)
def test_trainer_trains_the_adapter_and_nothing_else(tmp_path, column, gate, bf16):
    model = injected(gate)
    before, learned = {n: p.clone() for n, p in model.named_parameters()}, worker.trainable(model)
    assert fell(trained(model, tmp_path, dataset(column), max_steps=30, bf16=bf16))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in learned), name
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()


def test_balance_term_in_an_accumulated_step(tmp_path):
    """Its weight is that of the examples: half of them twice is what all of them once are."""
    steps, half = {}, dataset().select([0, 1, 2, 3])
    for accumulate, data in ((1, half), (2, datasets.concatenate_datasets([half, half]))):
        model = injected("z", balance=0.5)
        torch.nn.init.normal_(model.ilora_gate.weight, std=2.0)
        options = {"gradient_accumulation_steps": accumulate, "train_sampling_strategy": "sequential"}
        losses = trained(model, tmp_path, data, max_steps=1, optim="sgd", **options)
        steps[accumulate] = losses[0], worker.trainable(model)
    assert steps[1][0] > trained(injected("z"), tmp_path, half, max_steps=1)[0] + 0.03
    assert steps[2][0] == pytest.approx(steps[1][0], abs=1e-5)
    assert_same(steps[1][1], steps[2][1], 1e-6)


def test_gradient_accumulation_equals_the_big_batch(tmp_path):
    states = []
    for size, accumulate in ((8, 1), (4, 2), (2, 4)):
        model = injected("z")
        trained(model, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=accumulate, **SGD)
        states.append(worker.trainable(model))
    assert_same(states[0], states[1], 1e-6)
    assert_same(states[0], states[2], 1e-6)


def test_gradient_checkpointing_equals_none(tmp_path):
    states = []
    for reentrant in (None, False, True):
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        model = injected("z", lora_dropout=0.1, kind="noisy")
        trained(model, tmp_path, **SGD, **(options if reentrant is not None else {}))
        states.append(worker.trainable(model))
    assert_same(states[0], states[1], 1e-6)
    assert_same(states[0], states[2], 1e-6)


def test_killed_run_resumes_and_ends_bit_equal(tmp_path):
    whole = worker.run(tmp_path / "whole")
    folder = tmp_path / "killed"
    how = "spawn" if torch.cuda.is_available() else "fork"  # a fork has all imports done, and loses a GPU
    killed = multiprocessing.get_context(how).Process(target=worker.run_until_killed, args=(folder, 5), daemon=True)
    killed.start()
    killed.join(timeout=120)
    assert killed.exitcode == -signal.SIGKILL
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3"]
    assert_same(worker.run(folder, resume=True), whole)


def test_load_best_model_at_end(tmp_path):
    scores, states = iter([0.2, 0.9, 0.1]), []
    model = injected("z")

    def compute_metrics(_):
        states.append(worker.trainable(model))
        return {"score": next(scores)}

    best = {"metric_for_best_model": "score", "load_best_model_at_end": True}
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    data = {"train_dataset": dataset(), "eval_dataset": dataset().select(range(4))}
    hf.Trainer(model, worker.arguments(tmp_path, **best, **often), **data, compute_metrics=compute_metrics).train()
    assert_same(worker.trainable(model), states[1])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])


def test_fp16_autocast_with_a_scaler():
    model, scaler = injected("z").train(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, inputs = [], batch(worker.examples(8))
    for _ in range(30):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**inputs).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert fell(losses)
    assert scaler.get_scale() >= 2.0**10  # no step was skipped
    assert all(p.isfinite().all() for p in model.parameters())


def test_accelerate_loop_accumulates():
    states = []
    for accumulate in (1, 2):
        accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=True)
        model = injected("z").train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        loader = torch.utils.data.DataLoader(worker.examples(), batch_size=8 // accumulate, collate_fn=batch)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        for _ in range(2):
            for inputs in loader:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(wrapped(**inputs).loss)
                    optimizer.step()
                    optimizer.zero_grad()
        states.append(worker.trainable(accelerator.unwrap_model(wrapped)))
    assert_same(*states, 1e-6)


def test_data_parallel_is_refused():
    replica = injected("z")._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(**batch(worker.examples(2)))
