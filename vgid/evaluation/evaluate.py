"""The benchmark's evaluation of a backbone: every question asked, every score with its interval.

Score names are ``<split>_<metric>`` for questions with an image (the paper's), with ``_text``
behind them where the question names the person instead, and ``_raw`` for generation questions as
they stand, without answer instructions. Splits: ``forget``, ``test``, ``earlier`` (whom an earlier
request suppressed), ``retain`` (with ``retain_seen`` and ``retain_unseen``, by whether the person
is in the training pool) and ``celebrity``. Metrics:

- ``rouge1``, ``rouge2``, ``rougeL`` (F-measures), the same with ``_recall``, ``bleu``, ``refusal``
  and ``gibberish`` rates, of generation questions;
- ``cloze`` and ``classification``: accuracy of fill-in-the-blank and multiple-choice questions,
  with ``_shots`` the share of their few-shot turns that the context held, if not all of them;
- ``memorisation`` (forget and earlier splits only): exact memorisation, the share of the true
  answer's tokens that the model, forced along that answer, predicts itself (Tirumala et al. 2022,
  section 3). It shows what a refusal in the first tokens hides.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from filelock import FileLock

from vgid.config import RequestConfig
from vgid.data.benchmark import Question
from vgid.data.splits import People
from vgid.evaluation import metrics
from vgid.evaluation.questions import Examination, ExamItem, prepare, suffix
from vgid.files import write_atomically
from vgid.method.sharding import make_whole
from vgid.method.teacher import PLAIN, Intervention
from vgid.method.workers import ALONE, Workers
from vgid.models import adapters as adapter
from vgid.models.backbones import Backbone
from vgid.models.decoding import ResponseScore, greedy_tokens, response_text, score_responses
from vgid.models.encoding import Encoded
from vgid.models.store import key_of
from vgid.prompts import Task, Wording
from vgid.results import KeptScores, QuestionPart, Score
from vgid.seeds import held_out_seed

SCORES_FORMAT = 2  # raised when the same questions would give other scores than those kept


K = TypeVar("K")


class Response(NamedTuple):
    """One question with what the model said: private, kept only when the user asks for it."""

    question_id: str
    split: str
    wording: Wording
    question: str
    answer: str
    response: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; a score without questions is left out."""

    kept: KeptScores  # by name (see the module docstring), and by person
    option_scoring: Literal["letter", "likelihood"]
    few_shot: dict[Task, tuple[str, ...]]  # IDs of the people, by task
    responses: tuple[Response, ...] | None = field(default=None, repr=False)  # if asked for

    @property
    def scores(self) -> dict[str, Score]:
        """The scores by name."""
        return self.kept.scores


class _Answered(NamedTuple):
    """What a worker tells the others of a question: what its scores need, and no more."""

    place: int
    split: str
    suffix: str
    task: Task
    person_id: str
    marks: dict[str, float]  # of the response
    shots: float | None
    memorisation: float | None
    response: Response | None  # if asked for


def evaluate(
    backbone: Backbone,
    examination: Examination,
    request: RequestConfig,
    workers: Workers = ALONE,
) -> Evaluation:
    """Score the answers of the model as it is now, adapters included, to every question.

    Of several ``workers`` each has an examination of its share, and all get the whole's scores.
    """
    # As one worker has them: a sum of floats depends on their order.
    answered = sorted(
        workers.together(_answered(backbone, examination.items, request)), key=lambda a: a.place
    )
    tally: dict[str, tuple[list[float], list[str]]] = {}
    for each in answered:
        for metric, value in each.marks.items():
            _count(tally, each, metric, value)
    # Where the context was too short for a question, of all of its task's, to be a fair mean.
    short = {each.task for each in answered if each.shots is not None and each.shots < 1}
    for each in answered:
        if each.shots is not None and each.task in short:
            _count(tally, each, f"{each.task}_shots", each.shots)
    for each in answered:
        if each.memorisation is not None:
            _count(tally, each, "memorisation", each.memorisation)
    how = request.bootstrap_samples, examination.seed
    scores = {name: metrics.bootstrap_interval(*kept, *how) for name, kept in tally.items()}
    people = {name: metrics.person_sums(*kept) for name, kept in tally.items()}
    said = tuple(each.response for each in answered if each.response is not None)
    return Evaluation(
        KeptScores(scores=scores, people=people),
        backbone.spec.option_scoring,
        examination.few_shot,
        said if request.log_responses else None,
    )


