"""PromptGate and answers: what it may read where labels are missing, or are no continuation of the input."""

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402


def llama():
    return ilora.inject(worker.tiny_llama(), ilora.ILoRAConfig(r=8, num_experts=4), gate=ilora.PromptGate(4))


def examples():
    """One prompt, two answers."""
    for answer in (7, 50):
        ids = [3, 4, 5, 6, answer, answer + 1]
        yield {"input_ids": ids, "labels": [-100] * 4 + ids[4:], "attention_mask": [1] * 6}


def test_a_training_forward_without_labels_is_refused():
    model, ids = llama(), torch.arange(3, 11)[None]
    with pytest.raises(ValueError, match="without labels would show it the answer"):
        model(ids)
    mask = torch.arange(8)[None] < 4
    model(ids, ilora_prompt_mask=mask).logits.sum().backward()
    model(ids, ilora_gate=torch.full((1, 4), 0.25)).logits.sum().backward()
    with torch.no_grad():
        model(ids)
    model.eval()(ids)


def test_label_smoothing_sees_the_prompt_alone_with_a_mask(tmp_path):
    model, gates = llama(), []
    model.register_forward_hook(lambda *_: gates.append(ilora.last_gate(model)))
    options = {"max_steps": 2, "per_device_train_batch_size": 1, "label_smoothing_factor": 0.1, "learning_rate": 1e-9}
    args = worker.arguments(tmp_path, **options)
    with pytest.raises(ValueError, match="without labels"):
        hf.Trainer(model, args, train_dataset=list(examples())).train()
    collator = ilora.GateCollator(hf.default_data_collator, prompt_mask=True)
    hf.Trainer(model, args, train_dataset=list(examples()), data_collator=collator).train()
    torch.testing.assert_close(gates[-2], gates[-1])


def test_the_mask_is_that_of_the_labels():
    collator = ilora.GateCollator(hf.default_data_collator, prompt_mask=True)
    assert collator(list(examples()))["ilora_prompt_mask"].tolist() == [[True] * 4 + [False] * 2] * 2
    with pytest.raises(ValueError, match="makes no labels"):
        collator([{"input_ids": [3, 4]}])


@pytest.mark.parametrize("kind", [hf.BertForTokenClassification, hf.BertForMaskedLM])
def test_labels_of_tokens_hide_nothing(kind):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = kind(hf.BertConfig(**sizes, vocab_size=61, num_labels=3))
    model = ilora.inject(model, ilora.ILoRAConfig(r=8, num_experts=4), gate=ilora.PromptGate(4)).eval()
    for layer in ilora.ilora_layers(model).values():
        layer.lora_B.data.normal_()
    ids, labels = torch.arange(3, 13)[None], torch.ones(1, 10, dtype=torch.long)
    torch.testing.assert_close(model(ids, labels=labels).logits, model(ids).logits)
    model.train()(ids).logits.sum().backward()
