"""Which instances the rows of a layer belong to that sees images, sounds or videos. They come one after another, as
many as each row of the batch has, so the rows of such a layer are not the batch's."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor


class Medium(NamedTuple):
    """The media (images, sounds, videos) in one argument of a call, as runs of neighbours that belong to one instance.

    argument: its name. owners: the gate row of each run. ends: where each run ends, counted in media, or in their
    sizes where these differ and are known. exact: a layer's input must have one row for each medium, since how many
    more it may have for one is not known. row_counts: how many rows a layer's input can have, () for any number.
    problem: why their instances cannot be told, "" where they can.
    """

    argument: str
    owners: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()
    exact: bool = False
    row_counts: tuple[int, ...] = ()
    problem: str = ""

    def row_ends(self, x: Tensor) -> tuple[int, ...] | None:
        """Where each run ends in the flattened rows of x [..., d_in]; None where x cannot be of these media."""
        M, total = math.prod(x.shape[:-1]), self.ends[-1]
        if self.row_counts and M not in self.row_counts:
            return None
        if len(self.owners) == 1:
            return (M,)
        packed = x.dim() == 2 or (x.shape[0] == 1 and not self.exact)
        leading = M if packed else x.shape[0]
        if (self.exact and leading != total) or any(end * leading % total for end in self.ends):
            return None
        return tuple(end * M // total for end in self.ends)


class Media(NamedTuple):
    """The media of a call, and the paths of the modules whose layers see its text; all other layers see the media."""

    arguments: tuple[Medium, ...]
    text_modules: tuple[str, ...]

    def sees(self, name: str) -> bool:
        """Whether the layer called `name` stands outside of the text model."""
        return not any(name == path or name.startswith(path + ".") for path in self.text_modules)


def gate_of_media(
    media: Media, gate: Tensor, x: Tensor, name: str, rows: int | None, lengths: tuple[int, ...]
) -> tuple[Tensor, Tensor | None]:
    """(gate, segments) for the layer called `name` that sees x [..., d_in] outside of the text model, of the gate
    [N, E] or [layers, N, E]. rows, lengths: of the text. Raises ValueError where x's instances cannot be told."""
    M, problem, ways = math.prod(x.shape[:-1]), "", set()
    for medium in media.arguments:
        ends = None if medium.problem else medium.row_ends(x)
        if ends is not None:
            ways.add((medium.owners, ends))
        elif medium.problem or medium.exact:  # it may be these media, in another arrangement
            problem = problem or f"{medium.argument}: {medium.problem or 'their sizes differ, or nothing tells them'}"
    if rows is not None and x.shape[0] == rows and (x.dim() == 2 or (x.dim() == 3 and x.shape[1] in lengths)):
        N = gate.shape[-2]  # the text itself would have this shape, as before a classifier
        ways.add((tuple(range(N)), tuple(M * (i + 1) // N for i in range(N))))
    if problem or len(ways) != 1:
        text = "|".join(map(re.escape, media.text_modules)) or "the text model"
        help = "give ilora_media_rows, for each medium in its order the row of the batch that it belongs to"
        if not problem and len(ways) > 1:
            problem, help = "it could be one medium or another", "give images, videos and sounds in calls of their own"
        raise ValueError(
            f"{name}: nothing tells which instances the rows of its input {list(x.shape)} belong to "
            f"({problem or 'it does not hold the media of the call'}): {help}; or leave these modules out "
            f"(exclude_modules=r'(?!{text}).*'); or run one row at a time"
        )
    owners, ends = ways.pop()
    n = len(owners)
    even = all(end * n == M * (i + 1) for i, end in enumerate(ends)) and (x.dim() == 2 or x.shape[0] % n == 0)
    if owners != tuple(range(gate.shape[-2])):
        gate = gate.index_select(-2, torch.tensor(owners, device=gate.device))
    return gate, None if even else torch.tensor((0, *ends), dtype=torch.int32, device=gate.device)
