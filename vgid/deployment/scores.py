"""Scores of a model, over several seeds and under attacks, so that a pick is no lucky draw.

``score_model`` does for any model what a pick does for its candidates: for a base, an adapter on
it, or a deployment (its adapter, not an export's merged weights) on its record's own questions.
"""

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from rich.console import Console

from vgid.config import Config, Flag, ForgetRatio, ModelPath, RequestConfig, parse
from vgid.data.synthetic import write_benchmark
from vgid.deployment import record
from vgid.deployment.rules import Marks, Measure
from vgid.errors import InputError
from vgid.evaluation.suppression import doubt
from vgid.models.adapter_files import CONFIG
from vgid.models.backbones import BENCHMARK_SHOTS, spec
from vgid.results import QuestionPart, Score, shots_left_out
from vgid.seeds import held_out_seed

if TYPE_CHECKING:
    from vgid.trial import TrialSession

PART: QuestionPart = "held_out"
MIN_SEEDS = 3

_REQUEST = ("backbone", "forget_ratio", "retain_people", "seed")
"""What a deployment's record says itself."""

_ATTACKS = {
    record.REVERSED: r"(forget|test|earlier)_",
    "new portraits and wording (test set)": r"test_(?!.*_(text|raw)$)",
    "questions as they stand, without answer instructions": r"(forget|test|earlier)_.*_raw$",
    "text-only questions": r"(forget|test|earlier)_.*_text$",
    "answer forced (memorisation)": r"forget_memorisation",
}
"""Which scores tell of an attack: of those who are to be forgotten, or were earlier."""


@dataclass(frozen=True)
class Scored:
    """A model's scores, ``pooled`` over the seeds: plainly, and under the reverse prompt."""

    plain: Mapping[str, Score]
    reverse: Mapping[str, Score]

    def get(self, kind: str, name: str) -> Score | None:
        """A score of the kind ``plain`` or ``reverse``, None if it was not asked."""
        return (self.reverse if kind == "reverse" else self.plain).get(name)


def pick_seeds(study_seed: int, count: int) -> tuple[int, ...]:
    """The seeds of a pick; the first is the one that the study scored its front with."""
    return tuple(held_out_seed(study_seed, study=True) + i for i in range(count))


def score_with_seeds(session: "TrialSession", seeds: Sequence[int], adapter: Path | None) -> Scored:
    """Scores of an adapter, or of the base for None, on the held-out questions.

    InputError where the adapter lacks a file, or there are too few few-shot people.
    """
    if adapter is None:
        plain = [session.base_scores(PART, seed) for seed in seeds]
    else:
        plain = [session.rescore(adapter, PART, seed) for seed in seeds]
    reverse = [session.rescore_attacked(adapter, PART, seed) for seed in seeds]
    return Scored(pooled(plain), pooled(reverse))


def score_base(session: "TrialSession", seeds: Sequence[int], tell: record.Tell) -> Scored:
    """Scores of the base, with a warning where it may never have known the people."""
    tell(f"Scoring the base model on held-out questions, {len(seeds)} seeds")
    base = score_with_seeds(session, seeds, None)
    unsure = doubt(base.plain)
    if unsure is not None:
        tell(f"Warning: {unsure}")
    return base


