"""Scores of any model and attacks on it: a base, an adapter on it, or a deployment.

A deployment is scored on the people and questions of its own record, so that the same command gives
its numbers again; everything else takes a forget request. Scored is the adapter on its base, not an
export's merged weights.
"""

import re
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from rich.console import Console

from vgid.config import Config, ForgetRatio, ModelPath, RequestConfig, parse
from vgid.deployment.record import Attack, Deployment, hash_files, read_deployment
from vgid.deployment.verify import EXPORTED, EXPORTED_ADAPTER, recorded_benchmark, request_of
from vgid.errors import InputError
from vgid.evaluation.suppression import doubt
from vgid.flags import Flag
from vgid.models.adapter_files import CONFIG
from vgid.models.backbones import BENCHMARK_SHOTS, spec
from vgid.report.tables import Grid
from vgid.results import QuestionPart, Score, shots_left_out

_REQUEST = ("backbone", "forget_ratio", "retain_people", "seed")
"""What a deployment's record says itself."""

_SHOWN = re.compile(
    r"_(rougeL|bleu|refusal|cloze|classification|memorisation)(_shots)?(_text|_raw)*$"
)
"""Scores of the printed tables, by what follows the split."""

_PLAIN = re.compile(r"(forget|earlier)_(?!.*(_text|_raw)$)")
"""Scores of the people to forget, asked as the benchmark asks about a portrait."""


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
        seeds: of few-shot people, test poses and bootstrap, pooled (``candidates.pooled``).
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
    from vgid.deployment.candidates import PART, attacks_of, pick_seeds, pooled, score_with_seeds
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
    if (target / EXPORTED).is_file():
        return target / EXPORTED, target / EXPORTED_ADAPTER
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
    if adapter is None or hash_files(adapter) != deployment.adapter.files:
        raise InputError(f"{adapter}: is not the adapter of {file}; see `vgid verify {file}`.")
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
