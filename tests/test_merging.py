"""A merge that fails leaves the model as it was; one that is final needs no more memory than a layer's."""

import weakref

import pytest
import torch
from saved_cases import adapted, assert_untouched, bits, llama, logits
from torch import nn
from torch.nn.utils import parametrizations, prune

import ilora

GATE = torch.tensor([0.4, 0.3, 0.2, 0.1])
COMPUTED = {
    "parametrised": parametrizations.weight_norm,
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


def blocks(n=3, wrap=lambda layer: layer):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(n - 1)), wrap(nn.Linear(8, 8))).eval()


@pytest.mark.parametrize("kind", COMPUTED)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_is_computed_is_refused_before_anything_is_merged(kind):
    model, x = adapted(blocks(wrap=COMPUTED[kind])), torch.randn(2, 8)
    other = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    before, want = bits(model), model(x, ilora_gate=other)
    with pytest.raises(ValueError, match=r"merge: the weight of 2 is no parameter but computed"):
        ilora.merge(model, GATE)
    assert_untouched(model, before)
    assert torch.equal(model(x, ilora_gate=other), want)
    ilora.eject(model)(x)


def test_out_of_memory_midway_is_undone(monkeypatch):
    model, x, merged = adapted(blocks()), torch.randn(2, 8), []

    def fails(*args):
        merged.append(args)
        if len(merged) == 3:
            raise RuntimeError("out of memory")
        return real(*args)

    real = ilora.adapter.merging._merged_weight
    before, want = bits(model), model(x, ilora_gate=GATE[None])
    with monkeypatch.context() as patch:
        patch.setattr(ilora.adapter.merging, "_merged_weight", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            ilora.merge(model, GATE)
    assert_untouched(model, before)
    assert torch.equal(model(x, ilora_gate=GATE[None]), want)
    torch.testing.assert_close(ilora.merge(model, GATE)(x), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keep", [("lm_head",), ("norm",)])
def test_after_a_final_merge_eject_leaves_what_was_trained_whole(tmp_path, keep):
    model = llama()
    model.tie_weights()
    model.lm_head.weight.requires_grad_(False)
    adapted(model, modules_to_save=keep)
    want = logits(model, ilora_gate=GATE[None])
    ilora.eject(ilora.merge(model, GATE, keep_base=False))
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)
    assert [key for key, p in model.named_parameters() if not p.requires_grad] == ["lm_head.weight"]
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(again), want, rtol=1e-5, atol=1e-5)


def test_a_final_merge_of_a_tied_head_stays_untied(tmp_path):
    config = llama().config
    config.tie_word_embeddings = True
    model = adapted(type(llama())(config).eval(), target_modules=("q_proj", "lm_head"))
    want = logits(model, ilora_gate=GATE[None])
    model.tie_weights()  # leaves the adapted head alone
    assert torch.equal(logits(model, ilora_gate=GATE[None]), want)
    ilora.eject(ilora.merge(model, GATE, keep_base=False))
    model.tie_weights(recompute_mapping=False)
    torch.testing.assert_close(logits(model), want, rtol=1e-5, atol=1e-5)


def test_a_final_merge_replaces_weights_one_after_another(monkeypatch):
    model, alive = adapted(blocks(6)), []
    before = [weakref.ref(layer.base_layer.weight) for layer in model]

    def counts(*args):
        alive.append(sum(reference() is not None for reference in before))
        return real(*args)

    real = ilora.adapter.merging._merged_weight
    monkeypatch.setattr(ilora.adapter.merging, "_merged_weight", counts)
    ilora.merge(model, GATE, keep_base=False)
    assert alive == [6, 5, 4, 3, 2, 1]
