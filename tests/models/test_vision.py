"""Features of the frozen tower against the model's own, and how often the tower is run."""

import copy
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.conftest import make_random_backbone
from tests.models.test_encoding import picture
from tests.random_qwen import make_random_qwen
from tests.workers import CONTEXT
from vgid.models.backbones import Backbone
from vgid.models.encoding import Query, encode
from vgid.models.packing import response_hidden
from vgid.models.store import ContentStore, clear
from vgid.models.vision import Vision

SIZES = [(64, 64), (200, 150), (84, 140), (150, 200), (64, 64)]


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [picture(seed, size) for seed, size in enumerate(SIZES)]


@pytest.fixture(scope="module", params=[make_random_backbone, make_random_qwen])
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return request.param()


def fresh(backbone: Backbone, root: Path | None = None, revision: str = "base") -> Vision:
    """The eyes of a session that has seen nothing yet."""
    vision = Vision(backbone.model, backbone.processor, revision)
    vision.store = None if root is None else ContentStore(root, "vision")
    return vision


def look(vision: Vision, images: list[Image.Image]) -> list[torch.Tensor]:
    return [vision.features(vision.picture(image)) for image in images]


@contextmanager
def tower_calls(backbone: Backbone) -> Iterator[list[int]]:
    core = backbone.model.model
    tower = core.visual if hasattr(core, "visual") else core.vision_tower
    calls: list[int] = []
    handle = tower.register_forward_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


@torch.no_grad()
def test_features_equal_the_models_own_of_the_whole_batch(backbone, images):
    inputs = backbone.processor.image_processor(images, return_tensors="pt")
    expected = backbone.model.get_image_features(**inputs, return_dict=True).pooler_output
    for got_TD, expected_TD in zip(look(fresh(backbone), images), expected, strict=True):
        assert got_TD.shape == expected_TD.shape
        assert (got_TD - expected_TD).abs().max() <= 1e-6 * expected_TD.abs().max()
        assert not got_TD.requires_grad


def test_features_are_the_same_bits_whatever_else_was_seen(backbone, images, tmp_path):
    expected = look(fresh(backbone), images)
    backwards = look(fresh(backbone), images[::-1])[::-1]
    alone = [look(fresh(backbone), [image])[0] for image in images]
    stored = look(fresh(backbone, tmp_path), images)
    read = look(fresh(backbone, tmp_path), images)
    for row in (backwards, alone, stored, read):
        assert all(torch.equal(a, b) for a, b in zip(row, expected, strict=True))


def test_different_images_have_different_keys_and_features(backbone, images):
    vision = fresh(backbone)
    pictures = [vision.picture(image) for image in images]
    assert len({p.key for p in pictures}) == len({p.token_key for p in pictures}) == len(images)
    assert all(p.token_key < 0 for p in pictures)
    assert vision.picture(images[0].copy()).key == pictures[0].key
    turned = Image.frombytes("RGB", (32, 128), images[0].tobytes())
    assert vision.picture(turned).key != pictures[0].key, "same bytes, another shape"


def test_the_tower_runs_once_an_image_for_all_questions_and_passes(backbone, images):
    queries = [Query(f"{i}/{q}", f"Question {q}?", images[i]) for q in range(3) for i in range(3)]
    backbone.vision = fresh(backbone)
    with tower_calls(backbone) as calls, torch.no_grad():
        prompts = encode(backbone, queries)
        assert not calls
        for _ in range(2):
            response_hidden(backbone, prompts, [[90, 91]] * len(prompts))
    assert len(calls) == 3


def test_sessions_share_a_store(backbone, images, tmp_path):
    with tower_calls(backbone) as calls:
        look(fresh(backbone, tmp_path), images[:3])
        assert len(calls) == 3
        later = fresh(backbone, tmp_path)
        look(later, images)
        assert len(calls) == len(images)
        look(later, images)
    assert len(calls) == len(images)
    assert later.store is not None
    assert (later.store.hits, later.store.misses) == (3, len(images) - 3)


def _in_a_process(kind: str, root: Path, queue: Any) -> None:
    backbone = make_random_backbone() if kind == "tiny-llava" else make_random_qwen()
    with tower_calls(backbone) as calls:
        features = look(
            fresh(backbone, root), [picture(seed, size) for seed, size in enumerate(SIZES)]
        )
    queue.put((len(calls), [x.tolist() for x in features]))


