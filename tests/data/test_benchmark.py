import io
import random
import struct
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter

from tests.tiny_benchmark import (
    EVALUATION,
    SHARD,
    TEST,
    TRAINING,
    encoded,
    picture,
    rows_of,
    write_config,
    write_tiny,
)
from vgid.data import layout
from vgid.data.benchmark import Benchmark, Person, Question, decode_image, split_questions
from vgid.data.people import id_problem
from vgid.deployment.record import Pseudonym
from vgid.errors import InputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return Benchmark.open(write_tiny(tmp_path_factory.mktemp("tiny")))


def test_layout_is_that_of_the_data_card():
    assert layout.EVALUATION_SCHEMA.equals(EVALUATION)
    assert layout.TEST_SCHEMA.equals(TEST)
    assert layout.TRAINING_SCHEMA.equals(TRAINING)


def test_people_of_each_config(tiny: Benchmark):
    def ids(people: tuple[Person, ...]) -> list[str]:
        return [person.id for person in people]

    assert ids(tiny.forget(5)) == ids(tiny.forget(15)) == ["007"]
    assert ids(tiny.retain(5)) == ids(tiny.retain(15)) == ["008", "009"]
    assert ids(tiny.full()) == ids(tiny.test()) == ["007", "008", "009"]
    assert ids(tiny.celebrities()) == ["501"]
    assert ids(tiny.test(only=["009", "007", "nobody"])) == ["007", "009"]
    assert tiny.person_ids("retain_90") == ("008", "009")


def test_questions_of_a_person(tiny: Benchmark):
    (person,) = tiny.forget(5)
    by_id = {question.id: question for question in person.questions}
    assert list(by_id) == [
        "forget_5/007/classification/image/0",
        "forget_5/007/classification/image/1",
        "forget_5/007/classification/text/0",
        "forget_5/007/generation/image/0",
        "forget_5/007/generation/text/0",
        "forget_5/007/generation/image/1",
        "forget_5/007/cloze/image/0",
        "forget_5/007/cloze/text/0",
    ]
    options = {"A": "cook", "B": "nurse", "C": "pilot", "D": "judge"}
    choice = by_id["forget_5/007/classification/image/1"]
    assert (choice.text, choice.answer, choice.options) == ("What work?", "B", options)
    gap = by_id["forget_5/007/cloze/text/0"]
    assert gap == Question(gap.id, "007", "cloze", "text", "Fay 007 is a __.", "nurse", None)


def test_images_are_the_stored_bytes(tiny: Benchmark):
    assert tiny.forget(5)[0].images == (picture("007"),)
    assert tiny.test()[1].images == (picture("008", 1), picture("008", 2))


def test_training_pairs(tiny: Benchmark):
    pairs = tiny.training_pairs()
    assert list(pairs) == ["007", "008", "009"]
    (pair,) = pairs["008"]
    assert (pair.id, pair.person_id) == ("ft_Data/008/0", "008")
    assert (pair.question, pair.answer) == ("Who is this?", "Fay 008")


def test_either_image_column_in_any_config(tmp_path: Path):
    swapped = rows_of("forget_5")
    for row in swapped:
        row["images"] = [row.pop("image")]
    write_config(tmp_path, "forget_5", swapped, TEST)
    single = rows_of("Test_Set")
    for row in single:
        row["image"] = row.pop("images")[0]
    write_config(tmp_path, "Test_Set", single, EVALUATION)
    benchmark = Benchmark.open(tmp_path)
    assert benchmark.forget(5)[0].images == (picture("007"),)
    assert benchmark.test()[0].images == (picture("007", 1),)


def test_optional_and_additional_columns(tmp_path: Path):
    write_tiny(tmp_path)
    path = tmp_path / "forget_5" / SHARD
    table = pq.read_table(path).drop_columns(["biography", "question", "answer"])
    pq.write_table(table.append_column("Directory", pa.array(["a/b"])), path)
    assert len(Benchmark.open(tmp_path).forget(5)[0].questions) == 8


def test_tasks_that_a_profile_lacks_are_no_defect(tmp_path: Path):
    def shorten(rows):
        rows[0]["Mask_Task"] = None
        rows[0]["Generation_Task"] = []
        rows[0]["Classification_Task"]["Pure_Text_Questions"] = None

    write_tiny(tmp_path, {"forget_5": shorten})
    (person,) = Benchmark.open(tmp_path).forget(5)
    assert [question.task for question in person.questions] == ["classification"] * 2