def _answered(
    backbone: Backbone, items: Sequence[ExamItem], request: RequestConfig
) -> list[_Answered]:
    responses = _responses(backbone, items, request.eval_batch_size)
    known = [(i, *item.answer) for i, item in enumerate(items) if item.answer is not None]
    memorised = {
        i: float(score.correct_R.double().mean())
        for i, score in _forced(backbone, known, request.eval_batch_size)
    }
    answered = []
    for i, (item, text) in enumerate(zip(items, responses, strict=True)):
        q = item.question
        said = Response(q.id, item.split, item.wording, q.text, q.answer, text)
        where = item.place, item.split, suffix(q, item.wording), q.task, q.person_id
        marks = dict(_marks(q, text)), item.shots, memorised.get(i)
        answered.append(_Answered(*where, *marks, said if request.log_responses else None))
    return answered


def _forced(
    backbone: Backbone, cases: Sequence[tuple[K, Encoded, list[int]]], batch_size: int
) -> Iterator[tuple[K, ResponseScore]]:
    """How the model rates the response of each case behind its prompt."""
    prompts, responses = [case[1] for case in cases], [case[2] for case in cases]
    scores = score_responses(backbone, prompts, responses, batch_size)
    return zip((case[0] for case in cases), scores, strict=True)


def _responses(backbone: Backbone, items: Sequence[ExamItem], batch_size: int) -> list[str]:
    """The response to each item: decoded, or the letter of its likeliest option."""
    spoken = [i for i, item in enumerate(items) if item.options is None]
    tokens = greedy_tokens(backbone, [items[i].encoded for i in spoken], batch_size=batch_size)
    responses = {i: response_text(backbone, ids) for i, ids in zip(spoken, tokens, strict=True)}
    ranked = [
        ((i, letter), item.encoded, ids)
        for i, item in enumerate(items)
        for letter, ids in (item.options or {}).items()
    ]
    best: dict[int, float] = {}
    for (i, letter), score in _forced(backbone, ranked, batch_size):
        # Not averaged over tokens: compared is the probability that the model says this option.
        likelihood = float(score.logprobs_R.double().sum())
        if likelihood > best.get(i, -float("inf")):
            best[i], responses[i] = likelihood, letter
    return [responses[i] for i in range(len(items))]


def _marks(question: Question, response: str) -> Iterator[tuple[str, float]]:
    match question.task:
        case "generation":
            yield from metrics.rouge(question.answer, response).items()
            yield "bleu", metrics.bleu(question.answer, response)
            yield "refusal", float(metrics.is_refusal(response))
            yield "gibberish", float(metrics.is_gibberish(response))
        case "cloze":
            yield "cloze", float(metrics.cloze_correct(question.answer, response))
        case "classification":
            choice = metrics.letter_choice(response, question.options or {})
            yield "classification", float(choice == question.answer)


def _count(
    tally: dict[str, tuple[list[float], list[str]]], of: _Answered, metric: str, value: float
) -> None:
    for name in _names(of.split, metric, of.suffix):
        values, groups = tally.setdefault(name, ([], []))
        values.append(value)
        groups.append(of.person_id)


def _names(split: str, metric: str, suffix: str) -> list[str]:
    """The scores that a mark counts in."""
    splits = [split] + (["retain"] if split.startswith("retain_") else [])
    return [f"{each}_{metric}{suffix}" for each in splits]


def _asked_for(scores: Collection[str], items: Sequence[ExamItem]) -> tuple[ExamItem, ...]:
    """The questions that some scores are made of."""
    # With one half of the retain set the other is asked, whose score would else be of half of it.
    scores = {*scores, *(re.sub("^retain_(un)?seen_", "retain_", name) for name in scores)}
    found = []
    for item in items:
        where = suffix(item.question, item.wording)
        marks = [mark for mark, _ in _marks(item.question, "")] + [f"{item.question.task}_shots"]
        asked, forced = (
            any(name in scores for mark in some for name in _names(item.split, mark, where))
            for some in (marks, ["memorisation"] if item.answer is not None else [])
        )
        if asked or forced:
            found.append(item if forced else replace(item, answer=None))
    return tuple(found)


