"""Scores of a model, over several seeds and under attacks.

A study scores its front once on held-out questions. Before a choice every candidate, and the base,
is scored on them with several seeds (of few-shot people, test poses and bootstrap), plainly and
under the reverse prompt, so that the winner is no lucky draw of one seed. Scores come from the
store where a study or an earlier pick has them already.

``score_model`` does the same for any model: a base, an adapter on it, or a deployment. A deployment
is scored on the people and questions of its own record, so that the same command gives its numbers
again; everything else takes a forget request. Scored is the adapter on its base, not an export's
merged weights.
"""

import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field, model_validator
from rich.console import Console

from vgid.config import Config, Flag, ForgetRatio, ModelPath, RequestConfig, parse
from vgid.deployment.record import (
    ADAPTER,
    DEPLOYMENT,
    NOT_RUN,
    REVERSED,
    Attack,
    Deployment,
    check_adapter,
    hash_files,
    read_deployment,
    recorded_benchmark,
    request_of,
)
from vgid.deployment.rules import Marks, Measure
from vgid.errors import InputError
from vgid.evaluation.suppression import doubt
from vgid.models.adapter_files import CONFIG
from vgid.models.backbones import BENCHMARK_SHOTS, spec
from vgid.report.tables import Grid
from vgid.results import QuestionPart, Score, shots_left_out
from vgid.seeds import held_out_seed
from vgid.study.finished import Trial

if TYPE_CHECKING:
    from vgid.trial import TrialSession

PART: QuestionPart = "held_out"

MIN_SEEDS = 3

_REQUEST = ("backbone", "forget_ratio", "retain_people", "seed")
"""What a deployment's record says itself."""

_SHOWN = re.compile(
    r"_(rougeL|bleu|refusal|cloze|classification|memorisation)(_shots)?(_text|_raw)*$"
)
"""Scores of the printed tables, by what follows the split."""

_PLAIN = re.compile(r"(forget|earlier)_(?!.*(_text|_raw)$)")
"""Scores of the people to forget, asked as the benchmark asks about a portrait."""


@dataclass(frozen=True)
class Scored:
    """A model's scores, pooled over the seeds (see ``pooled``).

    Attributes:
        plain: questions as they are.
        reverse: the same under the reverse prompt.
    """

    plain: Mapping[str, Score]
    reverse: Mapping[str, Score]


@dataclass(frozen=True)
class Candidates:
    """A front, ready to be chosen from.

    Attributes:
        seeds: what was scored with.
        base: the base model's scores.
        trials: the front.
        scores: each trial's scores, in the same order.
    """

    seeds: tuple[int, ...]
    base: Scored
    trials: tuple[Trial, ...]
    scores: tuple[Scored, ...]

    def marks(self) -> list[Marks]:
        """What the rules judge, in the same order.

        Raises:
            InputError: the data has no held-out generation questions.
        """
        return [
            marks_of(trial.trial_id, self.base, scored)
            for trial, scored in zip(self.trials, self.scores, strict=True)
        ]

    def of(self, trial_id: str) -> tuple[Trial, Scored]:
        """One candidate by its trial id."""
        return next(
            pair
            for pair in zip(self.trials, self.scores, strict=True)
            if pair[0].trial_id == trial_id
        )


def pick_seeds(study_seed: int, count: int) -> tuple[int, ...]:
    """The seeds of a pick; the first is the one that the study scored its front with."""
    return tuple(held_out_seed(study_seed, study=True) + i for i in range(count))


def score_with_seeds(session: "TrialSession", seeds: Sequence[int], adapter: Path | None) -> Scored:
    """Scores of an adapter, or of the base, on the held-out questions over ``seeds``.

    Args:
        session: a loaded base with its request.
        seeds: of few-shot people, test poses and bootstrap.
        adapter: PEFT folder, None for the base.

    Raises:
        InputError: the adapter lacks a file, or there are too few few-shot people.
    """
    if adapter is None:
        plain = [session.base_scores(PART, seed) for seed in seeds]
    else:
        plain = [session.rescore(adapter, PART, seed) for seed in seeds]
    reverse = [session.rescore_attacked(adapter, PART, seed) for seed in seeds]
    return Scored(pooled(plain), pooled(reverse))


def score_front(
    session: "TrialSession",
    trials: Sequence[Trial],
    seeds: Sequence[int],
    tell: Callable[[str], None],
) -> Candidates:
    """Score a front and its base.

    Args:
        session: a loaded base with the study's request.
        trials: the front.
        seeds: see ``pick_seeds``.
        tell: shows a line of progress.

    Raises:
        InputError: see ``score_with_seeds``.
    """
    tell(f"Scoring the base model on held-out questions, {len(seeds)} seeds")
    base = score_with_seeds(session, seeds, None)
    unsure = doubt(base.plain)
    if unsure is not None:
        tell(f"Warning: {unsure}")
    scores = []
    for number, trial in enumerate(trials, start=1):
        tell(f"Scoring trial {trial.trial_id} ({number} of {len(trials)})")
        scores.append(score_with_seeds(session, seeds, trial.adapter))
    return Candidates(tuple(seeds), base, tuple(trials), tuple(scores))