def test_shards_are_read_in_order(tmp_path: Path):
    write_tiny(tmp_path)
    folder = tmp_path / "Test_Set"
    table = pq.read_table(folder / SHARD)
    (folder / SHARD).unlink()
    pq.write_table(table.slice(2), folder / "train-00001-of-00002.parquet")
    pq.write_table(table.slice(0, 2), folder / "train-00000-of-00002.parquet")
    benchmark = Benchmark.open(tmp_path)
    assert [person.id for person in benchmark.test()] == ["007", "008", "009"]
    (folder / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(InputError, match=r"train-00000-of-00002.parquet: the shard is missing"):
        benchmark.test()


def test_a_torn_config_stops_only_those_who_read_it(tmp_path: Path):
    write_tiny(tmp_path)
    path = tmp_path / "Retain_Set" / SHARD
    path.write_bytes(path.read_bytes()[:-9])
    benchmark = Benchmark.open(tmp_path)
    assert len(benchmark.forget(5)) == 1
    with pytest.raises(InputError, match=rf"Retain_Set: {SHARD}: .*vgid data check") as caught:
        benchmark.celebrities()
    assert "\n" not in str(caught.value)


def test_training_pairs_need_no_images_or_questions(tmp_path: Path):
    write_tiny(tmp_path)
    path = tmp_path / "ft_Data" / SHARD
    pq.write_table(pq.read_table(path).drop_columns("image"), path)
    assert len(Benchmark.open(tmp_path).training_pairs()) == 3


@pytest.mark.parametrize("column", ["ID", "image", "Mask_Task", "Classification_Task"])
def test_missing_column_is_named(tmp_path: Path, column: str):
    write_tiny(tmp_path)
    path = tmp_path / "forget_5" / SHARD
    pq.write_table(pq.read_table(path).drop_columns(column), path)
    with pytest.raises(InputError, match=f"forget_5: {column}: the column is missing"):
        Benchmark.open(tmp_path).forget(5)


def test_bad_rows_are_named_without_their_content(tmp_path: Path):
    def spoil(rows):
        rows[1]["Generation_Task"][0]["Ground_Truth"] = " "

    write_tiny(tmp_path, {"retain_95": spoil})
    field = r"row 1, Generation_Task\[0\].Ground_Truth: the answer is empty"
    with pytest.raises(InputError, match=field) as caught:
        Benchmark.open(tmp_path).retain(5)
    assert "Fay" not in str(caught.value) and "Who" not in str(caught.value)


def test_duplicate_person_is_refused(tmp_path: Path):
    write_tiny(tmp_path, {"retain_95": lambda rows: rows.append(rows[0])})
    with pytest.raises(InputError, match="row 2, ID: the ID is a duplicate"):
        Benchmark.open(tmp_path).retain(5)


@pytest.mark.parametrize(
    "person_id",
    [
        *("", " ", "../x", "a/b", "a\\b", ".hidden", "..", "~root", "a\nb", "a\x00b", "x "),
        *("x" * 65, "two words", "Ève", "x\n"),
    ],
)
def test_dangerous_ids_are_refused(tmp_path: Path, person_id: str):
    write_tiny(tmp_path, {"forget_5": lambda rows: rows[0].update(ID=person_id)})
    with pytest.raises(InputError, match="row 0, ID: the ID"):
        Benchmark.open(tmp_path).forget(5)


@pytest.mark.parametrize("person_id", ["0", "0007", "person-7", "Eve_2.b", "x" * 64])
def test_ordinary_ids_are_accepted_by_the_reader_and_by_a_record(person_id: str):
    assert id_problem(person_id) is None
    assert TypeAdapter(Pseudonym).validate_python(person_id) == person_id


@pytest.mark.parametrize("person_id", ["two words", "Ève_2.b"])
def test_celebrities_have_names(person_id: str):
    assert id_problem(person_id, celebrity=True) is None


def test_open_refuses_what_is_no_benchmark(tmp_path: Path):
    with pytest.raises(InputError, match="no such benchmark folder"):
        Benchmark.open(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no MLLMU-Bench config"):
        Benchmark.open(tmp_path)


def test_missing_config_and_unknown_ratio(tmp_path: Path):
    write_config(tmp_path, "forget_5", rows_of("forget_5"))
    benchmark = Benchmark.open(tmp_path)
    with pytest.raises(InputError, match=r"retain_95: .*no parquet file"):
        benchmark.retain(5)
    with pytest.raises(InputError, match=r"forget_20: .*no parquet file"):
        benchmark.forget(20)


def test_digest_covers_names_and_bytes(tmp_path: Path):
    first = Benchmark.open(write_tiny(tmp_path / "a"))
    second = write_tiny(tmp_path / "b")
    assert Benchmark.open(second).sha256 == first.sha256
    (second / "README.md").write_text("not data")
    assert Benchmark.open(second).sha256 == first.sha256
    (second / "forget_10").rename(second / "swap")
    (second / "forget_5").rename(second / "forget_10")
    assert Benchmark.open(second).sha256 != first.sha256


# Splits


def person_with(counts: dict[tuple[str, str], int]) -> Person:
    questions = tuple(
        Question(f"c/p/{task}/{form}/{i}", "p", task, form, f"{task} {form} {i}", str(i), None)
        for (task, form), count in counts.items()
        for i in range(count)
    )
    return Person("p", (), questions)


counts = st.dictionaries(
    st.tuples(st.sampled_from(["generation", "cloze"]), st.sampled_from(["image", "text"])),
    st.integers(1, 9),
)


@given(counts, st.integers(0, 1000))
def test_split_is_disjoint_complete_and_balanced(counts, seed):
    person = person_with(counts)
    search = split_questions(person, "search", seed)
    held_out = split_questions(person, "held_out", seed)
    assert not set(search) & set(held_out)
    assert set(search) | set(held_out) == set(person.questions)
    for task, form in counts:
        sizes = [sum((q.task, q.form) == (task, form) for q in part) for part in (search, held_out)]
        assert abs(sizes[0] - sizes[1]) <= 1


def test_split_follows_the_question_and_not_its_place_or_config():
    person = person_with({("generation", "image"): 12, ("cloze", "text"): 5})
    shuffled = list(person.questions)
    random.Random(0).shuffle(shuffled)
    moved = [replace(q, id=f"other/p/{i}") for i, q in enumerate(shuffled)]
    texts = {q.text for q in split_questions(person, "search", 3)}
    moved_person = replace(person, questions=tuple(moved))
    assert {q.text for q in split_questions(moved_person, "search", 3)} == texts


def test_split_depends_on_seed_and_person_and_starts_on_either_side():
    person = person_with({("generation", "image"): 11})
    parts = [split_questions(person, "search", seed) for seed in range(20)]
    assert len(set(parts)) > 15
    assert {len(part) for part in parts} == {5, 6}
    other = replace(person, id="q")
    assert any(split_questions(other, "search", seed) != parts[seed] for seed in range(20))


def test_split_keeps_the_order_of_the_person():
    person = person_with({("generation", "image"): 12})
    part = split_questions(person, "held_out", 0)
    assert list(part) == [q for q in person.questions if q in part]


# Images


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [
        ("1", "PNG"),
        ("L", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGB", "WEBP"),
        ("RGB", "BMP"),
        ("RGBA", "PNG"),
        ("RGBA", "TIFF"),
        ("RGBX", "TIFF"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("YCbCr", "JPEG"),
        ("YCbCr", "TIFF"),
        ("I;16", "PNG"),
        ("I;16B", "TIFF"),
        ("I", "TIFF"),
        ("F", "TIFF"),
        ("LAB", "TIFF"),
    ],
)
def test_any_pillow_mode_becomes_rgb(mode: str, file_format: str):
    grey = {"I;16": 130 << 8, "I;16B": 130 << 8, "I": 130, "F": 130.0}
    if mode in grey:
        image = Image.new(mode, (6, 4), grey[mode])
    elif mode == "LAB":
        image = Image.new(mode, (6, 4), (136, 128, 128))  # L* 53, no colour: sRGB grey 128
    else:
        grey_image = Image.new("RGB", (6, 4), (130, 130, 130))
        image = grey_image.quantize() if mode == "P" else grey_image.convert(mode)
    decoded = decode_image(encoded(image, file_format))
    assert (decoded.mode, decoded.size) == ("RGB", (6, 4))
    if mode != "1":
        assert np.abs(np.asarray(decoded).astype(int) - 130).max() <= 4


def test_palette_with_transparency_keeps_its_colours():
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=b"\x00\x80")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Pillow's; others' files may be closed here
        assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (10, 200, 30)


def test_pixels_survive_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    decoded = decode_image(encoded(Image.fromarray(pixels)))
    assert np.array_equal(np.asarray(decoded), pixels)


@pytest.mark.parametrize("side", [7100, 10_000, 60_000])
def test_oversized_image_is_refused_by_its_header(side: int):
    # A header without pixels: decoding would fail as unreadable, so "pixels" proves the order.
    small = encoded(Image.new("1", (1, 1)))
    body = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
    header = small[:8] + small[8:12] + body + struct.pack(">I", zlib.crc32(body)) + small[33:]
    with pytest.raises(InputError, match="photo 3 has more than 50,000,000 pixels"):
        decode_image(header, source="photo 3")


def test_oversized_file_is_refused_unopened():
    with pytest.raises(InputError, match="has more than 33,554,432 bytes"):
        decode_image(b"\x89PNG" + bytes(2**25))


@pytest.mark.parametrize(
    "data", [b"", b"not an image", picture("007")[:-30], b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_unreadable_image(data: bytes):
    with pytest.raises(InputError, match="the image cannot be read"):
        decode_image(data)
