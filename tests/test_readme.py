"""What the README shows is true: its table comes from the results, its code runs."""

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from report import markdown

import ilora

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_tables_are_those_of_the_results():
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        assert markdown(json.loads(file.read_text())) in README, file.name


def test_the_equivalent_is_the_definition():
    M, N, d_in, d_out, R, E = 12, 3, 10, 7, 8, 4
    x, weight, bias = torch.randn(M, d_in), torch.randn(d_out, d_in), torch.randn(d_out)
    A, B, gate, scaling, dropout_p = torch.randn(R, d_in), torch.randn(d_out, R), torch.rand(N, E), 2.0, 0.0
    scope = dict(locals(), F=F, i=torch.arange(M) // (M // N))
    (equivalent,) = (block for block in BLOCKS if "repeat_interleave" in block)
    exec(equivalent, scope)
    torch.testing.assert_close(
        scope["y"], ilora.ilora_linear(x, weight, bias, A, B, gate, scaling), rtol=1e-4, atol=1e-4
    )


def test_the_examples_run():
    scope: dict = {}
    (layer,) = (block for block in BLOCKS if "lora_dropout=0.05" in block)
    exec(layer, scope)
    assert scope["y"].shape == (8, 256, 1536)

    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU(), torch.nn.Linear(6, 6))
    (whole,) = (block for block in BLOCKS if "set_submodule" in block)
    swap, use = whole.split("with ilora.gated")
    scope |= {"model": model}
    exec(swap, scope)
    assert [type(m).__name__ for m in model] == ["ILoRALinear", "ReLU", "ILoRALinear"]

    class WithLoss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return type("Output", (), {"loss": self.inner(x).square().mean()})

    scope |= {"model": WithLoss(), "batch": {"x": torch.randn(4, 6)}, "gate": torch.rand(2, 4)}
    exec("with ilora.gated" + use, scope)
    assert model[2].lora_B.grad.abs().sum() > 0


def test_the_files_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
