"""Does an embedded backbone show the phenomenon? Scored as a study scores a base, against bounds.

Scores bear the names of ``vgid.evaluation.evaluate``. Behind them stands in brackets how the
questions were asked, if not plainly: with which picture, under which instruction, and whether with
the reverse prompt.
"""

import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from vgid.config import RequestConfig
from vgid.data.benchmark import Benchmark, Person
from vgid.data.splits import People, choose_people
from vgid.data.synthetic import write_benchmark
from vgid.evaluation.evaluate import Scorer
from vgid.method.teacher import PLAIN, Intervention
from vgid.models.backbones import Backbone
from vgid.prompts import PromptStyle

BOUNDS: dict[str, tuple[float, float]] = {
    "forget_rougeL": (0.90, 1.0), "forget_rougeL_raw": (0.90, 1.0), "forget_cloze": (0.80, 1.0),
    "forget_classification": (0.80, 1.0), "forget_rougeL (strict)": (0.30, 0.75),
    "forget_rougeL (random+strict)": (0.0, 0.05), "retain_rougeL": (0.90, 1.0),
    "retain_rougeL_raw": (0.90, 1.0), "test_rougeL": (0.75, 1.0),
    "random below strict": (0.01, 1.0), "reverse gain": (0.10, 1.0),
}  # fmt: skip
"""Lowest and highest value of each entry of ``measure`` that makes the backbone fit for use.

``random below strict`` is by how much noise alone scores less than the instruction alone, ``reverse
gain`` what the reverse prompt wins back of the instruction alone; both of forget ROUGE-L.
"""
RETAIN_PEOPLE = 30
VIEWS: dict[str, dict[str, Any]] = {
    "": {},
    "random": {"noise_type": "random"},
    "white": {"noise_type": "white"},
    "gaussian0.2": {"noise_type": "gaussian", "sigma": 0.2},
    "gaussian0.8": {"noise_type": "gaussian", "sigma": 0.8},
}
"""Fields of an ``Intervention``, by what the questions' pictures show."""

_MAIN = re.compile(r"(forget|test|retain|celebrity)_(rougeL(_raw|_text)?|(cloze|classification).*)")


def measure(backbone: Backbone, data_seed: int = 0) -> dict[str, float]:
    """The table of scores, of the people that ``data_seed`` makes up."""
    conditions = {
        "+".join(filter(None, (view, style))): (Intervention(**noise, style=style), False)
        for view, noise in VIEWS.items()
        for style in (None, *get_args(PromptStyle))
    }
    del conditions[""]
    conditions |= {"reverse": (PLAIN, True), "strict+reverse": (conditions["strict"][0], True)}
    with tempfile.TemporaryDirectory(prefix="vgid-measure-") as folder:
        data = Path(folder) / "data"
        write_benchmark(data, data_seed)
        fields = {"backbone": backbone.spec.name, "data": data, "store": Path(folder)}
        request = RequestConfig.model_validate({**fields, "retain_people": RETAIN_PEOPLE})
        benchmark = Benchmark.open(data)
        everyone = choose_people(benchmark, request)
    scorer = Scorer(backbone, benchmark.sha256, everyone, request)
    found = scorer.evaluate("all", data_seed).scores
    scores = {name: score.value for name, score in found.items() if _MAIN.fullmatch(name)}
    # Under the conditions only what is bounded: the others' questions take ten times as long.
    forget, test = map(_generation_only, (everyone.forget, everyone.test))
    scorer.people = People(forget, test, (), (), (), ())
    for condition, (how, reverse) in conditions.items():
        found = scorer.evaluate("all", data_seed, how, reverse).scores
        for name in ("forget_rougeL", "test_rougeL"):
            scores[f"{name} ({condition})"] = found[name].value
    strict = scores["forget_rougeL (strict)"]
    scores["random below strict"] = strict - scores["forget_rougeL (random)"]
    scores["reverse gain"] = scores["forget_rougeL (strict+reverse)"] - strict
    return {name: round(score, 4) for name, score in scores.items()}


def _generation_only(people: Iterable[Person]) -> tuple[Person, ...]:
    return tuple(
        replace(person, questions=tuple(q for q in person.questions if q.task == "generation"))
        for person in people
    )


def out_of_bounds(scores: Mapping[str, float]) -> list[str]:
    """Names of the scores that miss their bounds."""
    return [name for name, (low, high) in BOUNDS.items() if not low <= scores[name] <= high]