def pooled(runs: Sequence[Mapping[str, Score]]) -> dict[str, Score]:
    """Scores over several seeds as one.

    The seeds ask the same people nearly the same questions, so they are no independent samples:
    the value is the mean, the interval the envelope of all intervals, n that of one seed.
    """
    return {
        name: Score(
            value=sum(run[name].value for run in runs) / len(runs),
            n=min(run[name].n for run in runs),
            # Taken for three samples, three seeds would make the interval narrower by two fifths
            # for asking the same people again.
            low=min(run[name].low for run in runs),
            high=max(run[name].high for run in runs),
        )
        for name in runs[0]
        if all(name in run for run in runs)
    }


def marks_of(trial_id: str, base: Scored, scored: Scored) -> Marks:
    """What the rules judge of a candidate.

    Reduction, drop and rise are differences of the same people's answers, with paired intervals.

    Raises:
        InputError: the data has no held-out generation questions.
    """
    reduction = _score(scored.plain, "forget_rougeL_reduction")
    retain = _score(scored.plain, "retain_rougeL")
    drop = _score(scored.plain, "retain_rougeL_drop")
    rise = _score(scored.reverse, "forget_rougeL_rise")
    cloze = scored.plain.get("forget_cloze")
    return Marks(
        trial_id=trial_id,
        before=_score(base.plain, "forget_rougeL").value,
        reduction=Measure(reduction.value, reduction.low),
        retain=Measure(retain.value, retain.low),
        retain_drop=Measure(drop.value, drop.high),
        reverse_rise=Measure(rise.value, rise.high),
        cloze=None if cloze is None else Measure(cloze.value, cloze.high),
    )


def attacks_of(scored: Scored) -> tuple[tuple[Attack, ...], tuple[str, ...]]:
    """The attacks that scores tell of, and what was not run, for the deployment record.

    The reverse prompt is scored on those who are to be forgotten, or were earlier; an attack whose
    questions the data lacks counts as not run.
    """
    plain, reverse = scored.plain, scored.reverse
    forgotten = ("forget_", "test_", "earlier_")
    rows = {
        REVERSED: _only(reverse, lambda name: name.startswith(forgotten)),
        "new portraits and wording (test set)": _only(
            plain, lambda name: name.startswith("test_") and not name.endswith(("_text", "_raw"))
        ),
        "questions as they stand, without answer instructions": _only(
            plain, lambda name: name.startswith(forgotten) and name.endswith("_raw")
        ),
        "text-only questions": _only(
            plain, lambda name: name.startswith(forgotten) and name.endswith("_text")
        ),
        "answer forced (memorisation)": _only(
            plain, lambda name: name.startswith("forget_memorisation")
        ),
    }
    run = tuple(Attack(name=name, scores=scores) for name, scores in rows.items() if scores)
    missing = tuple(
        f"{name}: the data has no such questions" for name, scores in rows.items() if not scores
    )
    return run, (*missing, *NOT_RUN)


def _only(scores: Mapping[str, Score], wanted: Callable[[str], bool]) -> dict[str, Score]:
    return {name: score for name, score in scores.items() if wanted(name)}


def _score(scores: Mapping[str, Score], name: str) -> Score:
    if name not in scores:
        raise InputError(
            f"{name}: the data has no held-out questions for this score; add generation questions."
        )
    return scores[name]


