"""A tiny model to train, in every way; and a run that can be killed."""

import os
import signal

import torch
import transformers as hf

import ilora


def tiny_llama(seed=0, layers=2):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    # Weights large enough that logits, and so the loss, have somewhere to go.
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=61, initializer_range=0.1, pad_token_id=0)
    return hf.LlamaForCausalLM(config)


def injected(gate=None, lora_dropout=0.0, seed=1, **options):
    """The tiny model with an adapter. gate: a class, or "z" for that of the examples' z; options: its arguments."""
    model = tiny_llama()
    torch.manual_seed(seed)
    if gate == "z":
        gate, options = ilora.SequenceGate, {"z_dim": 6, **options}
    config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=lora_dropout)
    return ilora.inject(model, config, gate=gate and gate(**options))


def examples(n=16, length=8, seed=0):
    """Token sequences to learn by heart, each with a z of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (n, length), generator=generator).tolist()
    z = torch.randn(n, 6, generator=generator).tolist()
    return [{"input_ids": i, "labels": i, "ilora_z": row} for i, row in zip(ids, z, strict=True)]


def dataset(column="ilora_z"):
    """The examples with this column of the gate's, or none."""
    from datasets import Dataset

    rows = examples()
    for i, row in enumerate(rows):
        z = row.pop("ilora_z")
        if column is not None:
            row[column] = z if column == "ilora_z" else [float(e == i % 4) for e in range(4)]
    return Dataset.from_list(rows)


def batch(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def arguments(folder, kind=hf.TrainingArguments, **options):
    defaults = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    defaults |= {"max_steps": 8, "per_device_train_batch_size": 4, "disable_tqdm": True}
    return kind(str(folder), **(defaults | {"lr_scheduler_type": "constant"} | options))


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def fell(losses, to=0.75):
    return sum(losses[-4:]) / 4 < to * losses[0]


def trained(model, folder, data=None, **options):
    """The losses of a run of transformers' Trainer."""
    trainer = hf.Trainer(model, arguments(folder, **options), train_dataset=dataset() if data is None else data)
    trainer.train()
    return losses(trainer)


def trainable(model):
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


class KillAt(hf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, kill_at=None, resume=False):
    """The trained parameters after 8 steps with dropout and a noisy gate, a checkpoint after every 3."""
    # what is resumed must come from the checkpoint
    model = injected("z", lora_dropout=0.1, seed=99 if resume else 1, kind="noisy", dropout=0.1)
    args = arguments(folder, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine")
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    trainer = hf.Trainer(model, args, train_dataset=dataset(), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainable(model)


def run_until_killed(folder, step):
    """In a process of its own, with one thread: a fork has none of its parent's others."""
    torch.set_num_threads(1)
    run(folder, kill_at=step)
