"""A fair comparison of the methods, which the paper has not: equal budgets, then the fronts.

Each method and seed gets a study of its own, all with the same number of trials, sampler, people,
questions and reference point. Trials are chosen on the search questions; what is compared is the
held-out score of what was chosen.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import Field

from vgid.config import Flag, Method, StudyConfig, TrialConfig, derived, parse, words
from vgid.errors import InputError
from vgid.evaluation.suppression import MIN_FORGET, doubt
from vgid.files import StudyFolder, write_atomically
from vgid.paper.figures import Points, attainment_picture
from vgid.paper.settings import write_settings
from vgid.provenance import provenance
from vgid.report.intervals import Interval, count_seeds, paired_interval, t_interval
from vgid.report.page import rendered, write_picture
from vgid.report.records import METHOD_LABELS, write_study
from vgid.report.tables import Grid, four_cells
from vgid.study.finished import PICK_SCORES, Source
from vgid.study.ledger import MUST_AGREE


class CompareConfig(StudyConfig):
    """A comparison of methods by studies of equal size; VGID's lead is told if it is among them.

    What it says as a study goes for each of them, but for ``NOT_ASKED``.
    """

    methods: Annotated[
        tuple[Method, ...],
        Flag("LIST", read=lambda text: get_args(Method) if text == "all" else words(text)),
    ] = Field(get_args(Method), min_length=1, description="such as vgid,po_dpo,npo, or all")
    trials: int = Field(24, ge=1, description="trials of each study")
    seeds: int = Field(3, ge=1, description="studies a method, from seed 0 on")
    output: Annotated[StudyFolder, Flag("DIR")] = Field(
        description="folder, new or to go on with: studies that it holds are used"
    )
    retain_drop: Annotated[float, Flag("D")] = Field(
        0.02, ge=0, description="largest loss of retain ROUGE-L that a method's best point may have"
    )


NOT_ASKED = (
    "method", "seed", "from_deployment", "from_deployment_sha256", "time_budget_s", "tracking_uri",
    "fresh_workers", "log_responses", "require", "stop_when_flat",
    "warm_start",
)  # fmt: skip
"""Fields of a study that a comparison sets itself, or leaves as they are."""


def study_of(config: CompareConfig, method: Method, seed: int, data: Path) -> StudyConfig:
    """The study of a method and seed: what the comparison says, in a folder of its own."""
    output = config.output / "studies" / f"{method}-{seed}"
    own = {"method": method, "seed": seed, "data": data, "output": output}
    return derived(StudyConfig, config, "comparison", **own)


def run_missing(studies: Sequence[StudyConfig]) -> dict[str, Any] | None:
    """Run the studies that are not done, or go on with them, on one Ray cluster.

    Gives ``interrupted`` and ``error`` of a study that has not all that it should have. InputError
    comes before anything is started, if it is in what can be checked before.
    """
    missing = [study for study in studies if not _done(study)]
    if not missing:
        return None
    from vgid.cluster.connection import connected
    from vgid.study.plan import make_plan
    from vgid.study.run import run_study

    for study in missing:
        if study.seed == 0:  # what is wrong with one seed's is wrong with all
            make_plan(study)

    with connected():  # the studies join it and save a start each
        for number, study in enumerate(missing, start=1):
            print(f"Study {number} of {len(missing)}: {study.method}, seed {study.seed}")
            resume = (study.output / "trials" / "study.json").exists()
            summary = run_study(study, resume=resume)
            if summary["interrupted"] or summary["error"]:
                return {name: summary[name] for name in ("interrupted", "error")}
    return None


def _done(study: StudyConfig) -> bool:
    """Whether this very study has ended; one that was asked for otherwise is to be resumed."""
    try:
        summary = json.loads((study.output / "study.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if "config" not in summary:
        return not summary["interrupted"]  # ``read_study`` says that it is damaged
    ran = parse(StudyConfig, summary["config"], f"{study.output / 'study.json'}: config")
    # Where data and weights lie may change; ``_check_same_questions`` notices what they hold.
    decisive = {*MUST_AGREE, "trials", "sampler"} - {"data", "model_path"}
    same = all(getattr(ran, name) == getattr(study, name) for name in decisive)
    return same and not summary["interrupted"] and summary.get("error") is None


def _check_same_questions(found: Sequence[Source]) -> None:
    first: dict[int, Source] = {}
    for study in found:
        other = first.setdefault(study.config.seed, study)
        if study.base != other.base:
            raise InputError(
                f"studies {other.name} and {study.name}: the base model scores differently in "
                "both, so data, weights or settings changed in between; delete the folders of "
                "both and run them again."
            )


@dataclass(frozen=True)
class Standing:
    """How one method stands, over the ``studies`` of its seeds.

    Attributes:
        held_out: hypervolume of each study's front on the held-out questions.
        lead: VGID's held-out hypervolume minus this method's, paired; None for VGID itself.
        picks: held-out scores of each seed's pick, None where no trial kept the constraint.
    """

    method: Method
    studies: Sequence[Source]
    held_out: tuple[float, ...]
    lead: Interval | None
    picks: tuple[dict[str, float] | None, ...]

    @property
    def name(self) -> str:
        """Of the method, for people."""
        return METHOD_LABELS[self.method]

    @property
    def search(self) -> Interval:
        """Hypervolume on the search questions over the seeds."""
        return t_interval(study.hypervolume("search") for study in self.studies)

    @property
    def volume(self) -> Interval:
        """Held-out hypervolume over the seeds."""
        return t_interval(self.held_out)

    def pick(self, score: str) -> Interval:
        """A held-out score of the picks, over the seeds that have one."""
        return t_interval(None if pick is None else pick.get(score) for pick in self.picks)


def standings(found: Sequence[Source], retain_drop: float) -> list[Standing]:
    """Every method's standing, by mean held-out hypervolume, the largest first."""
    by_method: dict[Method, list[Source]] = {}
    for study in sorted(found, key=lambda study: study.config.seed):
        by_method.setdefault(study.config.method, []).append(study)
    volumes = {m: tuple(s.hypervolume("held_out") for s in of) for m, of in by_method.items()}
    listed = []
    for method, held_out in volumes.items():
        ours = volumes.get("vgid") if method != "vgid" else None
        lead = paired_interval(ours, held_out) if ours is not None else None
        picks = tuple(_pick_scores(study, retain_drop) for study in by_method[method])
        listed.append(Standing(method, by_method[method], held_out, lead, picks))
    return sorted(listed, key=lambda standing: -standing.volume.value)


