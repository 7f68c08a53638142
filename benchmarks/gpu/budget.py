"""How the minutes are shared out: each part ends at a share of the whole, and what one leaves over is the next's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

SHARES = {
    "correctness": 0.22, "ceilings": 0.02, "tune": 0.16, "layer": 0.33, "decode": 0.08, "model": 0.16, "host": 0.03
}  # fmt: skip
PARTS = tuple(SHARES)  # in the order they run: without the first nothing else counts


class Budget:
    """seconds for the chosen parts together, counted from now."""

    def __init__(self, seconds: float, parts: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.start = clock, clock()
        whole, reached = sum(SHARES[part] for part in parts), 0.0
        self.ends: dict[str, float] = {}
        for part in parts:
            reached += SHARES[part]
            self.ends[part] = self.start + seconds * reached / whole

    def left(self, part: str) -> float:
        """Seconds until the part should be over; negative when it is late."""
        return self.ends[part] - self.clock()

    def spent(self) -> float:
        return self.clock() - self.start
