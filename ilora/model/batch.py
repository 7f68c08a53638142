"""Reads from a call's arguments how many sequences the batch holds, how long they are, and whose its images, sounds and
videos are."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..gates.media import Media, Medium

_TOKENS = ("input_ids", "decoder_input_ids")
_EMBEDDINGS = ("inputs_embeds", "decoder_inputs_embeds")
_WORDS = {*_TOKENS, *_EMBEDDINGS, "attention_mask", "position_ids", "labels", "past_key_values", "token_type_ids"}
_WORDS |= {"mm_token_type_ids", "decoder_attention_mask", "encoder_outputs", "encoder_hidden_states", "head_mask"}
_WORDS |= {"encoder_attention_mask", "mm_encoder_outputs", "cache_position", "rope_deltas", "cross_attention_mask"}
_WORDS |= {
    "cross_attention_states",
    "logits_to_keep",
    "qformer_input_ids",
    "qformer_attention_mask",
    "per_layer_inputs",
}
_KINDS = {"audio": r"audio|speech|sound|input_features|input_values|feature_attention", "video": "video"}
_KINDS |= {"image": r"image|pixel|vision|visual|spatial|aspect|tile|patch"}
_PLACEHOLDER = re.compile(
    r"(?:\w+_)?(image|video|audio|vision|img|speech|sound)_(?:prompt_|latent_)?(?:token|patch)_(?:id|index)"
)
_PROPORTIONAL = re.compile(r"_grid_thw$|second_per_grid")  # a layer's rows and the placeholders grow alike with these


class Inputs(NamedTuple):
    """values: the arguments by name. batch: the size of the first dimension. rows: the number of sequences, which is
    batch · choices for multiple choice [batch, choices, length]. lengths: how many rows a sequence may have in a
    layer's input. batch and rows are None where nothing tells them."""

    values: dict[str, Any]
    batch: int | None
    rows: int | None
    lengths: tuple[int, ...]


