"""A run without a model: everything that a study asks and trains on, framed and tokenised."""

from collections.abc import Hashable, Iterator, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from vgid.config import RequestConfig, TrialConfig, parse
from vgid.data.benchmark import Benchmark, Person, split_questions
from vgid.data.layout import FORGET_RATIOS, Defect
from vgid.data.splits import People, choose_people, held_out_of_training
from vgid.errors import InputError, SampleError
from vgid.evaluation.questions import prepare
from vgid.method.samples import TrainingSample, training_samples
from vgid.method.teacher import Intervention, intervene, response_room
from vgid.models.backbones import Backbone, outline
from vgid.models.encoding import encode
from vgid.prompts import PromptStyle, Task
from vgid.results import QuestionPart

DEFAULT_TRIAL = TrialConfig.model_validate({})
ALL_TRAINING = TrialConfig.model_validate({"train_tasks": get_args(Task), "train_wording": "both"})


class Rehearsal:
    """Requests over the same data, one after the other; what passed is not looked at again.

    ``everyone`` adds whom another seed would choose: retain people, celebrities, training pairs.
    """

    def __init__(self, backbone: Backbone, benchmark: Benchmark, everyone: bool = False) -> None:
        self.backbone, self.benchmark, self.everyone = backbone, benchmark, everyone
        self._passed: set[Hashable] = set()

    def defects(
        self, request: RequestConfig, trials: Sequence[TrialConfig] = (DEFAULT_TRIAL,)
    ) -> Iterator[Defect]:
        """What of a request could not run, by sample; ``trials`` hold each choice of training."""
        yield from self.benchmark.people_defects(request.forget_ratio)
        people = choose_people(self.benchmark, request)
        yield from missing_objectives(people, request)
        refused = self._unaskable(people, request)
        left_out = frozenset() if self.everyone else held_out_of_training(people, request)
        likelihood = self.backbone.spec.option_scoring == "likelihood"
        for group in (people.forget, people.retain_pool):
            for trial in trials:
                for sample in training_samples(
                    self.benchmark, group, trial, likelihood, request.seed, left_out
                ):
                    refused += self._untrainable(sample, group is people.forget)
        problems = {error.sample.removesuffix("/raw"): error.problem for error in refused}
        for sample_id, problem in problems.items():
            config, _, field = sample_id.partition("/")
            yield Defect(config, None, field, problem.removesuffix("."), sample_id)

    def _unaskable(self, people: People, request: RequestConfig) -> list[SampleError]:
        """Questions that the model could not be asked, with the reverse prompt behind them."""
        retain, celebrities = people.retain, people.celebrities
        if self.everyone:
            retain += tuple(person for person in people.retain_pool if person not in retain)
            if self.benchmark.has_celebrities():
                celebrities = self.benchmark.celebrities()
        splits = {"forget": people.forget + people.earlier, "test": people.test}
        splits |= {"retain_unseen": retain, "celebrity": celebrities}
        new = {
            split: tuple(p for p in members if _said(p, split) not in self._passed)
            for split, members in splits.items()
        }
        groups = (new["forget"], new["test"], (), new["retain_unseen"], (), people.few_shot)
        asked = People(*groups, celebrities=new["celebrity"])
        refused: list[SampleError] = []
        prepare(self.backbone, asked, request, "all", request.seed, reverse=True, refused=refused)
        failed = {error.sample for error in refused}
        for split, members in new.items():
            for person in members:
                if failed.isdisjoint(question.id for question in person.questions):
                    self._passed.add(_said(person, split))
        return refused

    def _untrainable(self, sample: TrainingSample, forgotten: bool) -> Iterator[SampleError]:
        """What keeps a sample from the student, or from the teacher under its instructions."""
        content = (sample.query.text, sample.answer, sample.portrait, forgotten)
        if content in self._passed:
            return
        styles: tuple[PromptStyle | None, ...] = (None, *get_args(PromptStyle))
        try:
            room = response_room(self.backbone, sample)
            # What is retained has the frozen base as teacher, without instructions (equation 4).
            for style in styles if forgotten else styles[:1]:
                shown = intervene(self.backbone, [sample.query], Intervention(style=style))
                encode(self.backbone, shown, room=room)
            self._passed.add(content)
        except SampleError as error:
            yield error


