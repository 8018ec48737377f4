"""Which response source forgets deepest: ``python -m tests.benchmarks.response_source [--json]``.

The paper leaves open over which tokens y the forget KL of equation 3 is summed. Each source trains
the same setting (random noise, strict, alpha 1, beta 3) for several seeds, which choose the scored
retain people, the halves of the questions, the noise and the adapter; scores are held out.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.progress import track
from rich.table import Table

from vgid.config import RequestConfig, ResponseSource, TrialConfig
from vgid.data.synthetic import write_benchmark
from vgid.trial import TrialSession

SCORES = (
    "forget_rougeL",
    "test_rougeL",
    "forget_cloze",
    "forget_memorisation",
    "retain_rougeL",
    "retain_cloze",
)


def measure(seeds: int) -> dict[str, dict[str, list[float]]]:
    """Held-out scores of the base and of each response source, one value a seed."""
    values: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_benchmark(root / "data")
        for seed in track(range(seeds), "seeds", console=Console(stderr=True)):
            session = TrialSession(
                RequestConfig(data=root / "data", store=root / "store", seed=seed)
            )
            found = {"base": session.base_scores("held_out")}
            for source in get_args(ResponseSource):
                trial = TrialConfig(beta=3.0, response_source=source, seed=seed)
                adapter = root / f"{source}-{seed}"
                session.run(trial, source, adapter, evaluate=False)
                found[source] = session.rescore(adapter)
            for name, scores in found.items():
                for score in SCORES:
                    values.setdefault(name, {}).setdefault(score, []).append(scores[score].value)
    return values


def main() -> None:
    """Measure and print a table, with ``--json`` the values as one last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    values = measure(options.seeds)
    table = Table("source", *SCORES, title=f"mean (lowest to highest of {options.seeds} seeds)")
    for name, scores in values.items():
        cells = (
            f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in scores.values()
        )
        table.add_row(name, *cells)
    Console(width=180).print(table)
    if options.json:
        print(json.dumps(values))


if __name__ == "__main__":
    main()
