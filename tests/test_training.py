"""transformers' Trainer, accelerate and plain loops train an injected model: gates, checkpoints, precisions."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
datasets = pytest.importorskip("datasets", reason="datasets is not installed: Trainer drops columns of its kind only")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402

CONFIG = ilora.ILoRAConfig(r=8, num_experts=4)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # it keeps the precision of the first in the process


def injected(gate=None, config=CONFIG, **options):
    """The same model every time; gate: a class, options: its arguments."""
    model = worker.tiny_llama()
    torch.manual_seed(1)
    return ilora.inject(model, config, gate=gate and gate(**options))


def z_gated(config=CONFIG, **options):
    return injected(ilora.SequenceGate, config, z_dim=6, **options)


def dataset(column="ilora_z"):
    """The examples with this column of the gate's, or none."""
    rows = worker.examples()
    if column != "ilora_z":
        for i, row in enumerate(rows):
            del row["ilora_z"]
            if column == "ilora_gate":
                row["ilora_gate"] = [float(e == i % 4) for e in range(4)]
    return datasets.Dataset.from_list(rows)


def trained(model, folder, data=None, collator=None, **options):
    """(Trainer after training, its losses)."""
    data = dataset() if data is None else data
    trainer = hf.Trainer(model, worker.arguments(folder, **options), train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer, [log["loss"] for log in trainer.state.log_history if "loss" in log]


def fell(losses):
    return sum(losses[-4:]) / 4 < 0.75 * losses[0]


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("column", "make"),
    [
        ("ilora_z", z_gated),
        ("ilora_gate", injected),
        (None, lambda: injected(ilora.PromptGate)),
        (None, lambda: injected(ilora.UniformGate)),
    ],
    ids=["z", "gate", "prompt", "uniform"],
)
def test_trainer_trains_the_adapter_and_nothing_else(tmp_path, column, make):
    model = make()
    before, learned = {n: p.clone() for n, p in model.named_parameters()}, worker.trainable(model)
    _, losses = trained(model, tmp_path, dataset(column), max_steps=50)
    assert fell(losses)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in learned), name


def test_balance_term_in_an_accumulated_step(tmp_path):
    """Its weight is that of the examples: half of them twice is what all of them once are."""
    steps, half = {}, dataset().select([0, 1, 2, 3])
    for accumulate, data in ((1, half), (2, datasets.concatenate_datasets([half, half]))):
        model = z_gated(balance=0.5)
        torch.nn.init.normal_(model.ilora_gate.weight, std=2.0)
        options = {"gradient_accumulation_steps": accumulate, "train_sampling_strategy": "sequential"}
        losses = trained(model, tmp_path, data, max_steps=1, optim="sgd", **options)[1]
        steps[accumulate] = losses[0], worker.trainable(model)
    assert steps[1][0] > trained(z_gated(), tmp_path, half, max_steps=1)[1][0] + 0.03
    assert steps[2][0] == pytest.approx(steps[1][0], abs=1e-5)
    assert_same(steps[1][1], steps[2][1], 1e-6)


def test_gradient_accumulation_equals_the_big_batch(tmp_path):
    states = []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        model = z_gated()
        options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 4, "gradient_accumulation_steps": accumulate}
        trained(model, tmp_path, per_device_train_batch_size=batch, **options)
        states.append(worker.trainable(model))
    assert_same(states[0], states[1], 1e-6)
    assert_same(states[0], states[2], 1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_equals_none(tmp_path, reentrant):
    states = []
    for options in (
        {},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}},
    ):
        config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=0.1)
        model = z_gated(config, kind="noisy")
        trained(model, tmp_path, optim="sgd", learning_rate=0.5, max_steps=4, **options)
        states.append(worker.trainable(model))
    assert_same(*states, 1e-6)


def test_killed_run_resumes_and_ends_bit_equal(tmp_path):
    whole = worker.run(tmp_path / "whole")
    folder = tmp_path / "killed"
    command = [sys.executable, worker.__file__, str(folder), "5"]
    killed = subprocess.run(command, cwd=Path(ilora.__file__).parents[1], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-3"]
    assert_same(worker.run(folder, resume=True), whole)


def test_load_best_model_at_end(tmp_path):
    scores, states = iter([0.2, 0.9, 0.1]), []
    model = z_gated()

    def compute_metrics(_):
        states.append(worker.trainable(model))
        return {"score": next(scores)}

    best = {"metric_for_best_model": "score", "load_best_model_at_end": True}
    often = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    args = worker.arguments(tmp_path, **best, **often)
    data = {"train_dataset": dataset(), "eval_dataset": dataset().select(range(4))}
    hf.Trainer(model, args, **data, compute_metrics=compute_metrics).train()
    assert_same(worker.trainable(model), states[1])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[1])


def test_bf16_autocast(tmp_path):
    model = z_gated()
    _, losses = trained(model, tmp_path, max_steps=30, bf16=True)
    assert fell(losses)
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


def batch(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def test_fp16_autocast_with_a_scaler():
    model, scaler = z_gated().train(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
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
    from accelerate import Accelerator

    states = []
    for accumulate in (1, 2):
        accelerator = Accelerator(gradient_accumulation_steps=accumulate, cpu=True)
        model = z_gated().train()
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
    model = z_gated()
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(**batch(worker.examples(2)))