def _pick_scores(study: Source, retain_drop: float) -> dict[str, float] | None:
    trial = study.pick(retain_drop)
    if trial is None or trial.held_out is None:
        return None
    scores, base = trial.held_out, study.base["held_out"]
    return {
        **scores,
        "forget_reduction_share": 1 - scores["forget_rougeL"] / base["forget_rougeL"].value,
        "retain_drop": base["retain_rougeL"].value - scores["retain_rougeL"],
    }


def chosen_settings(listed: Sequence[Standing], retain_drop: float) -> dict[Method, TrialConfig]:
    """One setting a method, for the tables: of the seeds' picks the one with the median reduction.

    Where no trial of any seed keeps the constraint, the one that breaks it least.
    """
    chosen: dict[Method, TrialConfig] = {}
    for one in listed:
        picks = [pick for study in one.studies if (pick := study.pick(retain_drop)) is not None]
        every = [(study, trial) for study in one.studies for trial in study.front]
        if picks:
            middle = statistics.median_high(pick.point[0] for pick in picks)
            chosen[one.method] = next(p.config for p in picks if p.point[0] == middle)
        elif every:
            drops = [s.base["search"]["retain_rougeL"].value - trial.point[1] for s, trial in every]
            chosen[one.method] = every[drops.index(min(drops))][1].config
    return chosen


def verdict(listed: Sequence[Standing]) -> str:
    """Which method won, and from which others the seeds can tell it.

    To lead every other method is an intersection-union test, as in ``vgid.paper.claims``, so each
    interval stands for itself.
    """
    leads = {one.name: paired_interval(listed[0].held_out, one.held_out) for one in listed[1:]}
    return rendered("vgid.paper", "verdict.txt.jinja", listed=listed, leads=leads).strip()


def write_comparison(config: CompareConfig, found: Sequence[Source]) -> dict[str, Any]:
    """Write report, numbers, picture and settings; returns the content of ``comparison.json``."""
    _check_same_questions(found)
    output = config.output
    listed = standings(found, config.retain_drop)
    fronts: dict[Method, list[Points]] = {
        s.method: [study.held_out_points for study in s.studies] for s in listed
    }
    seeds = {study.config.seed: study for study in found}.values()
    base = statistics.fmean(study.base["held_out"]["retain_rougeL"].value for study in seeds)
    title = f"Attainment on {config.backbone}, {config.trials} trials, {count_seeds(config.seeds)}"
    picture = attainment_picture(title, fronts, (0.0, base))
    files = write_picture(output, "attainment", picture, beside=True)
    settings = chosen_settings(listed, config.retain_drop)
    write_settings(output / "settings.json", config.backbone, settings)
    write_atomically(output / "comparison.csv", _csv(listed))
    write_atomically(output / "comparison.md", _report(config, found, listed).encode())
    summary = {
        "config": config,
        **provenance(),
        "interrupted": False,
        "verdict": verdict(listed),
        "held_out_hypervolume": {s.method: list(s.held_out) for s in listed},
        "reference_point": {s.config.seed: list(s.reference("held_out")) for s in seeds},
        "files": [*files, "settings.json", "comparison.csv", "comparison.md", "comparison.json"],
    }
    write_study(output / "comparison.json", summary)
    return summary


def _csv(listed: Sequence[Standing]) -> bytes:
    rows: list[list[Any]] = []
    for standing in listed:
        measures = {"hypervolume_search": standing.search, "hypervolume_held_out": standing.volume}
        if standing.lead is not None:
            measures["vgid_lead_held_out"] = standing.lead
        for score in (*PICK_SCORES, "forget_reduction_share", "retain_drop"):
            measures[f"pick_{score}"] = standing.pick(score)
        rows += [[standing.method, name, *four_cells(value)] for name, value in measures.items()]
    return Grid(["method", "measure", "mean", "low", "high", "seeds"], rows).csv()


def _report(config: CompareConfig, found: Sequence[Source], listed: Sequence[Standing]) -> str:
    doubts = {study.config.seed: doubt(study.base["search"]) for study in found}
    return rendered(
        "vgid.paper",
        "comparison.md.jinja",
        config=config,
        verdict=verdict(listed),
        doubts=[(seed, told) for seed, told in sorted(doubts.items()) if told is not None],
        seeds=count_seeds(config.seeds),
        listed=listed,
        celebrities=any(one.pick("celebrity_rougeL").n for one in listed),
        least=MIN_FORGET,
    )
