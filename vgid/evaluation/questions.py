"""The questions of an evaluation: chosen, framed, tokenised, with their images processed.

The protocol is MLLMU-Bench's (``vgid.prompts``), but few-shot people and test poses are seeded,
nobody who is scored or forgotten serves as a few-shot example, models too small to answer by letter
may be scored by option likelihood, and generation questions on an image are asked a second time as
they stand (``raw``), which is how the facts are taught and how users ask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from PIL import Image

from vgid import prompts
from vgid.config import RequestConfig
from vgid.data.benchmark import Person, Question, decode_image, split_questions
from vgid.data.splits import People
from vgid.errors import InputError, SampleError
from vgid.method.teacher import PLAIN, Intervention, intervene
from vgid.method.workers import ALONE, Workers
from vgid.models.backbones import Backbone
from vgid.models.decoding import MAX_NEW_TOKENS
from vgid.models.encoding import Encoded, Query, Shot, encode, response_ids
from vgid.prompts import Form, Task, Wording
from vgid.results import QuestionPart
from vgid.seeds import sample_generator

Turns = dict[tuple[Task, Form], tuple[Shot, ...]]
Worded = list[tuple[Question, Wording]]


@dataclass(frozen=True)
class ExamItem:
    """One question, ready for the model."""

    split: str
    question: Question
    encoded: Encoded = field(repr=False)
    options: Mapping[str, list[int]] | None = field(default=None, repr=False)  # to be ranked
    # Behind the prompt in the turn that answers are taught in, where memorisation is measured.
    answer: tuple[Encoded, list[int]] | None = field(default=None, repr=False)
    shots: float | None = None  # share of the few-shot turns that the context holds
    wording: Wording = "wrapped"  # raw ones are in the turn that answers are taught in
    place: int = 0  # of the person among all who are asked, by any worker


@dataclass(frozen=True)
class Examination:
    """All questions of an evaluation, by split, then person, then as the benchmark orders them."""

    items: tuple[ExamItem, ...] = field(repr=False)
    few_shot: dict[Task, tuple[str, ...]]  # people's IDs by task
    seed: int  # of few-shot people, test poses and bootstrap


def prepare(
    backbone: Backbone,
    people: People,
    request: RequestConfig,
    part: QuestionPart,
    seed: int,
    intervention: Intervention = PLAIN,
    reverse: bool = False,
    refused: list[SampleError] | None = None,
    workers: Workers = ALONE,
) -> Examination:
    """Choose, frame and tokenise the questions of an evaluation.

    The request's seed splits every person's questions into parts, of which ``part`` is asked;
    ``seed`` chooses few-shot people, poses and resamples. Celebrities are asked everything,
    without few-shot turns. ``reverse`` appends the reverse-engineering prompt (paper Appendix
    A.3.7). Of several ``workers`` each prepares its share of the people. Questions that the
    backbone cannot be asked go to ``refused``, if given. Otherwise they, too few few-shot people or
    an unreadable image are an ``InputError``.
    """
    few_shot, shots = _few_shot(backbone, people, request, seed)
    names = ("forget", "test", "earlier", "retain_seen", "retain_unseen")
    splits = {name: getattr(people, name) for name in names} | {"celebrity": people.celebrities}
    items = []
    asked = [(split, person) for split, members in splits.items() for person in members]
    # By whole people, whose questions share their portraits.
    for place, (split, person) in workers.mine(list(enumerate(asked))):
        turns = {} if split == "celebrity" else shots
        asked_of = worded(person, split, part, request.seed)
        queries = _queries(backbone, person, asked_of, turns, seed, reverse)
        seen = intervene(backbone, queries, intervention)
        for (question, wording), query in zip(asked_of, seen, strict=True):
            try:
                item = _item(backbone, split, question, wording, query)
                items.append(replace(item, place=place))
            except SampleError as error:
                if refused is None:
                    raise
                refused.append(error)
    return Examination(tuple(items), few_shot, seed)


def suffix(question: Question, wording: Wording) -> str:
    """What stands behind the names of a question's scores: ``_text``, ``_raw`` or nothing."""
    if question.form == "text":
        return "_text"
    return "_raw" if wording == "raw" else ""


def _ranked(backbone: Backbone, task: Task) -> bool:
    """Whether options are ranked by likelihood, and no letter is asked for."""
    return task == "classification" and backbone.spec.option_scoring == "likelihood"


def _few_shot(
    backbone: Backbone, people: People, request: RequestConfig, seed: int
) -> tuple[dict[Task, tuple[str, ...]], Turns]:
    """The few-shot people's IDs by task, and their turns in front of each kind of question."""
    few_shot: dict[Task, tuple[str, ...]] = {}
    turns: Turns = {}
    for task, count in backbone.spec.few_shot.items():
        if count and not _ranked(backbone, task):  # turns would show how to answer by a letter
            chosen = choose_few_shot(people.few_shot, task, count, seed, str(request.data))
            few_shot[task] = tuple(person.id for person in chosen)
            for form in ("image", "text"):
                turns[task, form] = few_shot_turns(backbone, chosen, task, form)
    return few_shot, turns


