"""Evaluation with shared images against one question at a time.

``python -m tests.benchmarks.evaluate [--json]``. Both begin with the images and the question texts,
so processing and encoding of the images are in the time: ours (``vgid.models.decoding``) with an
empty memory in each round, the benchmark's (``one_at_a_time``) anew for each question. The answers
are compared token by token; where two ways of computing the same logits break a near tie
differently, the answer counts as differing, and a difference that is no near tie is an error.

Both models are asked all questions of people of the synthetic benchmark: 33 a person, 21 of them on
the portrait and 12 that name the person. ``tiny-llava`` has 10 people, generation and cloze decoded
and classification by the likelihood of each option. ``100m`` has ``--portraits`` people, with an
image of 336 pixels each and classification by letter, as the benchmark scores a LLaVA, but without
few-shot turns. Its weights are random, so its answers end by chance: after 10 tokens in the mean,
about as a trained model's do over these tasks (``tiny-llava``: 8), though some never do.
Those read all weights for few rows until 50 tokens; a study's evaluation, of 50 people and more,
bears that better than the 8 of the default.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks import one_at_a_time
from tests.benchmarks.machine import (
    arguments,
    headline,
    in_turns,
    median_interval,
    models,
    one_thread,
    ratio_fields,
    report,
)
from tests.benchmarks.random_llava import portrait_questions, random_llava
from vgid.config import RequestConfig
from vgid.data.benchmark import Benchmark, decode_image
from vgid.data.fictitious import (
    classification_questions,
    cloze_questions,
    generation_questions,
    make_world,
)
from vgid.data.synthetic import write_benchmark
from vgid.models.backbones import Backbone, load
from vgid.models.decoding import greedy_tokens, score_responses
from vgid.models.encoding import Query, encode, response_ids
from vgid.models.packing import pack
from vgid.models.vision import Vision
from vgid.prompts import option_likelihood_text, question_text
from vgid.seeds import sample_generator

TARGET = 8.0
PEOPLE = 10
PORTRAITS = 8
END_SPACING = 8
"""On ``100m``; see ``random_llava``."""
BATCH = RequestConfig.model_fields["eval_batch_size"].default
"""Questions decoded together at most, as in a study."""
NEAR_TIE = 1e-3
"""Two tokens whose logits are this close may change places by rounding."""


@dataclass(frozen=True)
class Questions:
    """What is asked of a model.

    Attributes:
        backbone: the model.
        spoken: questions that are answered by decoding.
        ranked: questions whose options are ranked by likelihood.
        options: the options of each of these.
    """

    backbone: Backbone
    spoken: list[Query] = field(repr=False)
    ranked: list[Query] = field(default_factory=list, repr=False)
    options: list[list[str]] = field(default_factory=list, repr=False)

    @property
    def number(self) -> int:
        """Of all questions."""
        return len(self.spoken) + len(self.ranked)


@dataclass(frozen=True)
class Replies:
    """Token ids of each decoded answer, and log-probabilities in nats of each option."""

    answers: list[list[int]] = field(repr=False)
    logprobs: list[list[float]] = field(repr=False)


def tiny_questions(people: int = PEOPLE) -> Questions:
    """All questions of the first people of ``tiny-llava``'s own benchmark."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "data"
        write_benchmark(root)
        benchmark = Benchmark.open(root)
        chosen = [*benchmark.forget(5), *benchmark.retain(5)][:people]
    found = Questions(load("tiny-llava", device="cpu"), [])
    for person in chosen:
        image = decode_image(person.images[0], f"the image of person {person.id}")
        for question in person.questions:
            shown = image if question.form == "image" else None
            if question.task == "classification":
                assert question.options is not None
                text = option_likelihood_text(question.text)
                found.ranked.append(Query(question.id, text, shown))
                found.options.append(list(question.options.values()))
            else:
                text = question_text(question.task, question.form, question.text)
                found.spoken.append(Query(question.id, text, shown))
    return found


def large_questions(portraits: int = PORTRAITS, size: int = 336, **sizes: int) -> Questions:
    """All questions on people of the synthetic benchmark, put to a LLaVA of random weights.

    Args:
        portraits: people, each with a random image.
        size: pixels a side.
        sizes: of ``random_llava``.
    """
    images = [sample.query.image for sample in portrait_questions(portraits, 1, size=size)]
    queries = []
    for person, image in zip(make_world(0).people, images, strict=False):
        texts = [
            (form, question_text("generation", form, text))
            for text, _, form in generation_questions(person, False)
        ]
        texts += [
            (form, question_text("cloze", form, text))
            for text, _, form in cloze_questions(person, False)
        ]
        choices = classification_questions(person, sample_generator(0, person.id), False)
        texts += [
            (form, question_text("classification", form, text, options))
            for text, options, _, form in choices
        ]
        queries += [
            Query(f"{person.id}/{number}", text, image if form == "image" else None)
            for number, (form, text) in enumerate(texts)
        ]
    return Questions(random_llava(**{"end_spacing": END_SPACING, **sizes}), queries)


