"""Typed configurations, validated at the door: a forget request, a trial, a study, a base.

Everything is frozen, unknown keys are rejected, and ``parse`` turns pydantic's report into the one
sentence that a user needs.
"""

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    field_validator,
    model_validator,
)

from vgid.credentials import without_credentials
from vgid.errors import InputError
from vgid.files import ReadFolder, StudyFolder, StudyName, UsablePath, WrittenFolder
from vgid.prompts import PromptStyle, Task
from vgid.requirement import OBJECTIVES, Requirement

NoiseType = Literal["random", "gaussian", "white"]
# Beyond two pixel ranges, clipped Gaussian noise is black-and-white noise and changes no more.
MAX_SIGMA = 2.0

ResponseSource = Literal["teacher", "reference", "mixed"]
# Of the paper's Table 3 (``vgid.method.methods``); ``icu_t`` and ``noise_t`` are VGID with only the
# instruction and only the perturbation.
Method = Literal[
    "vgid", "icu_t", "noise_t", "ga", "ga_diff", "kl_min", "po_idk", "po_dpo", "npo", "rmu"
]
ForgetRatio = Literal[5, 10, 15]
TrainWording = Literal["both", "wrapped", "raw"]
# Which pairs of ``ft_Data`` unlearning trains on: without those that are held-out questions, so
# that a held-out score tells of questions that training never saw; or all, as the public code does.
TrainPairs = Literal["unheld", "all"]
Sampler = Literal["auto", "gp", "tpe", "random"]

# Ids of people and requests, from the benchmark's rows to the record of a deployment.
PSEUDONYM = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"


@dataclass(frozen=True)
class Flag:
    """How a field is given on a command line, where name, type and default do not tell.

    It stands among the field's annotations, for ``vgid.command_line``.
    """

    metavar: str | None = None  # stands for the value in the help; None: by the type
    name: str | None = None  # the flag, or a word for an argument without one; None: the field's
    read: Callable[[str], Any] | None = None  # makes the value of the text; None: by the type
    required: bool = True  # whether a field without default must be given


def words(text: str) -> tuple[str, ...]:
    """Parse a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def seconds(text: str) -> float:
    """Parse a duration: ``90``, ``90s``, ``10m``, ``1.5h``; ``ArgumentTypeError`` for all else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration, write for example 10m")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def count_or_auto(text: str) -> int | None:
    """Parse a count, or ``auto``, which leaves it open; ``ArgumentTypeError`` for all else."""
    if text.strip() == "auto":
        return None
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no count, write a number or auto")
    return int(text)


def scales(text: str) -> tuple[float, ...]:
    """Parse a list of adapter scales, ``0.7,0.85``, or ``off``, which is none.

    ``ArgumentTypeError`` for all else.
    """
    try:
        return () if text.strip() == "off" else tuple(map(float, words(text)))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 0.7,0.85, nor off") from None


def told_apart(scales: tuple[float, ...]) -> tuple[float, ...]:
    """Scales as candidates' ids have them; ``ValueError`` if two are one, or the trial itself."""
    written = [f"{scale:g}" for scale in scales]
    if len({*written, "1"}) <= len(scales):
        raise ValueError("name each scale once, and not 1, which is the trial itself")
    return tuple(map(float, written))


def whole_above_one(gpus: float) -> float:
    """GPUs of a worker, of which Ray shares a single one only; ``ValueError`` for 1.5 and such."""
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"{gpus:g} is no share of one GPU and no whole number; write 0.5 or 2")
    return gpus


