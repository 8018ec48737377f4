import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image

from tests.conftest import make_random_backbone
from tests.models.test_encoding import picture
from tests.padded import collate
from tests.workers import CONTEXT
from vgid.method.samples import TrainingSample
from vgid.method.teacher import Intervention, TeacherStore, intervene
from vgid.models.backbones import Backbone
from vgid.models.encoding import Query, encode, response_ids
from vgid.models.packing import response_hidden
from vgid.models.store import ContentStore
from vgid.prompts import REFUSALS, UNLEARNING_INSTRUCTIONS, generation_text

RANDOM_STRICT = Intervention("random", None, "strict", seed=3)


def samples(n: int = 6) -> list[TrainingSample]:
    questions = ["Who is shown?", "Where does this person live?", "What does this person enjoy?"]
    return [
        TrainingSample(
            Query(f"ft_Data/{i}", generation_text(questions[i % 3], "image"), picture(i)),
            f"Answer number {i}, which is made up.",
        )
        for i in range(n)
    ]


def files(root: Path) -> list[Path]:
    return sorted(root.glob("teachers/*.safetensors"))


def teachers(root: Path, backbone: Backbone) -> TeacherStore:
    return TeacherStore(ContentStore(root, "teachers"), backbone)


def test_intervention_perturbs_the_image_and_prepends_the_instruction(random_backbone):
    (sample,) = samples(1)
    (seen,) = intervene(random_backbone, [sample.query], RANDOM_STRICT)
    assert seen.text == f"{UNLEARNING_INSTRUCTIONS['strict']}\n{sample.query.text}"
    assert seen.image is not None and sample.query.image is not None
    assert seen.image.tobytes() != sample.query.image.tobytes()
    assert intervene(random_backbone, [sample.query], Intervention()) == [sample.query]


def test_store_gives_the_logits_of_the_base_bit_for_bit(random_backbone, tmp_path):
    store = teachers(tmp_path, random_backbone)
    for source, intervention in (("teacher", RANDOM_STRICT), ("reference", Intervention())):
        cold = store.targets(samples(), intervention, source)
        warm = teachers(tmp_path, random_backbone).targets(samples(), intervention, source)
        encoded = encode(
            random_backbone,
            intervene(random_backbone, [s.query for s in samples()], intervention),
        )
        batch = collate(random_backbone, encoded, [t.response for t in cold])
        with torch.no_grad():
            responses = [t.response for t in cold]
            fresh = random_backbone.model.lm_head(
                response_hidden(random_backbone, encoded, responses)
            )
            full = random_backbone.model(**batch.inputs).logits[:, :-1][batch.predicts_BL]
        for targets in (cold, warm):
            stored = random_backbone.model.lm_head(torch.cat([t.hidden_RD for t in targets]))
            assert torch.equal(stored, fresh)
            torch.testing.assert_close(stored, full, atol=1e-4, rtol=1e-5)
            assert torch.equal(stored.argmax(-1), full.argmax(-1))


def test_teacher_response_is_its_own_greedy_answer(random_backbone, tmp_path):
    targets = teachers(tmp_path, random_backbone).targets(samples(), RANDOM_STRICT, "teacher")
    for target in targets:
        greedy = random_backbone.model.lm_head(target.hidden_RD).argmax(-1).tolist()
        assert greedy == target.response


def test_a_refusal_is_drawn_for_each_sample_and_stored_under_the_plain_prompt(
    random_backbone, tmp_path
):
    many = samples(40)
    store = teachers(tmp_path, random_backbone)
    drawn = store.targets(many, Intervention(seed=3), "refusal")
    known = {tuple(response_ids(random_backbone, text)) for text in REFUSALS}
    assert {tuple(t.response) for t in drawn} == known
    again = [t.response for t in store.targets(many[::-1], Intervention(seed=3), "refusal")]
    assert again[::-1] == [t.response for t in drawn]
    other = store.targets(many, Intervention(seed=4), "refusal")
    assert [t.response for t in other] != [t.response for t in drawn]
    (prompt,) = encode(random_backbone, [many[0].query])
    with torch.no_grad():
        expected = response_hidden(random_backbone, [prompt], [drawn[0].response])
    torch.testing.assert_close(drawn[0].hidden_RD, expected, atol=1e-5, rtol=1e-5)