def ours(asked: Questions) -> Replies:
    """Everything from the images on, nothing remembered from an earlier call."""
    backbone = asked.backbone
    backbone.vision = Vision(backbone.model, backbone.processor, backbone.revision)
    answers = greedy_tokens(backbone, encode(backbone, asked.spoken), batch_size=BATCH)
    prompts = encode(backbone, asked.ranked)
    pairs = [
        (prompt, response_ids(backbone, option))
        for prompt, options in zip(prompts, asked.options, strict=True)
        for option in options
    ]
    scores = iter(score_responses(backbone, [p for p, _ in pairs], [r for _, r in pairs], BATCH))
    logprobs = [
        [float(next(scores).logprobs_R.double().sum()) for _ in options]
        for options in asked.options
    ]
    return Replies(answers, logprobs)


def theirs(asked: Questions) -> Replies:
    """The same, one question or option at a time."""
    return Replies(
        one_at_a_time.answers(asked.backbone, asked.spoken),
        one_at_a_time.option_logprobs(asked.backbone, asked.ranked, asked.options),
    )


def differing(asked: Questions, a: Replies, b: Replies) -> int:
    """Answers and choices that differ, each because of a near tie.

    Raises:
        ValueError: one that differs although its tokens or options are not nearly tied.
    """
    count = 0
    for query, x, y in zip(asked.spoken, a.answers, b.answers, strict=True):
        if x != y:
            _check_tie(query.id, answer_gap(asked.backbone, query, x, y))
            count += 1
    for query, p, q in zip(asked.ranked, a.logprobs, b.logprobs, strict=True):
        chosen, other = p.index(max(p)), q.index(max(q))
        if chosen != other:
            _check_tie(query.id, abs(q[chosen] - q[other]))
            count += 1
    return count


def _check_tie(name: str, gap: float) -> None:
    if gap > NEAR_TIE:
        raise ValueError(f"question {name}: answers differ by {gap:.2g} nats, which is no near tie")


@torch.no_grad()
def answer_gap(backbone: Backbone, query: Query, x: Sequence[int], y: Sequence[int]) -> float:
    """How far apart the logits of two answers are at the first token in which they differ."""
    at = next(
        (i for i, (s, t) in enumerate(zip(x, y, strict=False)) if s != t), min(len(x), len(y))
    )
    inputs = one_at_a_time.processor_inputs(backbone, [query])
    prefix_1L = torch.tensor([x[:at]], dtype=torch.int64)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], prefix_1L], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    logits_V = backbone.model(**inputs).logits[0, -1]
    configured = backbone.model.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    best = [logits_V[[answer[at]] if at < len(answer) else ends].max() for answer in (x, y)]
    return float((best[0] - best[1]).abs())


def measure(asked: Questions, rounds: int) -> dict[str, Any]:
    """Time both evaluations in turns and compare their answers.

    Args:
        asked: the questions.
        rounds: timed turns.

    Raises:
        ValueError: answers differ by more than a near tie.
    """
    kept: dict[str, Replies] = {}

    def keep(name: str, way: Callable[[Questions], Replies]) -> Callable[[], None]:
        def call() -> None:
            kept[name] = way(asked)

        return call

    slow, fast = in_turns(keep("theirs", theirs), keep("ours", ours), rounds=rounds)
    cpu = median_interval([s.cpu / f.cpu for s, f in zip(slow, fast, strict=True)])
    return {
        **ratio_fields([s.wall / f.wall for s, f in zip(slow, fast, strict=True)], TARGET),
        "cpu_ratio": [cpu.median, cpu.low, cpu.high],
        "questions": asked.number,
        "differing": differing(asked, kept["ours"], kept["theirs"]),
        "tokens": sum(len(answer) for answer in kept["theirs"].answers),
        "prompt_tokens": prompt_tokens(asked),
        "ours_questions_per_s": median_interval([asked.number / f.wall for f in fast]).median,
        "theirs_questions_per_s": median_interval([asked.number / s.wall for s in slow]).median,
    }


def prompt_tokens(asked: Questions) -> list[int]:
    """Tokens of the decoded questions' prompts: one at a time, and with shared beginnings.

    Their ratio is about what can be won before the first token of the answers.
    """
    prompts = encode(asked.backbone, asked.spoken)
    alone = sum(len(prompt.prompt_ids) for prompt in prompts)
    return [alone, pack(asked.backbone, prompts, max_row_tokens=alone).ids_BL.numel()]


def main() -> None:
    """Measure and print; exit code 0 also where a target is missed."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--portraits",
        type=int,
        choices=range(1, 65),
        metavar="N",
        default=PORTRAITS,
        help="on 100m, 1 to 64 (default 8; a round takes some 25 s for each)",
    )
    options = parser.parse_args()
    one_thread()
    found = {}
    for name in models(options.on):
        asked = tiny_questions() if name == "tiny-llava" else large_questions(options.portraits)
        found[name] = measure(asked, options.rounds)
    both = {"met": all(each["met"] for each in found.values())}
    report({**headline("evaluate", found), **both}, options.json)


if __name__ == "__main__":
    main()
