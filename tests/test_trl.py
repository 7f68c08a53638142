"""TRL's SFTTrainer on an injected model: prompts without columns, columns, packing, resuming."""

import copy
from functools import partial

import pytest
import torch

import ilora

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402
from training_worker import fell, losses  # noqa: E402

PACKED = {"padding-free": {"padding_free": True, "max_length": None}, "packing": {"packing": True, "max_length": 32}}


def tokenizer():
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(58))])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return hf.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def conversations(z=False):
    """16 prompts of 3 to 6 words with completions of 2 to 4."""
    generator = torch.Generator().manual_seed(0)

    def words(n):
        return " ".join(f"w{i}" for i in torch.randint(0, 58, (n,), generator=generator).tolist())

    rows = [{"prompt": words(3 + i % 4), "completion": " " + words(2 + i % 3)} for i in range(16)]
    if z:
        rows = [row | {"ilora_z": torch.randn(6, generator=generator).tolist()} for row in rows]
    return datasets.Dataset.from_list(rows)


def sft(model, folder, data=None, collator=False, **options):
    args = worker.arguments(folder, trl.SFTConfig, **{"bf16": False, **options})
    data = conversations() if data is None else data
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    if collator:
        trainer.data_collator = ilora.GateCollator(trainer.data_collator)
    return trainer


@pytest.mark.parametrize("packed", [{}, *PACKED.values()], ids=["padded", *PACKED])
def test_prompt_gate_needs_no_columns(tmp_path, packed):
    model = worker.injected(ilora.PromptGate)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = sft(model, tmp_path, collator=bool(packed), max_steps=30, **packed)
    trainer.train()
    assert fell(losses(trainer), to=0.8)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_the_gate_reads_the_prompt_only(tmp_path):
    model = worker.injected(ilora.PromptGate)
    batch = next(iter(sft(model, tmp_path).get_train_dataloader()))
    assert (batch["labels"] == -100).any(1).all()
    other = torch.where(batch["labels"] != -100, 5, batch["input_ids"])  # other answers, the same prompts
    model.eval()
    model(**batch, fused_lm_head=True)
    gate = model.ilora.state.last
    model(**(batch | {"input_ids": other}), fused_lm_head=True)
    assert torch.equal(model.ilora.state.last, gate)


@pytest.mark.parametrize(
    ("gate", "options", "error", "words"),
    [
        (ilora.PromptGate, PACKED["padding-free"], ValueError, "ilora_segments"),
        (ilora.PromptGate, PACKED["packing"], ValueError, "ilora_segments"),
        ("z", {"data": conversations(z=True)}, ValueError, "needs ilora_z"),  # TRL drops the column
        (partial(ilora.PromptGate, balance=0.1), {}, RuntimeError, "balance"),  # TRL computes the loss
    ],
)
def test_what_trl_leaves_out_is_refused(tmp_path, gate, options, error, words):
    with pytest.raises(error, match=words):
        sft(worker.injected(gate), tmp_path, **options).train()


@pytest.mark.parametrize("gate", [ilora.PromptGate, "z"])
def test_padding_free_equals_padded_and_columns_reach_the_gate(tmp_path, gate):
    results = []
    for packed in ({}, {"padding_free": True}):
        model = worker.injected(gate)
        fresh = model.ilora_gate.weight.clone()
        options = {"remove_unused_columns": False, "max_length": None, "optim": "sgd", "max_steps": 3}
        trainer = sft(model, tmp_path, conversations(z=gate == "z"), collator=True, **options, **packed)
        trainer.train()
        assert not torch.equal(model.ilora_gate.weight, fresh)
        results.append((losses(trainer), worker.trainable(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    worker.assert_same(results[0][1], results[1][1], 1e-5)


def test_resumes_bit_equal(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    states = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = worker.injected(ilora.PromptGate, kind="noisy", lora_dropout=0.1)
        sft(model, tmp_path, **options).train(resume_from_checkpoint=checkpoint)
        states.append(worker.trainable(model))
    worker.assert_same(*states)


def test_qlora(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    worker.tiny_llama().save_pretrained(tmp_path / "base")
    compute = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    kind = hf.BitsAndBytesConfig(load_in_4bit=True, **compute)
    options = {"quantization_config": kind, "device_map": {"": "cpu"}, "dtype": torch.bfloat16}
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base", **options)
    ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=4), gate=ilora.PromptGate(4))
    trainer = sft(model, tmp_path, max_steps=20, bf16=True)
    trainer.train()
    assert fell(losses(trainer), to=0.8)


def dpo(model, folder, ref_model=None, **options):
    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 9} w{i + 4}"} for i in range(16)]
    data = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer()}
    args = worker.arguments(folder, trl.DPOConfig, bf16=False, max_steps=10, **options)
    trainer = trl.DPOTrainer(model, ref_model=ref_model, args=args, **data)
    trainer.train()
    return trainer


def test_preferences_with_the_weights_of_one_model(tmp_path):
    """DPO: chosen and rejected answers follow each other in a batch, and so do their gates. The reference is the frozen
    model, which shares its weights with the trained one, or is asked before training."""
    want = losses(dpo(worker.injected(ilora.PromptGate), tmp_path, ref_model=worker.tiny_llama()))
    assert want[-1] < 0.9 * want[0]
    model = worker.tiny_llama()
    reference = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    torch.manual_seed(1)
    ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=4), gate=ilora.PromptGate())
    assert {id(p) for p in reference.parameters()} < {id(p) for p in model.parameters()}
    assert losses(dpo(model, tmp_path, ref_model=reference)) == want
    torch.testing.assert_close(reference.state_dict(), worker.tiny_llama().state_dict(), atol=0, rtol=0)
    before = losses(dpo(worker.injected(ilora.PromptGate), tmp_path, precompute_ref_log_probs=True))
    assert before == pytest.approx(want, abs=1e-5)


def grpo(model, folder, beta, **options):
    data = {"train_dataset": conversations().remove_columns("completion"), "processing_class": tokenizer()}
    sizes = {"num_generations": 4, "max_completion_length": 4, "max_steps": 6, "bf16": False, "beta": beta}
    args = worker.arguments(folder, trl.GRPOConfig, **sizes, **options)
    return trl.GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [len(set(c)) for c in completions], args=args, **data
    )


def test_rewards_with_the_weights_of_one_model(tmp_path):
    """GRPO loads a second model where beta is not 0, unless it is set afterwards: then it asks the model for
    `disable_adapter`."""
    worker.tiny_llama().save_pretrained(tmp_path / "base")
    model = worker.injected(ilora.PromptGate)
    model.config._name_or_path = str(tmp_path / "base")
    two = grpo(model, tmp_path, beta=0.5)
    assert two.ref_model is not None
    two.train()
    one = grpo(worker.injected(ilora.PromptGate), tmp_path, beta=0.0)
    one.beta, one.model.peft_config = 0.5, {}
    one.train()
    assert one.ref_model is None
    kl = [[step["kl"] for step in trainer.state.log_history if "kl" in step] for trainer in (one, two)]
    assert kl[0][0] == 0
    assert kl[0][-1] > 0
    assert kl[0] == pytest.approx(kl[1], rel=1e-4, abs=1e-6)
    assert losses(one) == pytest.approx(losses(two), rel=1e-4, abs=1e-6)
