"""The benchmark's evaluation of a backbone: every question asked, every score with its interval.

Score names are ``<split>_<metric>`` for questions with an image (the paper's), with ``_text``
behind them for questions that name the person instead, and ``_raw`` for generation questions with
an image as they stand, without the benchmark's answer instructions. Splits: ``forget``, ``test``,
``earlier`` (whom an earlier request suppressed), ``retain`` (with ``retain_seen`` and
``retain_unseen``, by whether the person is in the training pool) and ``celebrity``. How many of
``retain_seen`` a retain loss was shown, first of all, is a trial's ``retain_seen_shown``. Metrics:

- ``rouge1``, ``rouge2``, ``rougeL`` (F-measures), the same with ``_recall``, ``bleu``, ``refusal``
  and ``gibberish`` rates, of generation questions;
- ``cloze`` and ``classification``: accuracy of fill-in-the-blank and multiple-choice questions;
- ``cloze_shots`` and ``classification_shots``: share of the few-shot turns that stood before the
  questions; only where the context did not hold all of them for some question;
- ``memorisation`` (forget and earlier splits only): exact memorisation, the share of the true
  answer's tokens that the model, forced along that answer, predicts itself (Tirumala et al. 2022,
  section 3). It shows what a refusal in the first tokens hides.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from vgid.config import RequestConfig
from vgid.data.benchmark import Question
from vgid.evaluation import metrics
from vgid.evaluation.questions import Examination, ExamItem
from vgid.models.backbones import Backbone
from vgid.models.decoding import greedy_tokens, response_text, score_responses
from vgid.prompts import Task, Wording
from vgid.results import KeptScores, Score


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


def evaluate(backbone: Backbone, examination: Examination, request: RequestConfig) -> Evaluation:
    """Put every question to the model as it is now, adapters included, and score the answers.

    Of the request count ``eval_batch_size``, ``bootstrap_samples`` and ``log_responses``.
    """
    responses = _responses(backbone, examination.items, request.eval_batch_size)
    tally: dict[str, tuple[list[float], list[str]]] = {}
    for item, response in zip(examination.items, responses, strict=True):
        for metric, value in _marks(item.question, response):
            _count(tally, item, metric, value)
    shown = [(item, item.shots) for item in examination.items if item.shots is not None]
    # Told only where the context was too short for some question; then of all of the task's, since
    # a mean over the short ones alone would make it look worse than it is.
    short = {item.question.task for item, share in shown if share < 1}
    for item, share in shown:
        if item.question.task in short:
            _count(tally, item, f"{item.question.task}_shots", share)
    recalled = [(item, *item.answer) for item in examination.items if item.answer is not None]
    forced = score_responses(
        backbone,
        [prompt for _, prompt, _ in recalled],
        [answer for _, _, answer in recalled],
        request.eval_batch_size,
    )
    for (item, _, _), score in zip(recalled, forced, strict=True):
        _count(tally, item, "memorisation", float(score.correct_R.double().mean()))
    scores = {
        name: metrics.bootstrap_interval(
            values, groups, request.bootstrap_samples, examination.seed
        )
        for name, (values, groups) in tally.items()
    }
    people = {name: metrics.person_sums(values, groups) for name, (values, groups) in tally.items()}
    said = tuple(
        Response(i.question.id, i.split, i.wording, i.question.text, i.question.answer, response)
        for i, response in zip(examination.items, responses, strict=True)
    )
    return Evaluation(
        KeptScores(scores=scores, people=people),
        backbone.spec.option_scoring,
        examination.few_shot,
        said if request.log_responses else None,
    )


def _responses(backbone: Backbone, items: Sequence[ExamItem], batch_size: int) -> list[str]:
    """The response to each item: decoded, or the letter of its likeliest option."""
    spoken = [i for i, item in enumerate(items) if item.options is None]
    tokens = greedy_tokens(backbone, [items[i].encoded for i in spoken], batch_size=batch_size)
    responses = {i: response_text(backbone, ids) for i, ids in zip(spoken, tokens, strict=True)}
    ranked = [
        (i, letter, ids)
        for i, item in enumerate(items)
        for letter, ids in (item.options or {}).items()
    ]
    rated = score_responses(
        backbone,
        [items[i].encoded for i, _, _ in ranked],
        [ids for _, _, ids in ranked],
        batch_size,
    )
    best: dict[int, float] = {}
    for (i, letter, _), score in zip(ranked, rated, strict=True):
        # Summed and not averaged over tokens: it is the probability that the model says this
        # option, and no other, that is compared.
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
    tally: dict[str, tuple[list[float], list[str]]], item: ExamItem, metric: str, value: float
) -> None:
    splits = [item.split] + (["retain"] if item.split.startswith("retain_") else [])
    for split in splits:
        values, groups = tally.setdefault(f"{split}_{metric}{item.suffix}", ([], []))
        values.append(value)
        groups.append(item.question.person_id)