# Fields that several configs have, and so flags that several commands have.
BackboneName = Annotated[
    str, Flag("NAME"), Field(description="base model, a row of vgid/models/backbones.py")
]
ModelPath = Annotated[
    str | None, Flag("DIR"), Field(description="folder or hub id of its weights, if not the row's")
]
RatioToForget = Annotated[ForgetRatio, Field(description="per cent of the people to forget")]
RetainPeople = Annotated[
    int, Field(ge=2, description="scored retain people, half of them trained on; and celebrities")
]
PairsToTrain = Annotated[
    TrainPairs, Field(description="training questions: all, or without the held-out ones")
]
SkipDefects = Annotated[
    bool, Field(description="leave out and count what is defective: questions, people's portraits")
]
SplitSeed = Annotated[
    int, Flag("S"), Field(ge=0, description="seed of the splits of people and questions")
]
SearchSpaceFile = Annotated[
    UsablePath | None, Flag("FILE"), Field(description="searched, if not search_spaces/NAME.yaml")
]
SamplerName = Annotated[
    Sampler,
    Field(description="gp: Gaussian process, TPE for sigma; auto: gp for the first 100 trials"),
]
MaxConcurrent = Annotated[
    int | None,
    Flag("K", read=count_or_auto),
    Field(
        ge=1,
        description="trials at a time, which an autoscaler is asked for, or auto: what cores, GPUs "
        "and memory of the cluster's nodes hold, while they come and go (default: auto)",
    ),
]
WorkersPerTrial = Annotated[
    int, Flag("W"), Field(ge=1, description="data-parallel workers of a trial")
]
GpusPerWorker = Annotated[
    float,
    Flag("G"),
    Field(ge=0, description="GPUs of each worker, or a share of one, such as 0.25"),
    AfterValidator(whole_above_one),
]
Required = Annotated[str, AfterValidator(lambda text: str(Requirement.read(text)))]
# Of an adapter: a trained W + BA becomes W + scale * BA.
Scale = Annotated[float, Field(gt=0, le=2)]
Harvest = Annotated[
    tuple[Scale, ...],
    Flag("SCALES", read=scales),
    Field(
        description="scales of a trained adapter that are candidates for the front beside the "
        "trial itself, such as 0.7,0.85 (milder) or 1.2 (stronger); off: none"
    ),
    AfterValidator(told_apart),
]
# Reach from the mild end of a trial's curve to the strong one; finer ones add next to nothing, and
# neither do its epochs (tests/benchmarks/README.md).
LADDER = (0.6, 0.7, 0.8, 0.9, 1.2)
C = TypeVar("C", bound="Config")

_DISTILLING: tuple[Method, ...] = ("vgid", "icu_t", "noise_t")
_RETAINING: tuple[Method, ...] = (*_DISTILLING, "ga_diff", "kl_min", "rmu")

# Which methods use a field of ``TrialConfig``; fields that are not named here belong to all.
USED_BY: dict[str, tuple[Method, ...]] = {
    "beta": _RETAINING,
    "retain_batch_size": _RETAINING,
    "noise_type": ("vgid", "noise_t"),
    "sigma": ("vgid", "noise_t"),
    "prompt_style": ("vgid", "icu_t"),
    "response_source": _DISTILLING,
    "released": ("vgid",),
    "preference_beta": ("po_dpo", "npo"),
    "rmu_layer": ("rmu",),
    "rmu_steering": ("rmu",),
}
# What ``released`` makes the defaults: the public script's (``vgid.method.released``).
RELEASED: dict[str, Any] = {
    "learning_rate": 5e-4, "epochs": 5, "batch_size": 4, "lora_rank": 16, "lora_dropout": 0.05,
}  # fmt: skip
# What the public script trains on, and so every ``released`` trial.
RELEASED_SAMPLES: dict[str, Any] = {"train_tasks": ("generation",), "train_wording": "raw"}
# What the public script has no setting for; ``released`` trials ignore them.
NOT_RELEASED = (
    "noise_type", "sigma", "prompt_style", "response_source", "views", "retain_batch_size",
    "max_grad_norm", "warmup_fraction", "questions_per_image", "gradient_accumulation",
)  # fmt: skip
# The paper's default setting of VGID and its ablations (section 4.1), as far as they use it.
PAPER_DEFAULT: dict[str, Any] = {
    "alpha": 1.0, "beta": 1.0, "noise_type": "random", "prompt_style": "strict",
}  # fmt: skip
# The paper's setting of the other methods (Table 7).
PAPER_BASELINE: dict[str, Any] = {"alpha": 1.0, "learning_rate": 2e-5, "epochs": 1, "batch_size": 4}


def uses(method: Method, field: str) -> bool:
    """Whether ``method`` uses a field of ``TrialConfig``; if not, the field keeps its default."""
    return method in USED_BY.get(field, (method,))