def _queries(
    backbone: Backbone, person: Person, worded: Worded, turns: Turns, seed: int, reverse: bool
) -> list[Query]:
    @cache
    def decoded(pose: int) -> Image.Image:
        return decode_image(person.images[pose], f"image {pose} of person {person.id}")

    queries = []
    for question, wording in worded:
        image = None
        if question.form == "image":
            # By question: a pose does not depend on which others are asked.
            draw = sample_generator(seed, f"pose/{question.id}")
            image = decoded(int(draw.integers(len(person.images))))
        kind = question.task, question.form
        if _ranked(backbone, question.task):
            text = prompts.option_likelihood_text(question.text)
        else:
            text = prompts.question_text(*kind, question.text, question.options, wording)
        text = prompts.with_reverse_prompt(text) if reverse else text
        task = question.task if wording == "wrapped" else None
        queries.append(Query(question.id, text, image, turns.get(kind, ()), task))
    return queries


def worded(person: Person, split: str, part: QuestionPart, seed: int) -> Worded:
    """What a person is asked and how: open questions on an image as they stand too."""
    if split == "celebrity":
        return [(question, "wrapped") for question in person.questions]
    asked = split_questions(person, part, seed)
    raw = [q for q in asked if q.task == "generation" and q.form == "image"]
    return [(q, "wrapped") for q in asked] + [(q, "raw") for q in raw]


def _item(
    backbone: Backbone, split: str, question: Question, wording: Wording, query: Query
) -> ExamItem:
    options, room = None, MAX_NEW_TOKENS
    if _ranked(backbone, question.task):
        assert question.options is not None
        options = {
            letter: response_ids(backbone, option, question.id)
            for letter, option in question.options.items()
        }
        room = max(map(len, options.values()))
    (encoded,) = encode(backbone, [query], room=room)
    answer = None
    if split in ("forget", "earlier") and (question.task, wording) == ("generation", "wrapped"):
        # Without the end-of-sequence token, which any model predicts behind a full stop.
        forced = response_ids(backbone, question.answer, question.id)[:-1]
        # The benchmark's turn may end in a space, which then is a token, and no answer's beginning.
        (taught,) = encode(backbone, [replace(query, task=None)], room=len(forced))
        answer = taught, forced
    shots = encoded.shots / len(query.shots) if query.shots else None
    return ExamItem(split, question, encoded, options, answer, shots, wording)


def choose_few_shot(
    candidates: Sequence[Person], task: Task, count: int, seed: int, source: str
) -> tuple[Person, ...]:
    """Draw the few-shot people of a task; the same people whatever the order of ``candidates``.

    The benchmark draws them unseeded from the evaluated split; here they are neither scored nor
    forgotten. They stand in the order of their IDs, as in the benchmark's file. Too few candidates
    with an image question of the task are an ``InputError`` that names their ``source``.
    """
    able = [
        person
        for person in sorted(candidates, key=lambda person: person.id)
        if any(q.task == task and q.form == "image" for q in person.questions)
    ]
    if len(able) < count:
        raise InputError(
            f"{source}: {len(able)} of the {count} few-shot people needed outside the forget and "
            f"scored sets have {task} questions; lower retain_people."
        )
    order = sample_generator(seed, f"few-shot/{task}").permutation(len(able))
    return tuple(able[i] for i in sorted(order[:count]))


def few_shot_turns(
    backbone: Backbone, people: Sequence[Person], task: Task, form: Form
) -> tuple[Shot, ...]:
    """All of ``people``'s questions of one task and form, answered, in the frame's own turns."""
    frame = backbone.spec.frame
    own = frame.shots.get(f"{task}/{form}")
    shots = []
    for person in people:
        image = decode_image(person.images[0], f"image 0 of person {person.id}")
        for question in person.questions:
            if question.task != task or question.form != form:
                continue
            asked = prompts.question_text(task, form, question.text, question.options)
            if own is None:
                turn = frame.turn(form, task).removeprefix(frame.opening).format(text=asked)
                end = backbone.processor.tokenizer.eos_token
                text = f"{turn}{frame.separator}{question.answer}{end}\n"
            else:
                if question.options is not None:
                    # As the benchmark shows it: options, but no letter is asked for.
                    asked = prompts.options_text(question.text, question.options)
                text = own.format(question=asked, answer=question.answer)
            shots.append(Shot(text, image if form == "image" else None))
    return tuple(shots)