@dataclass(frozen=True)
class Run:
    """A study of each forget ratio, by fields of its ``RequestConfig``."""

    backbone: str
    model_path: str | None = None
    retain_people: int = RequestConfig.model_fields["retain_people"].default
    seed: int = 0
    skip_defects: bool = False

    def defects(self, root: Path, broken: Set[str]) -> list[Defect]:
        """What would stop these studies, of the configs that are sound."""
        unread = {"ft_Data", "Test_Set", "Retain_Set"} & broken
        sides = {ratio: {f"forget_{ratio}", f"retain_{100 - ratio}"} for ratio in FORGET_RATIOS}
        ratios = [ratio for ratio, configs in sides.items() if configs.isdisjoint(broken)]
        if unread or not ratios:
            return []
        benchmark = Benchmark.open(root, self.skip_defects)
        backbone = outline(self.backbone, self.model_path)
        rehearsal = Rehearsal(backbone, benchmark, everyone=True)
        found: dict[Defect, None] = {}  # what several ratios share is found for each of them
        for ratio in ratios:
            values = {**asdict(self), "data": root, "store": root, "forget_ratio": ratio}
            request = parse(RequestConfig, values, "run")
            try:
                found |= dict.fromkeys(rehearsal.defects(request))
                if self.skip_defects:
                    without_unfit(backbone, benchmark, request)  # is enough left?
            except InputError as error:
                problem = str(error).removeprefix(f"{root}: ").removesuffix(".")
                found[Defect(f"forget_{ratio}", None, "people", problem)] = None
        return list(found)


def _said(person: Person, split: str) -> Hashable:
    """All that is asked of a person, by whatever config."""
    said = (
        (q.task, q.form, q.text, q.answer, tuple((q.options or {}).items()))
        for q in person.questions
    )
    return split, person.images, tuple(said)


def rehearsed(request: RequestConfig, trials: Sequence[TrialConfig]) -> Benchmark:
    """The benchmark of a request without what it leaves out; ``InputError`` if it cannot be run."""
    benchmark = Benchmark.open(request.data, request.skip_defects)
    backbone = outline(request.backbone, request.model_path)
    if request.skip_defects:
        benchmark = without_unfit(backbone, benchmark, request)
    benchmark.refuse(Rehearsal(backbone, benchmark).defects(request, trials))
    return benchmark


def without_unfit(backbone: Backbone, benchmark: Benchmark, request: RequestConfig) -> Benchmark:
    """Without samples that the backbone cannot take; an ``InputError`` if the rest cannot run."""
    while True:
        # Again after each round: the fewer questions there are, the other way they are split.
        found = list(Rehearsal(backbone, benchmark).defects(request, (ALL_TRAINING,)))
        benchmark.refuse(defect for defect in found if defect.question is None)
        unfit = {defect.question for defect in found if defect.question is not None}
        if not unfit:
            return benchmark
        benchmark = replace(benchmark, unfit=benchmark.unfit | unfit)


def missing_objectives(people: People, request: RequestConfig) -> Iterator[Defect]:
    """Objectives that no question measures: without them a trial or the front has no place."""
    configs = (f"forget_{request.forget_ratio}", f"retain_{100 - request.forget_ratio}")
    parts: tuple[QuestionPart, ...] = ("search", "held_out")
    for config, members in zip(configs, (people.forget, people.retain), strict=True):
        for part in parts:
            asked = (q for person in members for q in split_questions(person, part, request.seed))
            if not any(q.task == "generation" and q.form == "image" for q in asked):
                problem = (
                    f"no generation question with an image is in the {part.replace('_', '-')} part "
                    f"(seed {request.seed}), so a trial has no ROUGE-L there; add questions"
                )
                yield Defect(config, None, "Generation_Task", problem)