class Config(BaseModel):
    """A frozen configuration that refuses keys it does not know."""

    # Infinity keeps every lower bound, and JSON has neither it nor NaN.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Asked(Config):
    """What a study is asked and hands on to each of its trials: the model, whom, and how scored."""

    backbone: BackboneName = "tiny-llava"
    model_path: ModelPath = None
    forget_ratio: RatioToForget = 5
    retain_people: RetainPeople = 50
    train_pairs: PairsToTrain = "unheld"
    skip_defects: SkipDefects = False
    eval_batch_size: int = Field(
        512, ge=1, description="questions answered together at most; fewer take less memory"
    )
    store_limit_gb: Annotated[float, Flag("GB")] = Field(
        50.0, gt=0, description="disk for teacher targets and image features"
    )
    log_responses: bool = Field(
        False, description="keep questions and responses, personal data, beside the adapters"
    )
    require: Annotated[tuple[Required, ...], Flag("BOUND")] = Field(
        (),
        description="bounds that trials on the front keep, on the search questions, such as "
        "'retain_rougeL>=0.97*base' and 'forget_cloze<=0.3'",
    )
    harvest: Harvest = ()
    objectives: Annotated[tuple[str, ...], Flag("SCORE")] = Field(
        OBJECTIVES,
        min_length=2,
        max_length=4,
        description="scores that the front is made of, on the search questions: of people to "
        "forget less is better, of all others more",
    )
    halving: Annotated[int, Flag("ETA")] = Field(
        1,
        ge=1,
        description="behind epochs 1, ETA, ETA squared and so on a trial is stopped if it is not "
        "among the best 1/ETA that came so far (successive halving); 1 stops none",
    )

    @field_validator("objectives")
    @classmethod
    def _each_once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len({*names}) < len(names):
            raise ValueError("name each score once")
        return names


