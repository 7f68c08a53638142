"""Other makes of models: fused projections, state spaces, images, sound; and layers that are read, not called."""

import pytest
import torch
import torch.nn.functional as F
from models import MAKE, MODELS, E, gates, injected
from torch import nn

import ilora

N = 3


def normal(*shape):
    return torch.randn(N, *shape, generator=torch.Generator().manual_seed(1))


IDS = torch.randint(3, 60, (N, 6), generator=torch.Generator().manual_seed(0))
INPUTS = {
    "vit": {"pixel_values": normal(3, 16, 16)},
    "whisper": {"input_features": normal(8, 20), "decoder_input_ids": IDS},
    "llava": {"input_ids": torch.cat([torch.full((N, 4), 60), IDS], 1), "pixel_values": normal(3, 16, 16)},
    "choices": {"input_ids": IDS.view(N, 2, 3)},  # rows belong to their instance
}


@pytest.mark.parametrize("name", [name for name in MAKE if name not in MODELS])
def test_each_instance_is_as_if_alone_and_every_layer_learns(name):
    model = injected(MAKE[name], exclude_modules=["dt_proj"] if name == "mamba" else [])
    gate, others, batch = gates(N), gates(N, seed=1), INPUTS.get(name, {"input_ids": IDS})
    logits = model(**batch, ilora_gate=gate).logits
    assert (logits - model(**batch, ilora_gate=others).logits).abs().max() > 1e-3
    for i in range(N):
        alone = model(**{key: value[i : i + 1] for key, value in batch.items()}, ilora_gate=gate[i : i + 1]).logits
        torch.testing.assert_close(alone, logits[i : i + 1], atol=1e-5, rtol=1e-5)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_a_state_space_reads_a_projection_which_is_refused_by_name():
    model, batch = ilora.inject(MAKE["mamba"](), ilora.ILoRAConfig(num_experts=E)), {"input_ids": IDS}
    with pytest.raises(RuntimeError, match=r"mixer\.dt_proj: the model reads.*exclude_modules=\['dt_proj'\]"):
        model(**batch, ilora_gate=gates(N))
    with ilora.disable_adapter(model):
        assert model(**batch).logits.isfinite().all()
    ilora.merge(model.eval(), gates(1)[0])  # what is read has the update in it then
    assert model(**batch).logits.isfinite().all()


class Reader(nn.Module):
    """how: "dtype" reads a weight's type before and after the call, "head" computes with it and does not call."""

    def __init__(self, how):
        super().__init__()
        self.how, self.first, self.head = how, nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x.to(self.first.weight.dtype))
        if self.how == "head":
            return F.linear(x, self.head.weight)
        return self.head(x).to(self.head.weight.dtype)


def test_only_weights_that_are_read_instead_of_called_are_refused():
    x, gate = torch.randn(4, 3, 6), torch.rand(4, 2)
    model = ilora.inject(Reader("dtype"), ilora.ILoRAConfig(r=4, num_experts=2))
    assert model(x, ilora_gate=gate).shape == (4, 3, 5)

    def refused():
        with pytest.raises(RuntimeError, match=r"^head: the model reads.*\(1 such\)"):
            model(x, ilora_gate=gate)

    for _ in range(2):
        model.how = "head"  # where it was called in the forward before, that does not count
        refused()
        refused()
        model.how = "dtype"
        assert model(x, ilora_gate=gate).isfinite().all()
    model.forward = lambda x, **kwargs: F.linear(model.first(x), model.head.weight)
    refused()
