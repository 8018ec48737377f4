"""What one choice of training is worth: ``python -m tests.benchmarks.choices CHOICE``.

CHOICE is ``views`` (of a forget portrait), ``response_source`` (over which tokens y equation 3's KL
is summed, which the paper leaves open) or ``wording`` (of training questions, and on which pairs).
One setting, ``POINTS`` of the backbone's search space, is trained in each way that ``CHOICES``
lists, all else alike. Seeds choose the scored retain people, the halves of the questions, the noise
and the adapter; scores are held out. ``--markdown`` prints the table as the READMEs have it.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.progress import track

from vgid.config import RequestConfig, ResponseSource, TrainPairs, TrialConfig
from vgid.data.synthetic import write_benchmark
from vgid.report.intervals import count_seeds, t_interval
from vgid.report.tables import Grid
from vgid.study.search_space import FOLDER, SearchSpace
from vgid.trial import TrialSession

POINTS = {"tiny-llava": 1, "tiny-qwen2.5-vl": 3}
"""Place of the setting among the first points: on both strict, and a beta that keeps."""

WITHOUT_CLASSIFICATION = ("generation", "cloze")
BOTH_WORDINGS = 1.6
"""In both wordings an epoch has this many times the questions of one."""

CHOICES: dict[str, dict[str, dict[str, Any]]] = {
    "views": {
        "8 views": {"views": 8},
        "the original alone": {"views": 1},
        "the original alone, no classification": {
            "views": 1,
            "train_tasks": WITHOUT_CLASSIFICATION,
        },
    },
    "response_source": {source: {"response_source": source} for source in get_args(ResponseSource)},
    "wording": {
        "wrapped": {"train_wording": "wrapped"},
        "wrapped, longer": {"train_wording": "wrapped", "epochs": BOTH_WORDINGS},
        "raw": {"train_wording": "raw"},
        "both": {"train_wording": "both"},
        "both, all pairs": {"train_wording": "both", "train_pairs": "all"},
    },
}
"""Each way's fields of the trial and, as ``train_pairs``, of the request; epochs are a share of the
setting's."""

SCORES = (
    *(f"{split}_rougeL{end}" for split in ("forget", "test", "retain") for end in ("", "_raw")),
    *("forget_cloze", "forget_memorisation", "retain_unseen_rougeL"),
    *("retain_seen_refusal", "retain_unseen_refusal", "retain_refusal_raw"),
)

Values = dict[str, dict[str, list[float]]]


def measure(backbone: str, ways: Mapping[str, Mapping[str, Any]], seeds: int) -> Values:
    """Held-out scores of the base and of each way, one value a seed."""
    space = SearchSpace.load(FOLDER / f"{backbone}.yaml", backbone)
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
            found = {"base": sessions["unheld"].base_scores("held_out")}
            setting = space.trial_config(space.first_points[POINTS[backbone]], seed)
            for name, way in ways.items():
                session = sessions[way.get("train_pairs", "unheld")]
                adapter = root / f"{name}-{seed}"
                session.run(changed(setting, way), "0000", adapter, evaluate=False)
                found[name] = session.rescore(adapter)
            for name, scores in found.items():
                for score in SCORES:
                    values.setdefault(name, {}).setdefault(score, []).append(scores[score].value)
    return values


def changed(setting: TrialConfig, way: Mapping[str, Any]) -> TrialConfig:
    """The setting with a way's fields; ``epochs`` multiplies."""
    fields = {key: value for key, value in way.items() if key != "train_pairs"}
    epochs = round(fields.get("epochs", 1.0) * setting.epochs)
    return TrialConfig.model_validate(setting.model_dump() | fields | {"epochs": epochs})


def table(values: Values, scores: Sequence[str], caption: str) -> Grid:
    """A row a score, a column a way: means over the seeds with 95 % t intervals."""
    return Grid(
        ["score", *values],
        [[score, *(t_interval(way[score]) for way in values.values())] for score in scores],
        caption,
    )


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("choice", choices=CHOICES)
    parser.add_argument("--backbone", choices=POINTS, default="tiny-llava")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    values = measure(options.backbone, CHOICES[options.choice], options.seeds)
    caption = f"{options.backbone}, means of {count_seeds(options.seeds)} with 95 % t intervals"
    grid = table(values, SCORES, caption)
    if options.markdown:
        print(grid.markdown())
    else:
        Console(width=200).print(grid.rich())


if __name__ == "__main__":
    main()