class RequestConfig(Asked):
    """A forget request, the same for all trials of a study: which model forgets whom."""

    data: Path = Field(description="benchmark folder in the MLLMU-Bench layout")
    forget_ids: tuple[str, ...] | None = Field(
        None, min_length=1, description="person IDs to forget among those; None: all of them"
    )
    earlier_ids: tuple[str, ...] = Field(
        (), description="suppressed by an earlier request: not retained, scored as split `earlier`"
    )
    deployed_adapter: Path | None = Field(None, description="its adapter, part of the base here")
    store: Path = Field(description="folder of the teacher store, shared by all trials")
    seed: SplitSeed = 0
    bootstrap_samples: int = Field(1000, ge=100, description="resamples behind each interval")

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that results depend on: part of the name of kept scores."""
        # Not where data and weights lie: what they hold is named by hashes.
        places = {"data", "store", "store_limit_gb", "model_path", "deployed_adapter"}
        of_trials = {"log_responses", "require", "harvest", "objectives", "halving"}
        return self.model_dump(mode="json", exclude=places | of_trials)


class TrialConfig(Config):
    """One trial: a method's hyperparameters (paper sections 3.4 and A.3.2) and the optimiser's.

    Every method minimises ``alpha * forget + beta * retain``. So ``beta`` is also what the paper
    calls lambda in equation 7, beta in equation 8 and gamma in equation 15.

    The paper gives no learning rate, LoRA or batch size for VGID; the defaults here were measured
    on ``tiny-llava`` (search_spaces/README.md).
    """

    method: Method = "vgid"
    alpha: float = Field(1.0, ge=0, description="weight of the forget loss, equation 5")
    beta: float = Field(
        1.0, ge=0, description="weight of the retain loss, equation 5; not for methods without one"
    )
    noise_type: NoiseType = Field("random", description="visual perturbation P_phi, section 3.3")
    sigma: float | None = Field(
        None, gt=0, le=MAX_SIGMA, description="of Gaussian noise, in units of a [0, 1] pixel range"
    )
    prompt_style: PromptStyle = Field("strict", description="instruction t_ic, Appendix A.1")
    learning_rate: float = Field(1e-3, gt=0, le=1)
    response_source: ResponseSource = Field(
        "mixed",
        description="tokens y of the forget KL, which the paper leaves open: the teacher's own "
        "answer, the reference or each in turn (measured: tests/benchmarks/choices.py)",
    )
    preference_beta: float = Field(
        0.1, gt=0, description="inverse temperature of po_dpo and npo: beta of equations 9 and 10"
    )
    rmu_layer: int | None = Field(
        None, ge=1, description="whose output rmu steers, from 1; None: at a third of the depth"
    )
    rmu_steering: float = Field(
        5.0, gt=0, description="lambda of equation 12: rmu's target in lengths of the base's state"
    )
    train_tasks: tuple[Task, ...] = Field(
        ("generation", "cloze"), min_length=1, description="task forms in the training batches"
    )
    train_wording: TrainWording = Field(
        "both",
        description="generation questions in training: in the evaluation's answer instructions "
        "(wrapped), as they stand and users ask (raw), or each in both ways",
    )
    views: int = Field(
        1,
        ge=1,
        description="of each forget portrait, step after step: the original, which alone is the "
        "paper's method, and others turned, shifted and lit, so that no one picture is forgotten",
    )
    lora_rank: int = Field(8, ge=1, le=1024)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    epochs: int = Field(6, ge=1, description="passes over the forget set")
    batch_size: int = Field(12, ge=1, description="forget questions a step, over all workers")
    retain_batch_size: int = Field(12, ge=1, description="retain questions a step")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="of all steps")
    adapter_scale: Scale = Field(
        1.0, description="of the trained adapter: below 1 it forgets less and keeps more"
    )
    questions_per_image: int = Field(
        1,
        ge=1,
        description="of a portrait one after the other in a batch, sharing its image tokens: more "
        "is faster on real images, and less varied",
    )
    gradient_checkpointing: bool = False
    gradient_accumulation: int = Field(
        1,
        ge=1,
        description="parts that a batch is computed in, to save memory; the same loss without "
        "lora_dropout, whose masks are each part's own",
    )
    released: bool = Field(
        False, description="the public script's variant, with its defaults (vgid.method.released)"
    )
    seed: int = Field(0, ge=0, description="adapter initialisation, batch order, noise")

    @property
    def used(self) -> dict[str, Any]:
        """The fields that the method uses, by name: what a trial is described by."""
        names = [k for k in type(self).model_fields if uses(self.method, k)]
        return {k: getattr(self, k) for k in names if not (self.released and k in NOT_RELEASED)}

    @model_validator(mode="before")
    @classmethod
    def _released_defaults(cls, values: Any) -> Any:
        released = isinstance(values, Mapping) and values.get("released") is True
        return {**RELEASED, **values, **RELEASED_SAMPLES} if released else values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in USED_BY:
            default = type(self).model_fields[name].default
            if not uses(self.method, name) and getattr(self, name) != default:
                raise ValueError(f"{name}: method '{self.method}' does not use it; leave it out")
        if self.released and self.views > 1:
            raise ValueError("views: the public script's variant has the original only; leave it 1")
        if self.noise_type == "gaussian" and self.sigma is None:
            raise ValueError("sigma: noise type 'gaussian' needs a sigma, such as 0.8")
        if self.noise_type != "gaussian" and self.sigma is not None:
            raise ValueError(f"sigma: noise type '{self.noise_type}' has none; leave it out")
        return self


class StudyConfig(Asked):
    """One study: the trials over a forget request, and how they are run and recorded."""

    data: Annotated[ReadFolder | None, Flag("DIR")] = Field(
        None,
        description="benchmark in the MLLMU-Bench layout, or an address such as s3://bucket/folder;"
        " without it, synthetic in OUTPUT/data",
    )
    output: Annotated[StudyFolder, Flag("DIR", required=False)] = Field(
        description="folder of the study, new or to be resumed; without it, runs/NAME-1 and so on"
    )
    from_deployment: Annotated[UsablePath | None, Flag("FILE")] = Field(
        None,
        description="deployment to start from: its adapter is part of the frozen base, its people "
        "are scored as split `earlier`; without it, the base alone",
    )
    from_deployment_sha256: str | None = Field(None, description="of that file, as the plan saw it")
    warm_start: Annotated[StudyName | None, Flag("DIR|mlflow:RUN")] = Field(
        None,
        description="earlier study, of any backbone or forget ratio, whose front's best settings "
        "are tried first; without it, none",
    )
    search_space: SearchSpaceFile = None
    method: Method = Field("vgid", description="unlearning method")
    trials: int = Field(60, ge=1, description="trials of the whole study, over all resumes")
    seed: Annotated[int, Flag("S")] = Field(
        0, ge=0, description="seed of the search, every trial and splits of people and questions"
    )
    sampler: SamplerName = "auto"
    harvest: Harvest = LADDER
    time_budget_s: Annotated[float | None, Flag("TIME", "--time-budget", seconds)] = Field(
        None,
        gt=0,
        description="start no trial after this long, such as 90s, 10m or 2h; without it, no limit",
    )
    stop_when_flat: Annotated[int | None, Flag("K")] = Field(
        None,
        ge=1,
        description="start no trial once K in a row have added less than 0.005 of the hypervolume; "
        "without it, all run",
    )
    max_concurrent: MaxConcurrent = None
    workers_per_trial: WorkersPerTrial = 1
    gpus_per_worker: GpusPerWorker = 0
    tracking_uri: Annotated[
        str | None,
        Flag("URI"),
        # With credentials in memory only, never where it is written.
        PlainSerializer(lambda uri: None if uri is None else without_credentials(uri)),
    ] = Field(
        None, repr=False, description="MLflow server or database; without it, OUTPUT/mlflow.db"
    )
    fresh_workers: bool = Field(False, description="new worker processes for every trial (slow)")


class FinetuneConfig(Config):
    """How the vanilla model is made (``vgid.bases.finetune``)."""

    backbone: BackboneName
    model_path: ModelPath = None
    data: Annotated[ReadFolder, Flag("DIR")] = Field(
        description="benchmark folder in the MLLMU-Bench layout; its ft_Data is learnt"
    )
    output: Annotated[WrittenFolder, Flag("DIR")] = Field(description="new folder for the model")
    full: bool = Field(False, description="train the whole language model in place of an adapter")
    lora_rank: int | None = Field(
        None, ge=1, le=1024, description="rank of the adapter that is merged in; without it, 16"
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    epochs: int = Field(5, ge=1, description="passes over all questions")
    learning_rate: float = Field(2e-5, gt=0, le=1, description="peak of the linear schedule")
    batch_size: int = Field(4, ge=1, description="questions a step")
    questions_per_image: int = Field(1, ge=1, description="that come together, sharing its image")
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    warmup_fraction: float = Field(0.1, ge=0, le=1, description="of all steps")
    gradient_checkpointing: bool = Field(
        False, description="compute activations twice: less memory"
    )
    workers: Annotated[int, Flag("W")] = Field(
        1, ge=1, description="GPUs of this machine that share it; with --full, its weights too"
    )
    seed: Annotated[int, Flag("S")] = Field(
        0, ge=0, description="adapter initialisation, order of the questions"
    )

    @model_validator(mode="after")
    def _full_has_no_adapter(self) -> Self:
        if self.full and (self.lora_rank is not None or self.lora_dropout):
            raise ValueError("full: there is no adapter to give a rank or dropout; leave one out")
        return self

    @property
    def rank(self) -> int:
        """LoRA rank, where there is an adapter."""
        return 16 if self.lora_rank is None else self.lora_rank


def parse(model: type[C], values: Mapping[str, Any], source: str) -> C:
    """Validate ``values``; ``InputError`` names their source, the field and what is wrong."""
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        # The first is enough: what is wrong behind it often follows from it.
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            message = f"unknown key; known keys are {', '.join(sorted(model.model_fields))}"
        elif first["type"] not in ("value_error", "missing"):
            message = f"{message[0].lower()}{message[1:]}, got {first['input']!r}"
        where = f"{source}: {field}" if field else source
        raise InputError(f"{where}: {message}.") from None


def derived(model: type[C], source: Config, where: str, **own: Any) -> C:
    """``source``'s fields of the same names, and ``own`` in their place, through ``parse``."""
    shared = model.model_fields.keys() & type(source).model_fields.keys()
    return parse(model, {name: getattr(source, name) for name in shared} | own, where)


def paper_default(method: Method) -> dict[str, Any]:
    """The paper's setting of a method: where a study starts whose file names no first points."""
    distilling = uses(method, "response_source")
    setting = PAPER_DEFAULT if distilling else PAPER_BASELINE
    return {name: value for name, value in setting.items() if uses(method, name)}


def is_paper_default(trial: TrialConfig) -> bool:
    """Whether a trial runs the paper's setting of its method, as far as the paper gives one."""
    return all(getattr(trial, k) == value for k, value in paper_default(trial.method).items())
