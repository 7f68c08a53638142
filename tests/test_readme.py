"""What the README shows is true: its table comes from the results, its code runs."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import injected, llama, prompts
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
    y = ilora.ilora_linear(x, weight, bias, A, B, gate, scaling)
    torch.testing.assert_close(scope["y"], y, rtol=1e-4, atol=1e-4)


def test_the_examples_run(tmp_path):
    scope: dict = {}
    (layer,) = (block for block in BLOCKS if "Linear(576, 1536)" in block)
    exec(layer, scope)
    assert scope["y"].shape == (8, 256, 1536)

    model = injected(llama).train()
    ilora.eject(model)
    ids, mask = prompts((5, 5))
    scope |= {"model": model, "batch": {"input_ids": ids, "attention_mask": mask, "labels": ids}, "folder": tmp_path}
    (whole,) = (block for block in BLOCKS if "ilora.inject" in block)
    exec(whole, scope)
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in ilora.ilora_layers(model).values())
    assert (tmp_path / "ilora_config.json").exists()


def test_the_files_it_names_exist():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_how_tos_run(capsys):
    for package in ("transformers", "peft", "accelerate", "bitsandbytes"):
        pytest.importorskip(package)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "how-to.md").read_text(), re.DOTALL)
    assert len(blocks) > 10
    scope: dict = {"__name__": "how-to"}
    for block in blocks:
        exec(compile(block, block.splitlines()[0], "exec"), scope)
    shown = capsys.readouterr().out
    assert "tensor([ 0, 12, 17, 24], dtype=torch.int32)" in shown
    assert "give ilora_segments" in shown
    assert "('default', 'other')" in shown
