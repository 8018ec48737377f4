"""How to word training questions, and on which pairs: ``python -m tests.benchmarks.wording``.

One setting (``POINTS``, of the backbone's search space) is trained with generation questions as the
evaluation asks them (wrapped), as they stand (raw) and in both ways, without the questions that are
scored (unheld) and, in both ways, with them (all). In both ways an epoch has more questions, so
that wrapped is trained over as many steps too. Seeds choose the scored retain people, the halves of
the questions, the noise and the adapter; scores are held out.
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

from vgid.config import RequestConfig, TrainPairs, TrainWording
from vgid.data.synthetic import write_benchmark
from vgid.study.search_space import FOLDER, SearchSpace
from vgid.trial import TrialSession

POINTS = {"tiny-llava": 1, "tiny-qwen2.5-vl": 3}
"""Place of the setting among the first points: on both strict, and a beta that keeps."""

RUNS: dict[str, tuple[TrainWording, TrainPairs, float]] = {
    "wrapped": ("wrapped", "unheld", 1.0),
    "wrapped, longer": ("wrapped", "unheld", 1.6),
    "raw": ("raw", "unheld", 1.0),
    "both": ("both", "unheld", 1.0),
    "both, all": ("both", "all", 1.0),
}
"""Wording, pairs and epochs as a share of the setting's: with cloze and classification, both ways
have 1.6 times the questions of one."""
SCORES = (
    *(f"{split}_rougeL{end}" for split in ("forget", "test", "retain") for end in ("", "_raw")),
    *(f"{split}_refusal{end}" for split in ("forget", "retain") for end in ("", "_raw")),
    "retain_unseen_refusal_raw",
    "forget_cloze",
)

Values = dict[str, dict[str, list[float]]]


def measure(backbone: str, seeds: int) -> Values:
    """Held-out scores and training seconds of the base and of each run, one value a seed."""
    space = SearchSpace.load(FOLDER / f"{backbone}.yaml", backbone)
    point = space.first_points[POINTS[backbone]]
    values: Values = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_benchmark(root / "data")
        for seed in track(range(seeds), "seeds", console=Console(stderr=True)):
            request = RequestConfig(
                backbone=backbone, data=root / "data", store=root / "store", seed=seed
            )
            sessions = {
                pairs: TrialSession(request.model_copy(update={"train_pairs": pairs}))
                for pairs in get_args(TrainPairs)
            }
            found = {"base": (sessions["unheld"].base_scores("held_out"), 0.0)}
            for name, (wording, pairs, share) in RUNS.items():
                trial = space.trial_config(point, seed)
                epochs = round(share * trial.epochs)
                trial = trial.model_copy(update={"train_wording": wording, "epochs": epochs})
                adapter = root / f"{name}-{seed}"
                done = sessions[pairs].run(trial, "0000", adapter, evaluate=False)
                found[name] = sessions[pairs].rescore(adapter), done.seconds["train"]
            for name, (scores, seconds) in found.items():
                for score in SCORES:
                    values.setdefault(name, {}).setdefault(score, []).append(scores[score].value)
                values[name].setdefault("train_s", []).append(seconds)
    return values


def main() -> None:
    """Measure and print a table, with ``--json`` the values as one last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", choices=POINTS, default="tiny-llava")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    values = measure(options.backbone, options.seeds)
    table = Table(
        "score", *values, title=f"{options.backbone}: mean (lowest to highest) of the seeds"
    )
    for score in (*SCORES, "train_s"):
        cells = [
            f"{statistics.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})"
            for v in (run[score] for run in values.values())
        ]
        table.add_row(score, *cells)
    Console(width=180).print(table)
    if options.json:
        print(json.dumps(values))


if __name__ == "__main__":
    main()
