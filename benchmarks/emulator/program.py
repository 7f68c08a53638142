"""PTX as text → a program."""

from __future__ import annotations

import re
from typing import NamedTuple


class Instruction(NamedTuple):
    """name: with its suffixes, as in "ld.global.b32". guard: the predicate register that says which threads take it,
    or those it does not name if `negated`."""

    text: str
    name: str
    operands: list[str]
    guard: str | None
    negated: bool

    @property
    def suffixes(self) -> list[str]:
        return self.name.split(".")


class Program(NamedTuple):
    """One kernel. parameters: their names in PTX. threads: of a block. labels: the index that each stands before."""

    name: str
    parameters: list[str]
    threads: int
    instructions: list[Instruction]
    labels: dict[str, int]


DIRECTIVE = re.compile(r"^\s*\.(loc|reg|pragma|file)\b[^\n;]*;?", re.M)
# The loop that waits for a barrier, as Triton writes it; `barrier_wait` stands for it.
WAIT_LOOP = re.compile(
    r"\{\s*(?:\.reg \.pred complete;)?\s*waitLoop:\s*mbarrier\.try_wait\.parity\.shared\S*\.b64 complete, "
    r"(\[[^\]]+\]), ([^;]+);\s*@!complete bra\.uni waitLoop;\s*\}"
)
OPERAND = re.compile(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+")


def parse(ptx: str) -> Program:
    """The one kernel of a PTX module."""
    head, body = ptx[ptx.index(".visible .entry") :].split("{", 1)
    body = re.sub(r"//[^\n]*", "", body[: body.index("$L__func_end0")])
    body = WAIT_LOOP.sub(r"barrier_wait \1, \2;", DIRECTIVE.sub("", body))
    instructions, labels, unfinished = list[Instruction](), dict[str, int](), ""
    for line in body.split("\n"):
        if label := re.fullmatch(r"\s*(\$?\w+):\s*", line):
            labels[label[1]] = len(instructions)
            continue
        *statements, unfinished = f"{unfinished} {line}".split(";")
        texts = (" ".join(statement.split()).lstrip("{} ") for statement in statements)  # braces of inline assembly
        instructions += [_instruction(text) for text in texts if text]
    name, threads = re.search(r"\.entry (\w+)\(", head), re.search(r"\.reqntid (\d+)", head)
    assert name is not None
    assert threads is not None
    return Program(name[1], re.findall(r"\w+_param_\d+", head), int(threads[1]), instructions, labels)


def _instruction(text: str) -> Instruction:
    guard = re.match(r"@(!?)(%p\d+) (.*)", text)
    name, _, rest = (guard[3] if guard else text).partition(" ")
    operands = [operand.strip() for operand in OPERAND.findall(rest)]
    return Instruction(text, name, operands, guard[2] if guard else None, bool(guard and guard[1]))