def other_backbones() -> Iterator[Backbone]:
    """Backbones that differ from ``random_backbone`` in one thing each."""
    yield make_random_backbone(seed=1)
    half = make_random_backbone()
    half.model.bfloat16()
    yield half
    resampled = make_random_backbone()
    resampled.processor.image_processor.resample = Image.Resampling.NEAREST
    yield resampled
    for change in ({"image": "{text} <image>\n"}, {"opening": "A chat."}, {"separator": ""}):
        framed = make_random_backbone()
        framed.spec = replace(framed.spec, frame=replace(framed.spec.frame, **change))
        yield framed


def test_key_depends_on_everything_the_target_depends_on(random_backbone, tmp_path):
    store = teachers(tmp_path, random_backbone)
    variants = [
        (samples(2), Intervention(), "reference"),
        (samples(3), Intervention(), "reference"),
        (samples(2), Intervention(style="polite"), "reference"),
        (samples(2), Intervention("white"), "reference"),
        (samples(2), Intervention("gaussian", 0.5), "reference"),
        (samples(2), Intervention("gaussian", 0.6), "reference"),
        (samples(2), Intervention("gaussian", 0.5, seed=1), "reference"),
        (samples(2), Intervention(), "teacher"),
        (samples(2), Intervention(), "refusal"),
        (samples(2), Intervention(seed=1), "refusal"),
    ]
    for variant in variants:
        store.targets(*variant)
    assert len(files(tmp_path)) == len(variants)
    assert (store.store.hits, store.store.misses) == (0, len(variants))
    for variant in variants:
        store.targets(*variant)
    assert (store.store.hits, store.store.misses) == (len(variants), len(variants))
    for n, other in enumerate(other_backbones(), 1):
        teachers(tmp_path, other).targets(*variants[0])
        assert len(files(tmp_path)) == len(variants) + n


def _fill(root: Path, started: float) -> None:
    backbone = make_random_backbone()
    torch.set_num_threads(1)
    time.sleep(max(0.0, started - time.time()))
    store = teachers(root, backbone)
    store.targets(samples(), RANDOM_STRICT, "teacher")
    (root / f"misses-{os.getpid()}").write_text(str(store.store.misses))


def test_two_processes_compute_a_chunk_once_and_agree(random_backbone, tmp_path):
    start = time.time() + 5.0
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    workers = [CONTEXT.Process(target=_fill, args=(shared, start)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    assert sum(int(p.read_text()) for p in shared.glob("misses-*")) == 1
    teachers(alone, random_backbone).targets(samples(), RANDOM_STRICT, "teacher")
    assert [p.name for p in files(shared)] == [p.name for p in files(alone)]
    assert files(shared)[0].read_bytes() == files(alone)[0].read_bytes()


SMALL = 4  # samples of a chunk


def _hold(lock: Path, seconds: float, held: Any) -> None:
    with FileLock(lock):
        held.set()
        time.sleep(seconds)


def test_a_chunk_that_another_process_computes_is_asked_for_last(
    random_backbone, tmp_path, monkeypatch
):
    """So that processes which begin together share the chunks out; the order stays."""
    monkeypatch.setattr("vgid.method.teacher.CHUNK", SMALL)
    many = samples(3 * SMALL)  # three chunks
    expected = teachers(tmp_path / "0", random_backbone).targets(many, Intervention(), "reference")
    order = []
    store = teachers(tmp_path / "1", random_backbone)
    compute = store._compute
    monkeypatch.setattr(
        store,
        "_compute",
        lambda chunk, *how: order.append(chunk[0].query.id) or compute(chunk, *how),
    )
    # The store's name of the first chunk, under which the other process holds it.
    probe = teachers(tmp_path / "probe", random_backbone)
    monkeypatch.setattr(probe.store, "get_or_compute", lambda key, *_: names.append(key) or 1 / 0)
    names: list[str] = []
    with pytest.raises(ZeroDivisionError):
        probe.targets(many, Intervention(), "reference")
    held = CONTEXT.Event()
    lock = tmp_path / "1" / "teachers" / f"{names[0]}.lock"
    other = CONTEXT.Process(target=_hold, args=(lock, 3.0, held))
    other.start()
    assert held.wait(60)
    got = store.targets(many, Intervention(), "reference")
    other.join(60)
    assert order == [many[n].query.id for n in (SMALL, 2 * SMALL, 0)]
    assert [t.response for t in got] == [t.response for t in expected]
    assert all(torch.equal(a.hidden_RD, b.hidden_RD) for a, b in zip(got, expected, strict=True))