def test_processes_share_a_store(backbone, images, tmp_path):
    expected = look(fresh(backbone, tmp_path), images[:3])
    queue = CONTEXT.Queue()
    process = CONTEXT.Process(
        target=_in_a_process, args=(backbone.spec.name, tmp_path, queue), daemon=True
    )
    process.start()
    calls, features = queue.get(timeout=300)
    process.join()
    assert calls == len(images) - 3
    assert features[:3] == [x.tolist() for x in expected]
    with tower_calls(backbone) as again:
        read = look(fresh(backbone, tmp_path), images)
    assert not again
    assert [x.tolist() for x in read] == features


def test_memory_holds_the_most_recently_used_within_its_bound(backbone, images, monkeypatch):
    a, b, c = images[0], images[4], picture(9)  # of one size
    size = look(fresh(backbone), [a])[0].nbytes
    monkeypatch.setattr("vgid.models.vision.MEMORY_BYTES", 2 * size)
    vision = fresh(backbone)
    seen = [vision.picture(image) for image in (a, b, c)]
    with tower_calls(backbone) as calls:
        for index, expected in [(0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4), (0, 4), (2, 5)]:
            vision.features(seen[index])
            assert len(calls) == expected, "least recently used goes first"
            assert sum(v.nbytes for v, _ in vision._features._entries.values()) <= 2 * size


def test_an_image_larger_than_the_bound_is_still_kept_alone(backbone, images, monkeypatch):
    monkeypatch.setattr("vgid.models.vision.MEMORY_BYTES", 1)
    vision = fresh(backbone)
    with tower_calls(backbone) as calls:
        look(vision, [images[0], images[0], images[1], images[0]])
    assert len(calls) == 3


def test_prompts_keep_no_pixels_alive(backbone):
    """Of 64 to 512 px, at the resolution that the processor is set to."""
    processor = copy.deepcopy(backbone.processor)
    if "longest_edge" in processor.image_processor.size:
        processor.image_processor.size = {"shortest_edge": 28**2, "longest_edge": 512**2}
    else:
        processor.image_processor.size = {"shortest_edge": 512}
        processor.image_processor.crop_size = {"height": 512, "width": 512}
    eyes = Backbone(backbone.spec, backbone.model, processor, "base")
    images = [picture(seed, (side, side)) for seed, side in enumerate((64, 128, 256, 512) * 3)]
    eyes.vision.picture(picture(99))  # what is imported late counts for nobody
    tracemalloc.start()
    try:
        pictures = [eyes.vision.picture(image) for image in images]
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    pixels = sum(shown.tensors["pixel_values"].nbytes for shown in pictures)
    assert kept < 0.02 * pixels
    assert pixels > 12 * 2**20


def test_another_revision_shares_nothing(backbone, images, tmp_path):
    with tower_calls(backbone) as calls:
        look(fresh(backbone, tmp_path, "one"), images[:2])
        look(fresh(backbone, tmp_path, "other"), images[:2])
        assert len(calls) == 4
        look(fresh(backbone, tmp_path, "one"), images[:2])
    assert len(calls) == 4


def test_another_dtype_shares_nothing(backbone, images, tmp_path):
    (whole,) = look(fresh(backbone, tmp_path), images[:1])
    half = Backbone(
        backbone.spec, copy.deepcopy(backbone.model).bfloat16(), backbone.processor, "base"
    )
    with tower_calls(half) as calls:
        (rounded,) = look(fresh(half, tmp_path), images[:1])
    assert len(calls) == 1
    assert (whole.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(rounded.float(), whole, atol=0.1, rtol=0.1)


def test_another_image_processor_shares_nothing(backbone, images, tmp_path):
    """Other settings, or the class of other pixels that torchvision brings with it."""
    (first,) = look(fresh(backbone, tmp_path), images[1:2])
    resampled, other = copy.deepcopy(backbone.processor), copy.deepcopy(backbone.processor)
    resampled.image_processor.resample = Image.Resampling.NEAREST
    images_of = type(other.image_processor)
    other.image_processor.__class__ = type(f"{images_of.__name__}Fast", (images_of,), {})
    seen = []
    for processor in (resampled, other, backbone.processor):
        vision = Vision(backbone.model, processor, "base")
        vision.store = ContentStore(tmp_path, "vision")
        with tower_calls(backbone) as calls:
            seen += look(vision, images[1:2])
        assert len(calls) == (processor is not backbone.processor)
    assert (seen[0] - first).abs().max() > 1e-2 * first.abs().max()
    assert torch.equal(seen[1], first) and torch.equal(seen[2], first)


def test_a_cleared_store_is_filled_again(backbone, images, tmp_path):
    before = look(fresh(backbone, tmp_path), images[:2])
    assert clear(tmp_path).entries == 2
    with tower_calls(backbone) as calls:
        after = look(fresh(backbone, tmp_path), images[:2])
    assert len(calls) == 2
    assert len(list(tmp_path.glob("vision/*.safetensors"))) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