@dataclass
class Scorer:
    """Scores the base or its adapters, once in a request's store; keeps the encoded questions."""

    backbone: Backbone
    data_sha256: str
    people: People
    request: RequestConfig
    workers: Workers = ALONE  # which share the questions out
    _examinations: dict[tuple[Any, ...], Examination] = field(default_factory=dict, init=False)

    def kept(
        self,
        part: QuestionPart,
        seed: int | None = None,
        intervention: Intervention = PLAIN,
        reverse: bool = False,
        adapter_dir: Path | None = None,
    ) -> KeptScores:
        """Scores of the base, or of an adapter in a folder, computed once for all processes."""
        seed = self._seed(part, seed)
        kind, content = "base", None
        attached: AbstractContextManager[Any] = nullcontext()
        if adapter_dir is not None:
            # By content: a copied adapter has its scores already, a folder written anew does not.
            kind, content = "adapter", adapter.sha256(adapter_dir)
            attached = adapter.loaded(self.backbone, adapter_dir)
        asked = [part, seed, asdict(intervention), reverse, content]
        setting = [self.data_sha256, self.backbone.identity, self.request.identity]
        key = key_of([SCORES_FORMAT, kind, *asked, *setting])
        path = self.request.store / f"{kind}-{key}.json"
        # The first worker looks and writes for all: one that found what another did not would
        # leave it alone with the questions.
        first = self.workers.rank == 0
        with FileLock(path.with_suffix(".lock")) if first else nullcontext():
            kept = None
            # None yet, or torn by a crash of the machine: made again.
            with suppress(OSError, ValueError):
                if first:
                    kept = KeptScores.model_validate_json(path.read_bytes())
            if (kept := self.workers.first(kept)) is None:
                with attached:
                    kept = self.evaluate(part, seed, intervention, reverse).kept
                if first:
                    write_atomically(path, kept.model_dump_json().encode())
            return kept

    def difference(
        self, score: str, kept: tuple[KeptScores, KeptScores], part: QuestionPart, seed: int | None
    ) -> Score:
        """A score of the first minus that of the second, people paired."""
        first, second = (of_model.people[score] for of_model in kept)
        how = self.request.bootstrap_samples, self._seed(part, seed)
        return metrics.bootstrap_difference(first, second, *how)

    def _seed(self, part: QuestionPart, given: int | None) -> int:
        if given is not None:
            return given
        return held_out_seed(self.request.seed) if part == "held_out" else self.request.seed

    def evaluate(
        self,
        part: QuestionPart,
        seed: int,
        how: Intervention = PLAIN,
        reverse: bool = False,
        only: frozenset[str] | None = None,
    ) -> Evaluation:
        """Put the questions to the backbone as it stands, with the adapter that is attached.

        With ``only``, those that these scores are made of.
        """
        make_whole(self.backbone)  # loading an adapter deals out again what can be
        examination = self._examination(part, seed, how, reverse, only)
        return evaluate(self.backbone, examination, self.request, self.workers)

    def _examination(
        self,
        part: QuestionPart,
        seed: int,
        how: Intervention,
        reverse: bool,
        only: frozenset[str] | None,
    ) -> Examination:
        key = (part, seed, how, reverse, only)
        if (examination := self._examinations.get(key)) is not None:
            return examination
        if only is not None:
            whole = self._examination(part, seed, how, reverse, None)
            examination = replace(whole, items=_asked_for(only, whole.items))
        else:
            people = self.people
            if part == "search" or reverse:
                # General utility: nothing is chosen by it, and no attack is on it.
                people = replace(people, celebrities=())
            whom = (self.backbone, people, self.request, part, seed)
            examination = prepare(*whom, how, reverse, workers=self.workers)
        # Perturbed images are as large as all others together, and seldom wanted twice.
        if how.noise_type is None:
            self._examinations[key] = examination
        return examination
