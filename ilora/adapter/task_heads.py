"""Finds the modules to train whole: those that a config names, and the head of a task class of transformers, which no
checkpoint of the pretrained model has and which is random at every loading."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from ..base_layers import offloading_to
from .config import ALL_LINEAR, ILoRAConfig
from .modules import embeddings
from .targets import index_of, named, one_by_one

# In the names of task classes. Language models are not among them: their heads are in the checkpoint.
_TASKS = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|SemanticSegmentation|ObjectDetection|DepthEstimation|CTC"
    r"|XVector|Regression)"
)
_HEADS = re.compile(r"(classifier|score|qa_outputs)$")  # which PEFT trains whole, new or not


def with_heads(model: nn.Module, config: ILoRAConfig) -> ILoRAConfig:
    """The config with the task's heads among its modules_to_save, as PEFT does it, without those that exclude_modules
    names and those that target_modules names by themselves, which are adapted."""
    heads = [path for path in task_heads(model) if not named(path, config.exclude_modules)]
    bare = [name for name, parameter in model.named_parameters(recurse=False) if not _has_mark(parameter)]
    if heads and bare:
        warnings.warn(
            f"{type(model).__name__}: {', '.join(bare)} stays frozen and is not saved, being in no module that could "
            "be trained whole; if no checkpoint has it, another loading gives other values",
            stacklevel=4,
        )
    new = [path for path in heads if not named(path, config.modules_to_save) and not _targeted(model, config, path)]
    others = [path for path, _ in model.named_modules()]
    pinned = ["^" + path if any(other.endswith("." + path) for other in others) else path for path in new]
    return replace(config, modules_to_save=(*config.modules_to_save, *pinned)) if new else config


def task_heads(model: nn.Module) -> list[str]:
    """The paths of what a task class of transformers has that the pretrained model's checkpoint had not. What is around
    the pretrained model and has the usual name of a head counts in any case; a larger one, such as a segmentation's
    decoder, only if it was not loaded. Empty for any other class."""
    prefix = getattr(model, "base_model_prefix", None)
    if prefix is None or not _TASKS.search(type(model).__name__):
        return []
    pretrained, around = [], {}
    for name, child in model.named_children():
        if name == prefix or any(hasattr(part, "base_model_prefix") for part in child.modules()):
            pretrained.append(child)
        else:
            around[name] = child
    known = {id(parameter) for child in pretrained for parameter in child.parameters()}  # shared embeddings too
    heads = [
        name
        for name, child in around.items()
        if not all(id(parameter) in known for parameter in child.parameters())
        and (_HEADS.search(name) or not all(map(_has_mark, child.parameters())))
    ]
    return outermost([*(heads if pretrained else ()), *_not_loaded(model)])


def modules_to_save(model: nn.Module, config: ILoRAConfig, targets: list[str]) -> list[str]:
    """The paths of the modules that modules_to_save names, without those inside of others; a module that stands in two
    places has both. Raises ValueError for a name that is not there, and for what cannot be trained or is adapted."""
    modules = [(path, module) for path, module in model.named_modules(remove_duplicate=False) if path]
    for wanted in config.modules_to_save:
        if not any(named(path, (wanted,)) for path, _ in modules):
            raise ValueError(f"modules_to_save: no module of {type(model).__name__} is called {wanted!r}")
    meant = {id(module) for path, module in modules if named(path, config.modules_to_save)}
    paths = outermost(path for path, module in modules if id(module) in meant)
    for path in paths:
        module = model.get_submodule(path)
        if any(map(offloading_to, module.modules())):
            raise ValueError(f"modules_to_save: {path} is offloaded by its device map, it cannot be trained whole")
        for name, parameter in module.named_parameters():
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise ValueError(
                    f"modules_to_save: {path} has a quantised {name} ({parameter.dtype}), which cannot be trained; "
                    "load the model with this module left as it is (llm_int8_skip_modules of BitsAndBytesConfig), or "
                    "name it in exclude_modules"
                )
        for target in targets:
            if f"{target}.".startswith(f"{path}.") or f"{path}.".startswith(f"{target}."):
                raise ValueError(f"modules_to_save: {path} is adapted as well, as {target}; exclude one of them")
    return paths


def outermost(paths: Iterable[str]) -> list[str]:
    """The paths that are not inside another of them."""
    found = list(dict.fromkeys(paths))
    return [path for path in found if not any(path.startswith(outer + ".") for outer in found)]


def _has_mark(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)  # transformers' mark on what it has read from a file


def _not_loaded(model: nn.Module) -> list[str]:
    """The paths of the modules of which no parameter came from the checkpoint. Empty for a model that was not loaded.

    A parameter has no mark if it has replaced a loaded one (dequantize, a merge by hand, a copied block, a smaller
    vocabulary). So the numbered blocks, the input embeddings and what is quantised or offloaded count as loaded.
    """
    if not any(map(_has_mark, model.parameters())):
        return []
    table = embeddings(model)
    loaded = set() if table is None else {id(parameter) for parameter in table.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and parameter.itemsize > 1
        if _has_mark(parameter) or index_of(name) is not None or not plain or parameter.is_meta:
            loaded.add(id(parameter))
    found = []
    for path, module in model.named_modules():
        parameters = list(map(id, module.parameters()))
        if path and parameters and loaded.isdisjoint(parameters):
            found.append(path)
    return found


def _targeted(model: nn.Module, config: ILoRAConfig, head: str) -> bool:
    """Whether target_modules names this head, or modules in it alone, by a name that no other module has."""
    if config.target_modules == ALL_LINEAR:
        return False
    paths = [path for path, _ in model.named_modules() if path]
    for name in one_by_one(config.target_modules):
        meant = [path for path in paths if named(path, name)]
        if head in meant or (meant and all(path.startswith(head + ".") for path in meant)):
            return True
    return False
