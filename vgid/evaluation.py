"""The benchmark's evaluation of a backbone: every question asked, every score with its interval.

An ``Examination`` holds the questions, framed, tokenised and with their images processed, so that
a worker prepares it once and puts every trial's adapter through it. The protocol is MLLMU-Bench's
(``vgid.prompts``, ``vgid.metrics``) with these differences, each told where it is made: few-shot
people and test poses are seeded, nobody who is scored or forgotten serves as a few-shot example,
and models too small to answer by letter may be scored by option likelihood.

Score names are ``<split>_<metric>`` for questions with an image (the paper's), with ``_text``
behind them for questions that name the person instead. Splits: ``forget``, ``test``, ``retain``
(with ``retain_seen`` and ``retain_unseen``, by whether training saw the person) and
``celebrity``. Metrics:

- ``rouge1``, ``rouge2``, ``rougeL`` (F-measures), the same with ``_recall``, ``bleu``, ``refusal``
  and ``gibberish`` rates, of generation questions;
- ``cloze``: accuracy of fill-in-the-blank questions;
- ``classification``: accuracy of multiple-choice questions;
- ``memorisation`` (forget split only): exact memorisation, the share of the true answer's tokens
  that the model, forced along that answer, predicts itself (Tirumala et al. 2022, section 3). It
  shows what a refusal in the first tokens hides.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from PIL import Image

from vgid.backbones import LLAVA_FRAME, Backbone, PromptFrame
from vgid.benchmark import Person, Question, decode_image, split_questions
from vgid.config import RequestConfig
from vgid.decoding import greedy_tokens, response_text, score_responses
from vgid.encoding import Encoded, Query, Shot, encode, response_ids
from vgid.errors import InputError
from vgid.interventions import sample_generator
from vgid.metrics import (
    bleu,
    bootstrap_interval,
    cloze_correct,
    is_gibberish,
    is_refusal,
    letter_choice,
    rouge,
)
from vgid.prompts import (
    Form,
    Task,
    cloze_text,
    option_likelihood_text,
    options_text,
    question_text,
    with_reverse_prompt,
)
from vgid.results import QuestionPart, Score
from vgid.splits import People
from vgid.teacher import Intervention, intervene

OptionScoring = Literal["letter", "likelihood"]


class Response(NamedTuple):
    """One question with what the model said: private, kept only when the user asks for it."""

    question_id: str
    split: str
    question: str
    answer: str
    response: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        scores: by name (see the module docstring); a score without questions is left out.
        option_scoring: how multiple-choice questions were scored.
        few_shot: IDs of the people whose questions preceded the scored ones, by task.
        responses: every response, None unless asked for.
    """

    scores: dict[str, Score]
    option_scoring: OptionScoring
    few_shot: dict[Task, tuple[str, ...]]
    responses: tuple[Response, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ExamItem:
    """One question, ready for the model.

    Attributes:
        split: whose question it is: ``forget``, ``test``, ``retain_seen``, ...
        question: the benchmark's question.
        encoded: what the model is shown.
        options: token ids of each option as the response, by letter; only where options are
            ranked by likelihood.
        answer: token ids of the true answer; only where memorisation is measured.
    """

    split: str
    question: Question
    encoded: Encoded = field(repr=False)
    options: Mapping[str, list[int]] | None = field(default=None, repr=False)
    answer: list[int] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Examination:
    """All questions of an evaluation, prepared once.

    Attributes:
        items: the questions, by split, then person, then as the benchmark orders them.
        option_scoring: how multiple-choice questions are scored.
        few_shot: IDs of the few-shot people by task.
        seed: of few-shot people, test poses and bootstrap.
    """

    items: tuple[ExamItem, ...] = field(repr=False)
    option_scoring: OptionScoring
    few_shot: dict[Task, tuple[str, ...]]
    seed: int


def prepare(
    backbone: Backbone,
    people: People,
    request: RequestConfig,
    part: QuestionPart,
    seed: int,
    celebrities: Sequence[Person] = (),
    intervention: Intervention | None = None,
    reverse: bool = False,
    option_scoring: OptionScoring | None = None,
) -> Examination:
    """Choose, frame and tokenise the questions of an evaluation.

    Args:
        backbone: whom the questions are put to.
        people: whose questions are asked, and who may serve as few-shot example.
        request: its seed splits every person's questions into parts.
        part: which part is asked. Celebrities, never part of a selection, are asked everything.
        seed: chooses few-shot people, the pose of each test question and bootstrap resamples.
        celebrities: real people, for general utility.
        intervention: perturbation and instruction to ask under, as in-context unlearning does;
            None asks plainly.
        reverse: append the reverse-engineering prompt (paper Appendix A.3.7).
        option_scoring: None takes the backbone's own.

    Raises:
        InputError: too few people for the few-shot turns, an unreadable image, or a prompt longer
            than the model's context.
    """
    scoring = option_scoring or backbone.spec.option_scoring
    intervention = intervention or Intervention()
    shots: dict[tuple[Task, Form], tuple[Shot, ...]] = {}
    few_shot: dict[Task, tuple[str, ...]] = {}
    for task, count in backbone.spec.few_shot.items():
        if count == 0 or (task == "classification" and scoring == "likelihood"):
            continue
        chosen = choose_few_shot(people.few_shot, task, count, seed, str(request.data))
        few_shot[task] = tuple(person.id for person in chosen)
        for form in ("image", "text"):
            shots[task, form] = few_shot_turns(backbone, chosen, task, form)

    splits = {
        "forget": people.forget,
        "test": people.test,
        "retain_seen": people.retain_seen,
        "retain_unseen": people.retain_unseen,
        "celebrity": celebrities,
    }
    items = []
    for split, members in splits.items():
        for person in members:
            asked = person.questions
            if split != "celebrity":
                asked = split_questions(person, part, request.seed)
            images = _PoseImages(person, seed)
            ranked = [q.task == "classification" and scoring == "likelihood" for q in asked]
            queries = []
            for question, likelihood in zip(asked, ranked, strict=True):
                if likelihood:
                    text = option_likelihood_text(question.text)
                else:
                    text = question_text(
                        question.task, question.form, question.text, question.options
                    )
                queries.append(
                    Query(
                        id=question.id,
                        text=with_reverse_prompt(text) if reverse else text,
                        image=images.of(question),
                        shots=shots.get((question.task, question.form), ()),
                    )
                )
            prompts = encode(backbone, intervene(backbone, queries, intervention))
            items += [
                _item(backbone, split, question, prompt, likelihood)
                for question, prompt, likelihood in zip(asked, prompts, ranked, strict=True)
            ]
    return Examination(tuple(items), scoring, few_shot, seed)


class _PoseImages:
    """A person's images, decoded when a question first needs them."""

    def __init__(self, person: Person, seed: int) -> None:
        self.person = person
        self.seed = seed
        self.decoded: dict[int, Image.Image] = {}

    def of(self, question: Question) -> Image.Image | None:
        """The image of ``question``; of several poses a seeded one (the benchmark: any one)."""
        if question.form == "text":
            return None
        poses = len(self.person.images)
        pose = int(sample_generator(self.seed, f"pose/{question.id}").integers(poses))
        if pose not in self.decoded:
            source = f"image {pose} of person {self.person.id}"
            self.decoded[pose] = decode_image(self.person.images[pose], source)
        return self.decoded[pose]


def _item(
    backbone: Backbone, split: str, question: Question, encoded: Encoded, likelihood: bool
) -> ExamItem:
    options = None
    if likelihood:
        assert question.options is not None
        options = {
            letter: response_ids(backbone, option) for letter, option in question.options.items()
        }
    answer = None
    if split == "forget" and question.task == "generation":
        # Without the end-of-sequence token, which any model predicts behind a full stop.
        answer = response_ids(backbone, question.answer)[:-1]
    return ExamItem(split, question, encoded, options, answer)


def choose_few_shot(
    candidates: Sequence[Person], task: Task, count: int, seed: int, source: str
) -> tuple[Person, ...]:
    """Draw the few-shot people of a task; the same people whatever the order of ``candidates``.

    The benchmark draws them unseeded from the evaluated split and leaves their questions out of
    the score; here they come from people who are neither scored nor forgotten.

    Args:
        candidates: who may be drawn; those without an image question of the task are not.
        task: of the questions.
        count: people to draw.
        seed: of the draw.
        source: where the candidates come from, for the error message.

    Raises:
        InputError: too few candidates.
    """
    able = sorted(
        (
            person
            for person in candidates
            if any(q.task == task and q.form == "image" for q in person.questions)
        ),
        key=lambda person: person.id,
    )
    if len(able) < count:
        raise InputError(
            f"{source}: {len(able)} of the {count} few-shot people needed outside the forget and "
            f"scored sets have {task} questions; lower retain_people."
        )
    order = sample_generator(seed, f"few-shot/{task}").permutation(len(able))
    return tuple(able[i] for i in order[:count])


def few_shot_turns(
    backbone: Backbone, people: Sequence[Person], task: Task, form: Form
) -> tuple[Shot, ...]:
    """The turns that show all of ``people``'s questions of one task and form with their answers.

    With LLaVA's frame they are the benchmark's, to the character. For other frames, which the
    benchmark does not define, a shot is a completed turn of the frame.
    """
    shots = []
    for person in people:
        image = decode_image(person.images[0], f"image 0 of person {person.id}")
        for question in person.questions:
            if question.task != task or question.form != form:
                continue
            if backbone.spec.frame == LLAVA_FRAME:
                text = _benchmark_shot(question)
            else:
                end = backbone.processor.tokenizer.eos_token
                text = _completed_turn(backbone.spec.frame, question, end)
            shots.append(Shot(text, image if form == "image" else None))
    return tuple(shots)


def _benchmark_shot(question: Question) -> str:
    if question.task == "classification":
        assert question.options is not None
        user = "USER: <image>\n" if question.form == "image" else "USER:\n"
        asked = f"Question: {options_text(question.text, question.options)}"
    else:
        user = "USER:<image>\n" if question.form == "image" else "USER:\n"
        asked = cloze_text(question.text)
    return f"{user}{asked}\nCorrect Answer: {question.answer}\n"


def _completed_turn(frame: PromptFrame, question: Question, end: str) -> str:
    text = question_text(question.task, question.form, question.text, question.options)
    turn = (frame.image if question.form == "image" else frame.text).format(text=text)
    return f"{turn}{frame.separator}{question.answer}{end}\n"


def evaluate(backbone: Backbone, examination: Examination, request: RequestConfig) -> Evaluation:
    """Put every question to the model as it is now, adapters included, and score the answers.

    Args:
        backbone: the model; its mode and adapters are left as they are.
        examination: the questions.
        request: ``eval_batch_size``, ``bootstrap_samples`` and whether to keep the responses.

    Returns:
        The scores. They hold no text; the responses do, and are there on request only.
    """
    responses = _responses(backbone, examination.items, request.eval_batch_size)
    tally: dict[str, tuple[list[float], list[str]]] = {}
    for item, response in zip(examination.items, responses, strict=True):
        for metric, value in _marks(item.question, response):
            _count(tally, item, metric, value)
    recalled = [item for item in examination.items if item.answer is not None]
    answers = [item.answer for item in recalled if item.answer is not None]
    forced = score_responses(
        backbone, [item.encoded for item in recalled], answers, request.eval_batch_size
    )
    for item, score in zip(recalled, forced, strict=True):
        _count(tally, item, "memorisation", float(score.correct_R.double().mean()))
    scores = {
        name: bootstrap_interval(values, groups, request.bootstrap_samples, examination.seed)
        for name, (values, groups) in tally.items()
    }
    kept = None
    if request.log_responses:
        kept = tuple(
            Response(i.question.id, i.split, i.question.text, i.question.answer, response)
            for i, response in zip(examination.items, responses, strict=True)
        )
    return Evaluation(scores, examination.option_scoring, examination.few_shot, kept)


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
        likelihood = float(score.logprobs_R.double().sum())
        if likelihood > best.get(i, -float("inf")):
            best[i], responses[i] = likelihood, letter
    return [responses[i] for i in range(len(items))]


def _marks(question: Question, response: str) -> Iterator[tuple[str, float]]:
    """Every metric of one response."""
    match question.task:
        case "generation":
            yield from rouge(question.answer, response).items()
            yield "bleu", bleu(question.answer, response)
            yield "refusal", float(is_refusal(response))
            yield "gibberish", float(is_gibberish(response))
        case "cloze":
            yield "cloze", float(cloze_correct(question.answer, response))
        case "classification":
            choice = letter_choice(response, question.options or {})
            yield "classification", float(choice == question.answer)


def _count(
    tally: dict[str, tuple[list[float], list[str]]], item: ExamItem, metric: str, value: float
) -> None:
    suffix = "_text" if item.question.form == "text" else ""
    splits = [item.split] + (["retain"] if item.split.startswith("retain_") else [])
    for split in splits:
        values, groups = tally.setdefault(f"{split}_{metric}{suffix}", ([], []))
        values.append(value)
        groups.append(item.question.person_id)
