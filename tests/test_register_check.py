"""Registers that are written while a running wgmma uses them are found on every path through machine code."""

import pytest
from register_check import early_writes, read_listing

HGMMA = "HGMMA.64x16x16.F32.BF16 R24, {left}, gdesc[UR4], R24, gsb0"
LOOP = [".L_x_0:", "{first}", HGMMA, "{wait}", "@P0 BRA `(.L_x_0)", "{after}", "EXIT"]


def found(*lines):
    places, listing = 0, []
    for line in lines:
        listing.append(f"{line}" if line.startswith(".L") else f"        /*{16 * places:04x}*/  {line} ;")
        places += not line.startswith(".L")
    early = early_writes(read_listing("\n".join(listing)))
    return [(wgmma.address, writer.address) for wgmma, writer in early]


def loop(left="R56", first="NOP", wait="WARPGROUP.DEPBAR.LE gsb0, 0x0", after="NOP"):
    return found(*(line.format(left=left, first=first, wait=wait, after=after) for line in LOOP))


WAIT_FOR_OTHERS = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    ("left", "writer"),
    [("R56", "IADD3 R57, R1, R2, R3"), ("R52", "LDG.E.128 R52, [R2.64]"), ("R56", "IMAD.WIDE R58, R1, R2, R3")],
)
def test_the_next_turn_overwrites_the_left_matrix(left, writer):
    assert loop(left, writer) == []
    assert loop(left, writer, wait=WAIT_FOR_OTHERS) == [("0010", "0000")]
    assert loop("R60", writer, wait=WAIT_FOR_OTHERS) == []


def test_what_follows_the_loop_overwrites_the_accumulator():
    assert loop(after="FADD R24, R1, R2") == []
    assert loop(after="FADD R24, R1, R2", wait=WAIT_FOR_OTHERS) == [("0010", "0040")]
    assert loop(after="FADD R31, R1, R2", wait="NOP") == [("0010", "0040")]
    assert loop(after="FADD R32, R1, R2", wait="NOP") == []  # a 64 × 16 accumulator has eight registers
    assert loop(after="STG.E [R24.64], R56", wait="NOP") == []  # reads


def test_only_registers_of_the_left_matrix_count():
    assert loop(left="gdesc[UR8]", first="IADD3 R57, R1, R2, R3", wait=WAIT_FOR_OTHERS) == []