def pooled(runs: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """Scores over several seeds as one.

    The seeds ask the same people nearly the same questions, so they are no independent samples:
    the value is the mean, the interval the envelope of all intervals, n that of one seed.
    """
    return {
        name: Score(
            value=sum(run[name].value for run in runs) / len(runs),
            n=min(run[name].n for run in runs),
            # As independent samples, three seeds would make it two fifths narrower.
            low=min(run[name].low for run in runs),
            high=max(run[name].high for run in runs),
        )
        for name in runs[0]
        if all(name in run for run in runs)
    }


def marks_of(trial_id: str, base: Scored, scored: Scored) -> Marks:
    """What the rules judge of a candidate; differences are of the same people's answers, paired.

    InputError where the data has no held-out generation questions.
    """
    plain = scored.plain
    try:
        before = base.plain["forget_rougeL"]
        reduction, drop = plain["forget_rougeL_reduction"], plain["retain_rougeL_drop"]
        retain, rise = plain["retain_rougeL"], scored.reverse["forget_rougeL_rise"]
    except KeyError as error:
        raise InputError(
            f"{error.args[0]}: the data has no held-out questions for this score; add generation "
            "questions."
        ) from None
    cloze = plain.get("forget_cloze")
    return Marks(
        trial_id=trial_id,
        before=before.value,
        reduction=Measure(reduction.value, reduction.low),
        retain=Measure(retain.value, retain.low),
        retain_drop=Measure(drop.value, drop.high),
        reverse_rise=Measure(rise.value, rise.high),
        cloze=None if cloze is None else Measure(cloze.value, cloze.high),
    )


def attacks_of(scored: Scored) -> tuple[tuple[record.Attack, ...], tuple[str, ...]]:
    """The attacks that scores tell of, and what was not run, for want of questions or at all."""
    run, missing = [], []
    for name, pattern in _ATTACKS.items():
        asked = scored.reverse if name == record.REVERSED else scored.plain
        scores = {score: value for score, value in asked.items() if re.match(pattern, score)}
        if scores:
            run.append(record.Attack(name=name, scores=scores))
        else:
            missing.append(f"{name}: the data has no such questions")
    return tuple(run), (*missing, *record.NOT_RUN)


def as_recorded(seeds: tuple[int, ...], base: Scored, scored: Scored) -> record.Scores:
    """Scores of the base and of what is shipped, as a deployment's record has them."""
    attacks, not_run = attacks_of(scored)
    return record.Scores(
        part=PART,
        seeds=seeds,
        base=dict(base.plain),
        deployed=dict(scored.plain),
        attacks=attacks,
        not_run=not_run,
    )


class ScoringConfig(Config):
    """What is scored, and how: the flags of ``vgid evaluate`` and ``vgid attack``."""

    target: Annotated[Path | None, Flag(name="MODEL")] = Field(
        None,
        description="deployment file, export's folder or PEFT adapter; the base if left out",
    )
    backbone: record.BackboneToScore = None
    model_path: ModelPath = None
    data: Annotated[Path | None, Flag("DIR")] = Field(
        None,
        description="benchmark folder; without it, the deployment's, or the embedded backbone's",
    )
    forget_ratio: ForgetRatio | None = Field(
        None, description="per cent of the people to forget; without it, 5"
    )
    retain_people: int | None = Field(
        None, ge=2, description="people scored as retain set; without it, 50"
    )
    seed: Annotated[int | None, Flag("S")] = Field(
        None, ge=0, description="of the splits of people and questions; without it, 0"
    )
    seeds: int | None = Field(
        None,
        ge=1,
        description="seeds of few-shot people and poses to score with; without it, 1, for an "
        "attack 3",
    )
    protocol: Literal["own", "benchmark"] = Field(
        "own",
        description="own: as the backbone's studies score. benchmark: MLLMU-Bench's, with answers "
        "by letter, few-shot turns and all questions",
    )
    part: QuestionPart | None = Field(
        None, description="questions; without it, held_out, and all for the benchmark's protocol"
    )

    @model_validator(mode="after")
    def _the_benchmark_asks_everything(self) -> Self:
        if self.protocol == "benchmark" and self.part not in (None, "all"):
            raise ValueError("part: the benchmark's protocol asks all questions; leave it out")
        return self


class ModelScores(Config):
    """What was found, by score name (``vgid.evaluation.evaluate``), ``pooled`` over the seeds.

    ``adapter_files`` are their SHA-256 by name, none for a base; ``attacks`` and ``not_run`` are
    empty unless asked for.
    """

    model: Literal["base", "adapter", "deployment"]
    backbone: str
    base_revision: str
    adapter_files: dict[str, str]
    data_sha256: str
    forget_ratio: ForgetRatio
    retain_people: int
    seed: int
    seeds: tuple[int, ...]
    protocol: Literal["own", "benchmark"]
    part: QuestionPart
    option_scoring: Literal["letter", "likelihood"]
    scores: dict[str, Score]
    attacks: tuple[record.Attack, ...] = ()
    not_run: tuple[str, ...] = ()

    def print(self, console: Console) -> None:
        """Show the main scores, and what was not run."""
        further = [name for name in sorted(self.scores) if name.endswith(("_bleu", "_shots"))]
        names = (*record.CARD_SCORES, *further)
        console.print(record.score_grid({}, self.scores, self.attacks, names).rich())
        sentences = [
            f"{len(self.scores)} scores of {self.part} questions; --json has all.",
            f"Not run: {'; '.join(self.not_run)}." if self.not_run else None,
            shots_left_out(self.scores),
            doubt(self.scores) if self.model == "base" else None,
        ]
        console.print("\n".join(filter(None, sentences)), markup=False, soft_wrap=True)


def score_model(
    config: ScoringConfig, attacked: bool, tell: record.Tell = lambda line: None
) -> ModelScores:
    """Score a model; ``attacked``: also under the attacks that a deployment record names.

    InputError for bad input, or an adapter or base that is not the recorded one.
    """
    from vgid.cluster.resources import worker_threads
    from vgid.trial import TrialSession

    with worker_threads(), _asked(config) as (request, adapter, deployed):
        tell(f"Loading {request.backbone}")
        session = TrialSession(request)
        backbone, by_benchmark = session.backbone, config.protocol == "benchmark"
        if by_benchmark:
            shots: dict[str, Any] = {"few_shot": BENCHMARK_SHOTS, "option_scoring": "letter"}
            backbone.spec = replace(backbone.spec, **shots)
        seeds = pick_seeds(request.seed, config.seeds or (3 if attacked else 1))
        tell(f"Scoring, {len(seeds)} seeds")
        part = config.part or ("all" if by_benchmark else PART)
        if attacked:
            scored = score_with_seeds(session, seeds, adapter)
            attacks, not_run = attacks_of(scored)
        else:
            runs = [session.scores_under(part, seed, adapter_dir=adapter) for seed in seeds]
            scored, attacks, not_run = Scored(pooled(runs), {}), (), ()
        return ModelScores(
            **{name: getattr(request, name) for name in _REQUEST},
            model="deployment" if deployed else "adapter" if adapter else "base",
            base_revision=backbone.revision,
            adapter_files={} if adapter is None else record.hash_files(adapter),
            data_sha256=session.benchmark.sha256,
            seeds=seeds,
            protocol=config.protocol,
            part=part,
            option_scoring=backbone.spec.option_scoring,
            scores=dict(scored.plain),
            attacks=attacks,
            not_run=not_run,
        )


@contextmanager
def _asked(config: ScoringConfig) -> Iterator[tuple[RequestConfig, Path | None, bool]]:
    """Whose questions are asked, of which adapter, and whether it is a deployment's."""
    target = config.target
    given = {name: getattr(config, name) for name in _REQUEST}
    given = {name: value for name, value in given.items() if value is not None}
    with tempfile.TemporaryDirectory(prefix="vgid-scores-") as scratch:
        store = Path(scratch)
        if target is None or (target / CONFIG).is_file():
            backbone, data = config.backbone or "tiny-llava", config.data
            if data is None:
                if not spec(backbone).embedded:
                    raise InputError("--data: name the benchmark folder.")
                data = store / "data"
                write_benchmark(data)
            places = {"model_path": config.model_path, "data": data, "store": store}
            values = given | places | {"backbone": backbone}
            yield parse(RequestConfig, values, "command line"), target, False
            return
        file = record.deployment_file(target)
        if not file.is_file():
            raise InputError(
                f"{target}: is no deployment file, no export's folder and no PEFT adapter; name "
                "one, or leave it out to score the base."
            )
        if given:
            flag = min(given).replace("_", "-")
            raise InputError(f"--{flag}: is in the record of {file}; leave it out.")
        shipped = record.read_shipped(file)
        deployment = shipped.deployment
        record.find_base(deployment, config.model_path)
        with record.recorded_benchmark(deployment, file, config.data) as benchmark:
            request = record.request_of(deployment, benchmark.root, store, config.model_path)
            yield request, shipped.adapter, True
