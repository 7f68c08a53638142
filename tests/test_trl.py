"""TRL's SFTTrainer on an injected model: prompts without columns, columns, packing, resuming."""

import pytest
import torch

import ilora

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")
tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402

SPECIAL = ["<pad>", "<eos>", "<unk>"]


def tokenizer():
    words = {word: i for i, word in enumerate(SPECIAL + [f"w{i}" for i in range(58)])}
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


def injected(gate=ilora.PromptGate, **options):
    model = worker.tiny_llama()
    torch.manual_seed(1)
    config = ilora.ILoRAConfig(r=8, num_experts=4, lora_dropout=options.pop("lora_dropout", 0.0))
    return ilora.inject(model, config, gate=gate(**options))


def sft(model, folder, data=None, collator=False, **options):
    defaults = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1}
    defaults |= {"per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "disable_tqdm": True}
    args = trl.SFTConfig(str(folder), **(defaults | options))
    data = conversations() if data is None else data
    trainer = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer())
    if collator:
        trainer.data_collator = ilora.GateCollator(trainer.data_collator)
    return trainer


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def assert_changed(model, before):
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


PACKED = [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 32}]


@pytest.mark.parametrize("packed", [{}, *PACKED], ids=["padded", "padding-free", "packing"])
def test_prompt_gate_needs_no_columns(tmp_path, packed):
    model = injected()
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer = sft(model, tmp_path, collator=bool(packed), max_steps=30, **packed)
    trainer.train()
    fell = losses(trainer)
    assert sum(fell[-4:]) / 4 < 0.8 * fell[0]
    assert_changed(model, before)


def test_the_gate_reads_the_prompt_only(tmp_path):
    model = injected()
    trainer = sft(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["labels"] == -100).any(1).all()
    other = torch.where(batch["labels"] != -100, 5, batch["input_ids"])  # other answers, the same prompts
    model.eval()
    model(**batch, fused_lm_head=True)
    gate = model.ilora.state.last
    model(**(batch | {"input_ids": other}), fused_lm_head=True)
    assert torch.equal(model.ilora.state.last, gate)


@pytest.mark.parametrize("packed", PACKED, ids=["padding-free", "packing"])
def test_packed_without_segments_is_refused(tmp_path, packed):
    with pytest.raises(ValueError, match="ilora_segments"):
        sft(injected(), tmp_path, **packed).train()


@pytest.mark.parametrize("gate", [{}, {"gate": ilora.SequenceGate, "z_dim": 6}], ids=["prompt", "z"])
def test_padding_free_equals_padded(tmp_path, gate):
    results = []
    for packed in ({}, {"padding_free": True}):
        model = injected(**gate)
        data = conversations(z=bool(gate))
        options = {"remove_unused_columns": False, "max_length": None, "optim": "sgd", "max_steps": 3}
        trainer = sft(model, tmp_path, data, collator=True, **options, **packed)
        trainer.train()
        results.append((losses(trainer), worker.trainable(model)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    for name, value in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], value, rtol=1e-5, atol=1e-5)


def test_columns_reach_the_gate(tmp_path):
    model = injected(ilora.SequenceGate, z_dim=6)
    gate = model.ilora_gate.weight.clone()
    trainer = sft(model, tmp_path, conversations(z=True), collator=True, remove_unused_columns=False)
    trainer.train()
    assert not torch.equal(model.ilora_gate.weight, gate)
    with pytest.raises(ValueError, match="needs ilora_z"):  # without the collator TRL drops the column
        sft(injected(ilora.SequenceGate, z_dim=6), tmp_path, conversations(z=True)).train()


def test_resumes_bit_equal(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "cosine"}
    states = []
    for resume in (False, True):
        model = injected(kind="noisy", lora_dropout=0.1)
        folder = tmp_path / "run"
        trainer = sft(model, folder, **options)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
        states.append(worker.trainable(model))
    assert all(torch.equal(states[1][name], value) for name, value in states[0].items())


def test_balance_is_refused_where_trl_computes_the_loss(tmp_path):
    with pytest.raises(RuntimeError, match="balance"):
        sft(injected(balance=0.1), tmp_path).train()


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
    assert sum(losses(trainer)[-4:]) / 4 < 0.8 * losses(trainer)[0]


def test_preferences(tmp_path):
    """DPO: chosen and rejected answers follow each other in a batch, and so do their gates."""
    rows = [{"prompt": f"w{i} w{i + 1}", "chosen": f" w{i + 2}", "rejected": f" w{i + 9} w{i + 4}"} for i in range(16)]
    options = {"use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1}
    options |= {"max_steps": 10, "learning_rate": 1e-2, "disable_tqdm": True}
    data = {"train_dataset": datasets.Dataset.from_list(rows), "processing_class": tokenizer()}
    args = trl.DPOConfig(str(tmp_path), **options)
    trainer = trl.DPOTrainer(injected(), ref_model=worker.tiny_llama(), args=args, **data)
    trainer.train()
    assert losses(trainer)[-1] < 0.9 * losses(trainer)[0]