def read_inputs(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
    """What the arguments say. names: those of the forward's positional parameters."""
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    batch: int | None = None
    rows: int | None = None
    lengths: list[int] = []
    for name in _TOKENS + _EMBEDDINGS:
        tensor = values.get(name)
        if isinstance(tensor, Tensor):
            shape = tensor.shape if name in _TOKENS else tensor.shape[:-1]
            if rows is None:
                batch, rows = shape[0], math.prod(shape[:-1])
            lengths.append(shape[-1])
    labels = values.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 2:  # an encoder-decoder makes its decoder's input of them
        lengths.append(labels.shape[1])
    encoded = values.get("encoder_outputs")
    if encoded is not None:
        lengths.append(encoded[0].shape[-2])
    if rows is None:  # pixels, sounds, a module of another kind
        first = next((v for v in values.values() if isinstance(v, Tensor) and v.dim() >= 2), None)
        if first is not None:
            batch = rows = first.shape[0]
            lengths += first.shape[1:2]
    return Inputs(values, batch, rows, tuple(lengths))


def read_media(
    model: Any,
    inputs: Inputs,
    N: int,
    rows: Any = None,
    generating: bool = False,
    packed: bool = False,
    layers: Iterable[str] | None = None,
) -> Media | None:
    """Which of the N instances the images, sounds and videos of a call belong to; None where it has none, or the model
    no place for them in its text, and where no adapted layer sees them.

    rows: what the caller says, `ilora_media_rows`. generating: it is a step of generate, with rows of the prompts.
    packed: whether one row holds several instances. layers: the adapted ones' paths, None for the active adapter's.
    Raises ValueError, TypeError for rows that do not fit the media.
    """
    arguments = {
        name: value for name, value in inputs.values.items() if name not in _WORDS and _holds_media(name, value)
    }
    if not arguments and (rows is None or generating):
        return None
    config, state = getattr(model, "config", None), model.ilora.state
    placeholders, named = _placeholders(config), {} if rows is None else _named_rows(rows, arguments, N)
    if not placeholders and not named:
        return None
    if state.text_modules is None:
        state.text_modules = _text_modules(model)
    media = Media((), state.text_modules)
    if not any(map(media.sees, model.ilora.adapter.layers if layers is None else layers)):
        return None
    call = _Call(model, inputs, arguments, placeholders, N, state.copies if generating else 1, packed)
    found = (call.medium(name, named.get(name))._replace(row_counts=call.row_counts(name)) for name in arguments)
    return media._replace(arguments=tuple(found))


class _Call(NamedTuple):
    """What tells whose the media of a call are. arguments: those that hold media. placeholders: the ids that stand for
    them in the text, by kind. copies: how often generate has repeated each medium. The others as in `read_media`."""

    model: Any
    inputs: Inputs
    arguments: dict[str, Any]
    placeholders: dict[str, list[int]]
    N: int
    copies: int
    packed: bool

    def medium(self, name: str, rows: list[int] | None) -> Medium:
        """Whose the media of one argument are. rows: what the caller says."""
        value, kind = self.arguments[name], _kind(name)
        if torch.compiler.is_compiling():
            return Medium(name, problem="compiled code cannot look at the placeholders in input_ids")
        sizes, alike = self._sizes(name, kind), self._alike(kind)
        if rows is not None:
            rows = [row for row in rows for _ in range(self.copies)]
            proportional = alike and len(rows) == len(sizes)
            return _runs(name, rows, sizes if proportional else [1] * len(rows), exact=not proportional)
        ids = self.inputs.values.get("input_ids")
        if self.packed or ids is None or ids.is_floating_point():
            return Medium(name, problem="a row holds several sequences" if self.packed else "there are no input_ids")
        counts = self._placeholders_of_each_row(ids, kind)
        if not any(counts):
            return Medium(name, problem="input_ids show no placeholder of its kind")
        owners: list[int] | None = None
        exact = False
        if alike and self._padded(value, kind, len(counts)):
            real = (value != 0).flatten(2).any(-1).sum(1).tolist()
            sizes, exact = [1] * sum(real), sum(real) < value.shape[0] * value.shape[1]
        if alike:
            owners = _owners(counts, sizes)
        elif len(sizes) == len(counts) and all(counts):  # each row has one at least, so one
            owners, exact = list(range(len(counts))), True
        elif len(sizes) == sum(counts):  # a placeholder for each
            owners, exact = _owners(counts, [1] * len(sizes)), True
        if owners is None:
            return Medium(name, problem="the placeholders in input_ids do not tell how many each row has")
        each = len(counts) // self.N  # sequences of each instance
        return _runs(name, [row // each for row in owners], [1] * len(owners) if exact else sizes, exact)

    def _sizes(self, name: str, kind: str | None) -> list[int]:
        """How large the media are, relative to each other: the patches of their grids where there are any, else 1."""
        grid = self.inputs.values.get(f"{kind}_grid_thw")
        if isinstance(grid, Tensor) and "mask" not in name:
            return grid.prod(-1).tolist()
        return [1] * len(self.arguments[name])

    def row_counts(self, name: str) -> tuple[int, ...]:
        """Of a call with media of several kinds and grids: the rows of this kind, before and after patches merge."""
        grid = self.inputs.values.get(f"{_kind(name)}_grid_thw")
        merge = getattr(getattr(self.model.config, "vision_config", None), "spatial_merge_size", None)
        if len(self.arguments) == 1 or merge is None or not isinstance(grid, Tensor):
            return ()
        patches = int(grid.prod(-1).sum())
        return (patches, patches // merge**2)

    def _padded(self, value: Any, kind: str | None, rows: int) -> bool:
        """Whether they are [batch, images, ...], where images that are zero fill up and are left out by the model."""
        tensor = isinstance(value, Tensor) and value.dim() > 4 and len(value) == rows
        return tensor and kind != "video" and "image_sizes" not in self.inputs.values

    def _alike(self, kind: str | None) -> bool:
        """Whether nothing that goes with the media tells that they differ in size, but for grids."""
        for name, value in self.inputs.values.items():
            if name in _WORDS or _PROPORTIONAL.search(name) or _kind(name) not in (None, kind):
                continue
            if name in self.arguments and isinstance(value, Tensor):
                continue
            if isinstance(value, Tensor) and value.dim() and not (name == "pixel_attention_mask" and value.dim() == 4):
                if not bool((value == value[:1]).all()):
                    return False
            elif isinstance(value, (list, tuple)) and name in self.model._ilora_parameters:
                shapes = [each.shape if isinstance(each, Tensor) else each for each in value]
                if any(shape != shapes[0] for shape in shapes):
                    return False
        return True

    def _placeholders_of_each_row(self, ids: Tensor, kind: str | None) -> list[int]:
        def count(wanted: list[int]) -> list[int]:
            return torch.isin(ids, torch.tensor(wanted, device=ids.device)).sum(-1).flatten().tolist()

        counts = count(self.placeholders.get(kind or "", []))
        if not any(counts) and len(self.arguments) == 1:  # images and videos may have one placeholder
            counts = count([each for wanted in self.placeholders.values() for each in wanted])
        return counts


def _owners(counts: list[int], sizes: list[int]) -> list[int] | None:
    """The row of each medium, where each row has placeholders in proportion to the sizes of its media; else None."""
    total, whole, owners = sum(counts), sum(sizes), list[int]()
    for row, count in enumerate(counts):
        missing = count * whole
        while missing > 0 and len(owners) < len(sizes):
            missing -= sizes[len(owners)] * total
            owners.append(row)
        if missing:
            return None
    return owners if len(owners) == len(sizes) else None


def _runs(name: str, owners: list[int], sizes: list[int], exact: bool) -> Medium:
    """Neighbours that belong to one instance are one run."""
    merged: list[int] = []
    ends: list[int] = []
    for owner, end in zip(owners, itertools.accumulate(sizes), strict=True):
        if merged and merged[-1] == owner:
            ends[-1] = end
        else:
            merged.append(owner)
            ends.append(end)
    return Medium(name, tuple(merged), tuple(ends), exact)


def _named_rows(rows: Any, arguments: dict[str, Any], N: int) -> dict[str, list[int]]:
    """The caller's ilora_media_rows by argument."""
    if not isinstance(rows, Mapping):
        if len(arguments) != 1:
            raise ValueError(
                f"ilora_media_rows: the call has media in {list(arguments) or 'no argument'}; "
                + ("give a dict, {argument: rows}" if arguments else "leave it out")
            )
        rows = {next(iter(arguments)): rows}
    named = {}
    for name, each in rows.items():
        if name not in arguments:
            raise ValueError(f"ilora_media_rows: no media in the argument {name!r}, only in {list(arguments)}")
        each = torch.as_tensor(each)
        if each.dim() != 1 or each.is_floating_point() or not each.numel():
            raise TypeError(
                f"ilora_media_rows: expected one integer for each medium, got {each.dtype} {list(each.shape)}"
            )
        if not 0 <= int(each.min()) <= int(each.max()) < N:
            raise ValueError(f"ilora_media_rows: expected rows of the batch, 0 to {N - 1}, got {each.tolist()[:16]}")
        named[name] = each.tolist()
    return named


def _holds_media(name: str, value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(_holds_media(name, each) for each in value)
    return isinstance(value, Tensor) and value.dim() > 1 and value.is_floating_point() and "mask" not in name


def _kind(name: str) -> str | None:
    """The kind of media that an argument holds or describes; None where its name does not say."""
    return next((kind for kind, pattern in _KINDS.items() if re.search(pattern, name)), None)


def _placeholders(config: Any) -> dict[str, list[int]]:
    """The token ids that stand for media in the text, by kind, out of a configuration and those in it."""
    found: dict[str, list[int]] = {}
    for name, value in (vars(config) if hasattr(config, "model_type") else {}).items():
        if hasattr(value, "model_type"):
            for kind, ids in _placeholders(value).items():
                found.setdefault(kind, []).extend(ids)
        elif isinstance(value, int) and (match := _PLACEHOLDER.fullmatch(name)):
            found.setdefault({"video": "video", "audio": "audio"}.get(match[1], "image"), []).append(value)
    return found


def _text_modules(model: Any) -> tuple[str, ...]:
    """The paths of the text model and of the output head; none where the model does not say which they are."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else None
    config: Any = getattr(model, "config", None)
    if text in (None, model, getattr(model, "base_model", None)) and hasattr(config, "get_text_config"):
        kind = type(config.get_text_config())
        text = next((m for m in model.modules() if type(getattr(m, "config", None)) is kind is not type(config)), None)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    wanted = [module for module in (text, head) if module is not None]
    return tuple(path for path, module in model.named_modules() if path and any(module is each for each in wanted))