class ScoringConfig(Config):
    """What is scored, and how: the flags of ``vgid evaluate`` and ``vgid attack``."""

    target: Annotated[Path | None, Flag(name="MODEL")] = Field(
        None,
        description="deployment file, export's folder or PEFT adapter; the base if left out",
    )
    backbone: Annotated[str | None, Flag("NAME")] = Field(
        None,
        description="base model, a row of vgid/models/backbones.py; without it, the deployment's "
        "or tiny-llava",
    )
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
    """What was found.

    Attributes:
        model: what was scored.
        backbone: of it.
        base_revision: of its base.
        adapter_files: SHA-256 of the adapter's files by name; empty for a base.
        data_sha256: of the benchmark.
        forget_ratio: per cent of the people to forget.
        retain_people: people of the retain split.
        seed: of the splits of people and questions.
        seeds: of few-shot people, test poses and bootstrap, pooled (``pooled``).
        protocol: whose.
        part: which questions.
        option_scoring: how multiple-choice questions were scored.
        scores: by name (``vgid.evaluation.evaluate``).
        attacks: scores under each attack; empty unless asked for, as is ``not_run``.
        not_run: attacks that were not run, in words.
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
    attacks: tuple[Attack, ...] = ()
    not_run: tuple[str, ...] = ()

    def print(self, console: Console) -> None:
        """Show the main scores; with attacks, those of the people to forget without one first."""
        asked = [("none", self.scores)]
        if self.attacks:
            plain = {name: s for name, s in self.scores.items() if _PLAIN.match(name)}
            asked = [("none", plain), *((a.name, a.scores) for a in self.attacks)]
        rows = [
            (attack, name, score.n, score)
            for attack, scores in asked
            for name, score in sorted(scores.items())
            if _SHOWN.search(name) is not None
        ]
        header = ("attack", "score", "n", "value [95 % interval]")
        first = 0 if self.attacks else 1
        console.print(Grid(header[first:], [row[first:] for row in rows]).rich())
        sentences = [f"{len(self.scores)} scores of {self.part} questions; --json has all."]
        sentences += [f"Not run: {'; '.join(self.not_run)}."] if self.not_run else []
        sentences += [shots_left_out(self.scores) or ""]
        sentences += [(doubt(self.scores) if self.model == "base" else None) or ""]
        console.print("\n".join(filter(None, sentences)), markup=False, soft_wrap=True)


def score_model(
    config: ScoringConfig, attacked: bool, tell: Callable[[str], None] = lambda line: None
) -> ModelScores:
    """Score a model.

    Args:
        config: which, and how.
        attacked: also run the attacks that a deployment record names.
        tell: shows a line of progress.

    Raises:
        InputError: bad input, or an adapter or base that is not the recorded one.
    """
    from vgid.cluster.resources import worker_threads
    from vgid.trial import TrialSession

    file, adapter = _find(config.target)
    deployment = None if file is None else _recorded(config, file, adapter)
    with ExitStack() as stack:
        stack.enter_context(worker_threads())
        request = _request(config, file, deployment, stack)
        tell(f"Loading {request.backbone}")
        session = TrialSession(request)
        backbone = session.backbone
        if deployment is not None and backbone.revision != deployment.base.revision:
            raise InputError(f"{file}: its base is another; name the right one with --model-path.")
        if config.protocol == "benchmark":
            backbone.spec = replace(
                backbone.spec, few_shot=BENCHMARK_SHOTS, option_scoring="letter"
            )
        seeds = pick_seeds(request.seed, config.seeds or (3 if attacked else 1))
        tell(f"Scoring, {len(seeds)} seeds")
        part = config.part or ("all" if config.protocol == "benchmark" else PART)
        attacks: tuple[Attack, ...] = ()
        not_run: tuple[str, ...] = ()
        if attacked:
            scored = score_with_seeds(session, seeds, adapter)
            scores, (attacks, not_run) = dict(scored.plain), attacks_of(scored)
        else:
            runs = [session.scores_under(part, seed, adapter_dir=adapter) for seed in seeds]
            scores = pooled(runs)
        return ModelScores(
            model="deployment" if deployment else "adapter" if adapter else "base",
            backbone=request.backbone,
            base_revision=backbone.revision,
            adapter_files={} if adapter is None else hash_files(adapter),
            data_sha256=session.benchmark.sha256,
            forget_ratio=request.forget_ratio,
            retain_people=request.retain_people,
            seed=request.seed,
            seeds=seeds,
            protocol=config.protocol,
            part=part,
            option_scoring=backbone.spec.option_scoring,
            scores=scores,
            attacks=attacks,
            not_run=not_run,
        )


def _find(target: Path | None) -> tuple[Path | None, Path | None]:
    """The deployment file and the adapter of a target, as far as it has them."""
    if target is None:
        return None, None
    if target.is_file():
        return target, read_deployment(target)[0].adapter_folder(target)
    if (target / DEPLOYMENT).is_file():
        return target / DEPLOYMENT, target / ADAPTER
    if (target / CONFIG).is_file():
        return None, target
    raise InputError(
        f"{target}: is no deployment file, no export's folder and no PEFT adapter; name one, or "
        "leave it out to score the base."
    )


def _recorded(config: ScoringConfig, file: Path, adapter: Path | None) -> Deployment:
    """The record of a deployment whose adapter is as recorded."""
    given = [
        f"--{name.replace('_', '-')}" for name in _REQUEST if getattr(config, name) is not None
    ]
    if given:
        raise InputError(f"{given[0]}: is in the record of {file}; leave it out.")
    deployment, _ = read_deployment(file)
    assert adapter is not None
    check_adapter(deployment, file, adapter)
    return deployment


def _request(
    config: ScoringConfig, file: Path | None, deployment: Deployment | None, stack: ExitStack
) -> RequestConfig:
    """Whose questions are asked; the embedded backbone's benchmark is made for the purpose."""
    store = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vgid-scores-")))
    if file is not None and deployment is not None:
        found = recorded_benchmark(deployment, file, config.data, optional=False)
        data = stack.enter_context(found)
        assert data is not None
        return request_of(deployment, data, store, config.model_path)
    backbone, data = config.backbone or "tiny-llava", config.data
    if data is None:
        if not spec(backbone).embedded:
            raise InputError("--data: name the benchmark folder.")
        from vgid.data.synthetic import write_benchmark

        data = store / "data"
        write_benchmark(data)
    given = {name: getattr(config, name) for name in _REQUEST}
    values = {name: value for name, value in given.items() if value is not None}
    values |= {"backbone": backbone, "model_path": config.model_path, "data": data, "store": store}
    return parse(RequestConfig, values, "command line")
