"""A block's shared memory, and which accesses to it nothing puts in order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .formats import Array

START = 1024  # the first address, so that address 0 is outside
COPY_ENGINE, SEVERAL, NOBODY = -5, -1, -9  # in place of a warp's number


class SharedMemory:
    """All bytes are NaN at first. Addresses are arrays of int64, an element for each byte.

    A barrier begins an epoch. Within one, accesses by different warps are in no order, so one of them must not write.
    guarded: what asynchronous instructions read that have not been waited for.
    """

    def __init__(self, size: int, hazard: Callable[[str], None]) -> None:
        self.end, self._hazard, self._epoch = START + size, hazard, 1
        self.bytes = np.full(self.end, 0xFF, np.uint8)
        self._written, self._read = (np.zeros(self.end, np.int32) for _ in range(2))  # in which epoch
        self._writer, self._reader = (np.full(self.end, NOBODY, np.int16) for _ in range(2))  # by which warp
        self.guarded: list[tuple[str, Array]] = []

    def barrier(self) -> None:
        self._epoch += 1

    def holds(self, at: Array) -> bool:
        """Reports addresses outside."""
        if at.size and (at.min() < START or at.max() >= self.end):
            self._hazard("outside shared memory")
            return False
        return True

    def read(self, at: Array, warp: Array | int) -> Array:
        """The bytes. warp: which reads each address, of a shape that broadcasts."""
        if not self.holds(at):
            at = np.clip(at, START, self.end - 1)
        warp = np.broadcast_to(warp, at.shape)
        foreign = (self._writer[at] != warp) & (self._writer[at] != COPY_ENGINE)
        if ((self._written[at] == self._epoch) & foreign).any():
            self._hazard("read without a barrier after the write of another warp")
        others = (self._read[at] == self._epoch) & (self._reader[at] != warp)
        self._reader[at] = np.where(others, SEVERAL, warp)
        self._read[at] = self._epoch
        return self.bytes[at]

    def write(self, at: Array, data: Array, warp: Array | int) -> None:
        if not self.holds(at):
            return
        warp = np.broadcast_to(warp, at.shape)
        self._check_write(at, warp, self.bytes[at] != data)
        self.deliver(at, data, warp)
        if (self.bytes[at] != data).any():
            self._hazard("threads write different values to one place")

    def begin_copy(self, at: Array, warp: Array | int) -> None:
        """A copy to these addresses is under way; `deliver` ends it."""
        if self.holds(at):
            self._check_write(at, np.broadcast_to(warp, at.shape), np.ones(at.shape, bool))
            self.bytes[at] = 0xFF

    def deliver(self, at: Array, data: Array, warp: Array | int) -> None:
        """Writes without a check."""
        self.bytes[at], self._written[at] = data, self._epoch
        self._writer[at] = np.broadcast_to(warp, at.shape)

    def _check_write(self, at: Array, warp: Array, changes: Array) -> None:
        """changes: where the write makes a difference. The same value twice is no harm."""
        if ((self._read[at] == self._epoch) & (self._reader[at] != warp)).any():
            self._hazard("write without a barrier after the read of another warp")
        if ((self._written[at] == self._epoch) & (self._writer[at] != warp) & changes).any():
            self._hazard("write without a barrier after the write of another warp")
        for reader in {name for name, mask in self.guarded if mask[at].any()}:
            self._hazard(f"write to what a running {reader} reads")

    def read_by_engine(self, at: Array) -> Array:
        """The bytes that a wgmma is issued on."""
        if not self.holds(at):
            at = np.clip(at, START, self.end - 1)
        if ((self._written[at] == self._epoch) & (self._writer[at] != COPY_ENGINE)).any():
            self._hazard("wgmma without a barrier after the write")
        return self.bytes[at]

    def guard(self, reader: str, at: list[Array]) -> None:
        """An asynchronous instruction reads these addresses until `release`."""
        mask = np.zeros(self.end, bool)
        for each in at:
            mask[np.clip(each, 0, self.end - 1)] = True
        self.guarded.append((reader, mask))

    def release(self, reader: str, count: int) -> None:
        """The first `count` of such readers have been waited for: they count as reads by all just now."""
        waited = [entry for entry in self.guarded if entry[0] == reader][:count]
        for _, mask in waited:
            self._read[mask], self._reader[mask] = self._epoch, SEVERAL
        gone = {id(mask) for _, mask in waited}
        self.guarded = [entry for entry in self.guarded if id(entry[1]) not in gone]
