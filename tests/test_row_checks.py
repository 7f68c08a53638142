"""Rows that could not be told their instance though their number fits, and rows that could."""

import pytest
import torch

import ilora

pytest.importorskip("transformers", reason="transformers is not installed")

import training_worker as worker  # noqa: E402
import transformers as hf  # noqa: E402


def adapted(model):
    model = ilora.inject(model.eval(), ilora.ILoRAConfig(r=8, num_experts=4))
    torch.manual_seed(0)
    for layer in ilora.ilora_layers(model).values():
        layer.lora_B.data.normal_()
    return model


class Guided(hf.LogitsProcessor):
    """As models do that run each prompt a second time, without its words, behind all of the prompts."""

    def __init__(self, model):
        self.model = model

    def __call__(self, input_ids, scores):
        self.model(torch.cat([input_ids, input_ids]))
        return scores


def test_guidance_behind_the_batch_is_refused():
    model, ids = adapted(worker.tiny_llama()), torch.arange(3, 13).reshape(2, 5)
    settings = {"max_new_tokens": 2, "do_sample": False, "logits_processor": hf.LogitsProcessorList([Guided(model)])}
    with pytest.raises(ValueError, match="generate runs 4 rows for 2 prompts"):
        model.generate(ids, ilora_gate=torch.eye(4)[:2], **settings)
    model.generate(ids, ilora_gate=torch.eye(4)[:1], **settings)  # one gate is everybody's
    plain = model.generate(ids, ilora_gate=torch.eye(4)[:2], max_new_tokens=3, num_beams=3, num_return_sequences=2)
    assert len(plain) == 4
    assert model.ilora.state.copies == 1


@pytest.mark.parametrize(
    ("kind", "head"),
    [(hf.LlamaForSequenceClassification, "score"), (hf.LlamaForTokenClassification, "score"),
     (hf.LlamaForQuestionAnswering, "qa_outputs")],
)  # fmt: skip
def test_the_head_of_a_classifier_is_trained_and_saved(kind, head, tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = worker.tiny_llama(layers=1).model.state_dict()

    def load(seed):  # as from_pretrained: the head is drawn anew each time
        torch.manual_seed(seed)
        model = kind(hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=61, num_labels=3, pad_token_id=0))
        inner = model.model if hasattr(model, "model") else model.transformer
        inner.load_state_dict(base)
        return model.eval()

    model, ids, gate = adapted(load(1)), torch.arange(3, 13)[None], torch.eye(4)[:1]
    assert model.ilora.config.modules_to_save == (head,)
    assert head not in ilora.targets(model)
    assert any(p.requires_grad for p in model.get_submodule(head).parameters())
    ilora.save_adapter(model, tmp_path / "adapter")
    again = ilora.load_adapter(load(2), tmp_path / "adapter")
    key = "start_logits" if head == "qa_outputs" else "logits"
    assert torch.equal(again(ids, ilora_gate=gate)[key], model(ids, ilora_gate=gate)[key])
    with pytest.raises(ValueError, match="no module"):
        ilora.inject(load(1), ilora.ILoRAConfig(modules_to_save=["head"]))
