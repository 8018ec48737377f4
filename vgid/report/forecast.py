"""What a whole study will take, told from its first trial: hours, disk and money."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from vgid.command_line import duration


@dataclass(frozen=True)
class Forecast:
    """Bounds, from the least to the most: a trial may find its teacher's answers stored, or not.

    Those of seconds are of the wall clock, with as many trials at a time as ``slots``; those of
    ``size`` are bytes.
    """

    trials: int
    slots: int
    seconds: tuple[float, float]
    size: tuple[int, int]

    def lines(self, price_per_hour: float | None) -> list[str]:
        """For people; the price, of any currency, is of all machines of the study together."""
        money = ""
        if price_per_hour is not None:
            low, high = (price_per_hour * seconds / 3600 for seconds in self.seconds)
            money = f", which costs {low:,.2f} to {high:,.2f} at {price_per_hour:g} an hour"
        low_s, high_s = map(duration, self.seconds)
        least, most = map(decimal, self.size)
        return [
            f"All {self.trials} trials, {self.slots} at a time: {low_s} to {high_s}{money}",
            f"Disk: {least} to {most}",
        ]


def forecast(first: Mapping[str, Any], folder: Path, trials: int, slots: int) -> Forecast:
    """What ``trials`` will take, from the ``study.json`` of a study of one trial, and its folder.

    At the least later trials need no teacher, and no more of them are scored again than the first
    put on the front. At the most each needs all of its own, and each is scored again.
    """
    total = {phase: each["total_s"] for phase, each in first["phases"].items()}
    # Without the teacher; what is left of the wall clock is there once: start-up, figures, MLflow.
    own = sum(total.get(phase, 0.0) for phase in ("train", "evaluate", "save"))
    teacher, again = (total.get(phase, 0.0) for phase in ("teacher", "re-score"))
    once = first["wall_s"] - own - teacher - again
    rounds = math.ceil(trials / slots)
    least = once + teacher + rounds * own + again
    most = once + rounds * (own + teacher + again)
    sizes = {part.name: _bytes(part) for part in folder.iterdir()}
    store, limit = sizes.get("store", 0), first["store"].get("limit_bytes", 0)
    # MLflow is given each adapter too.
    own_bytes = 2 * sizes["adapters"] + sizes["trials"]
    size = sum(sizes.values()) + (trials - 1) * own_bytes
    # A store that is full forgets what is oldest.
    more = max(0, min(trials * store, limit) - store)
    return Forecast(trials, slots, (least, most), (size, size + more))


def _bytes(path: Path) -> int:
    # The scales of an adapter share their weights by hard links.
    files = [file.stat() for file in [path, *path.rglob("*")] if file.is_file()]
    return sum({file.st_ino: file.st_size for file in files}.values())
