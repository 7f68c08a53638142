"""A run of transformers' Trainer that can be killed and resumed: python training_worker.py FOLDER KILL_AT."""

import os
import signal
import sys

import torch
import transformers as hf

import ilora


def tiny_llama(seed=0, layers=2):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    # Weights large enough that logits, and so the loss, have somewhere to go.
    config = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=61, initializer_range=0.1, pad_token_id=0)
    return hf.LlamaForCausalLM(config)


def examples(n=16, length=8, seed=0):
    """Token sequences to learn by heart, each with a z of its own."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 61, (n, length), generator=generator).tolist()
    z = torch.randn(n, 6, generator=generator).tolist()
    return [{"input_ids": i, "labels": i, "ilora_z": row} for i, row in zip(ids, z, strict=True)]


def arguments(folder, **options):
    defaults = {"use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2}
    defaults |= {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "disable_tqdm": True,
        "lr_scheduler_type": "constant",
    }
    return hf.TrainingArguments(str(folder), **(defaults | options))


def trainable(model):
    """Copies of the trained parameters."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


class KillAt(hf.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder, kill_at=None, resume=False):
    """The trained parameters after 8 steps with dropout and a noisy gate, a checkpoint after every 3."""
    from datasets import Dataset

    model = tiny_llama()
    torch.manual_seed(99 if resume else 1)  # what is resumed must come from the checkpoint
    gate = ilora.SequenceGate(6, 4, kind="noisy", dropout=0.1)
    ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=0.1), gate=gate)
    args = arguments(folder, save_strategy="steps", save_steps=3, lr_scheduler_type="cosine")
    callbacks = [] if kill_at is None else [KillAt(kill_at)]
    trainer = hf.Trainer(model, args, train_dataset=Dataset.from_list(examples()), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainable(model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(sys.argv[1], int(sys.argv[2]))
