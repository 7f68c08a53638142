"""The experts of sparse mixtures: which stay frozen is said, and the others are adapted."""

import re
import warnings

import pytest
import torch
from models import MAKE, llama, mixtral

import ilora
from ilora import ILoRAConfig

ATTENTION = ILoRAConfig(target_modules=["q_proj"])


class OlderMixture(torch.nn.Module):
    """Experts as modules of their own."""

    def __init__(self):
        super().__init__()
        self.q_proj = torch.nn.Linear(10, 10, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(10, 15, bias=False) for _ in range(2))


def test_experts_that_stay_frozen_are_said_with_their_share():
    with pytest.warns(UserWarning, match=r"experts, 71% of the weights, stay frozen: experts; exclude") as caught:
        model = ilora.inject(OlderMixture(), ILoRAConfig(r=1, num_experts=1, target_modules=["q_proj"]))
    assert len(caught) == 1  # 300 of 100 + 300 and the adapter's 20
    assert caught[0].filename == __file__
    assert isinstance(model.q_proj, ilora.ILoRALinear)


def test_the_share_is_that_of_the_model(capsys):
    with pytest.warns(UserWarning, match=r"stay frozen: model\.layers\.0\.mlp\.experts and 1 more") as caught:
        model = ilora.inject(mixtral(), ATTENTION)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    assert f"{experts / total:.0%} of the weights" in str(caught[0].message)
    ilora.print_trainable_parameters(model)
    printed = capsys.readouterr().out
    assert f"|| experts without an update: {experts:,} ({experts / total:.0%} of all)" in printed
    assert printed.count("\n") == 1


def test_what_is_excluded_by_name_is_not_said_again(capsys):
    config = ILoRAConfig(target_modules=["q_proj"], exclude_modules=["experts"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ilora.inject(mixtral(), config)
        ilora.print_trainable_parameters(ilora.inject(llama(), ATTENTION))
    assert "experts" not in capsys.readouterr().out  # a dense model has none
    ilora.print_trainable_parameters(model)
    assert "experts without an update" in capsys.readouterr().out  # the line still tells


def test_an_added_adapter_says_it_too():
    model = ilora.inject(mixtral(), ILoRAConfig(target_modules=["q_proj"], exclude_modules=["experts"]))
    with pytest.warns(UserWarning, match="stay frozen"):
        ilora.add_adapter(model, "second", ATTENTION)


def test_shared_experts_are_layers_like_others():
    """DeepSeek's shared experts are a dense block: not counted, and adapted."""
    with pytest.warns(UserWarning, match="stay frozen") as caught:
        model = ilora.inject(MAKE["deepseek_v3"](), ILoRAConfig(target_modules=["q_a_proj"]))
    routed = sum(p.numel() for name, p in model.named_parameters() if re.search(r"\.experts\.", name))
    assert f"{routed / sum(p.numel() for p in model.parameters()):.0%} of" in str(caught[0].message)


def test_experts_trained_whole_are_not_frozen():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ilora.inject(mixtral(), ILoRAConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
