"""What the vanilla model is taught: questions, answers and portraits of ``ft_Data``.

The question is shown as stored, without the answer instructions of the evaluation, as in the
benchmark's own fine-tuning (https://github.com/franciscoliu/MLLMU-Bench, finetune.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vgid.data.benchmark import Benchmark, decode_image
from vgid.data.layout import Defect, read_rows
from vgid.data.people import parse_id, parse_images
from vgid.models.backbones import Backbone
from vgid.models.encoding import Encoded, Query, encode, response_ids
from vgid.prompts import generation_text


@dataclass(frozen=True)
class Sample:
    """A question of ``ft_Data`` about an encoded portrait, and its answer."""

    id: str
    person_id: str
    image: bytes
    question: str
    answer: str


def read_samples(benchmark: Benchmark) -> list[Sample]:
    """Everyone's fine-tuning questions, in file order.

    Raises:
        InputError: a defect of ``ft_Data``.
    """
    pairs = benchmark.training_pairs()
    samples = []
    for row in read_rows(benchmark.root, "ft_Data", ("ID", "image")):
        if isinstance(row, Defect):
            raise benchmark.error(row)
        person_id, _ = parse_id("ft_Data", row)
        images, defects = parse_images("ft_Data", row)
        benchmark.refuse(defects)
        image = next(iter(images.values()))
        samples += [
            Sample(pair.id, person_id, image, pair.question, pair.answer)
            for pair in pairs[person_id]
        ]
    return samples


def encode_samples(backbone: Backbone, samples: Sequence[Sample]) -> list[Encoded]:
    """The samples' prompts: portrait and question in the backbone's frame.

    Raises:
        InputError: an image that cannot be read, or a sample that the model cannot take.
    """
    images = {
        sample.person_id: decode_image(sample.image, f"the ft_Data image of {sample.person_id}")
        for sample in samples
    }
    queries = [
        Query(
            sample.id,
            generation_text(sample.question, "image", "raw"),
            images[sample.person_id],
        )
        for sample in samples
    ]
    return [
        prompt
        for sample, query in zip(samples, queries, strict=True)
        for prompt in encode(
            backbone,
            [query],
            room=len(response_ids(backbone, sample.answer, sample.id)),
        )
    ]
