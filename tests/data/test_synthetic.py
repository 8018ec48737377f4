import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.tiny_benchmark import EVALUATION, SCHEMAS, encoded
from vgid.data import fictitious
from vgid.data.benchmark import Benchmark, decode_image
from vgid.data.check import check_benchmark
from vgid.data.synthetic import write_benchmark
from vgid.errors import InputError
from vgid.seeds import sample_generator

PEOPLE = {
    "Full_Set": 100,
    "ft_Data": 100,
    **{f"forget_{ratio}": ratio for ratio in (5, 10, 15)},
    **{f"retain_{ratio}": ratio for ratio in (95, 90, 85)},
    "Test_Set": 100,
    "Retain_Set": 12,
}
TYPES = {"image": "Image_Textual", "text": "Pure_Text"}


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    root = tmp_path_factory.mktemp("synthetic") / "new" / "benchmark"
    write_benchmark(root, seed=1)
    return Benchmark.open(root)


def test_files_and_column_types_are_those_of_the_real_benchmark(benchmark: Benchmark):
    files = {path.relative_to(benchmark.root).as_posix() for path in benchmark.root.rglob("*.*")}
    assert files == {
        *(f"{config}/train-00000-of-00001.parquet" for config in PEOPLE if config != "Test_Set"),
        "Test_Set/train-00000-of-00002.parquet",
        "Test_Set/train-00001-of-00002.parquet",
    }
    for file in files:
        expected = SCHEMAS.get(file.split("/", maxsplit=1)[0], EVALUATION)
        assert pq.read_schema(benchmark.root / file).equals(expected)


def test_it_has_no_defects_and_counts_of_the_design(benchmark: Benchmark):
    report = check_benchmark(benchmark.root)
    assert report.defects == []
    assert {name: count.people for name, count in report.configs.items()} == PEOPLE
    assert report.configs["Test_Set"].images == 200
    assert report.configs["forget_5"].questions == {
        "generation": {"image": 60, "text": 15},
        "cloze": {"image": 20, "text": 20},
        "classification": {"image": 25, "text": 25},
    }


def test_forget_sets_are_nested_and_retain_is_the_rest(benchmark: Benchmark):
    everyone = set(benchmark.person_ids("Full_Set"))
    smaller: set[str] = set()
    for ratio in (5, 10, 15):
        forget = set(benchmark.person_ids(f"forget_{ratio}"))
        assert smaller < forget
        assert set(benchmark.person_ids(f"retain_{100 - ratio}")) == everyone - forget
        smaller = forget


def test_people_are_those_of_the_world(benchmark: Benchmark):
    world = fictitious.make_world(1)
    for people, kind in [(benchmark.full(), "benchmark"), (benchmark.celebrities(), "celebrity")]:
        for person, source in zip(people, world.of_kind(kind), strict=True):
            assert person.id == source.id
            assert person.images == (encoded(fictitious.portrait(1, source)),)
            rng = sample_generator(1, f"options/{source.id}/False")
            asked = [
                *fictitious.generation_questions(source, paraphrased=False),
                *fictitious.cloze_questions(source, paraphrased=False),
            ]
            chosen = fictitious.classification_questions(source, rng, paraphrased=False)
            read = [q for q in person.questions if q.task != "classification"]
            assert [(q.text, q.answer, q.form) for q in read] == asked
            read = [q for q in person.questions if q.task == "classification"]
            assert [(q.text, q.options, q.answer, q.form) for q in read] == chosen


def test_test_set_has_other_pictures_and_other_words(benchmark: Benchmark):
    for plain, test in zip(benchmark.full(), benchmark.test(), strict=True):
        assert plain.id == test.id
        assert len({*plain.images, *test.images}) == 3
        assert not {q.text for q in plain.questions} & {q.text for q in test.questions}
        answers = [
            [(q.task, q.form, q.answer) for q in person.questions if q.task != "classification"]
            for person in (plain, test)
        ]
        assert answers[0] == answers[1]
        assert {decode_image(image).size for image in test.images} == {(64, 64)}


def test_training_pairs_are_the_plain_image_questions(benchmark: Benchmark):
    pairs = benchmark.training_pairs()
    for person in benchmark.full():
        expected = [
            (q.text, q.answer)
            for q in person.questions
            if q.task == "generation" and q.form == "image"
        ]
        assert [(pair.question, pair.answer) for pair in pairs[person.id]] == expected


def test_metadata_is_a_json_list_as_in_the_real_benchmark(benchmark: Benchmark):
    table = pq.read_table(benchmark.root / "ft_Data" / "train-00000-of-00001.parquet")
    entries = json.loads(table["metadata"][0].as_py())
    assert len(entries) == 12
    assert all(set(entry) == {"Question", "Answer"} for entry in entries)


def test_the_seed_decides_every_byte(benchmark: Benchmark, tmp_path: Path):
    again = tmp_path / "again"
    again.mkdir()  # an empty folder may be filled
    write_benchmark(again, seed=1)
    assert Benchmark.open(again).sha256 == benchmark.sha256


def test_a_folder_in_use_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder"):
        write_benchmark(tmp_path)
    with pytest.raises(InputError, match="not an empty folder"):
        write_benchmark(tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="is the current folder; name a new folder"):
        write_benchmark(Path())


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write the benchmark there \(Not a directory\)"):
        write_benchmark(tmp_path / "file" / "below")


def test_nothing_is_left_of_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", full_disk)
    with pytest.raises(InputError, match="No space left on device"):
        write_benchmark(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_negative_seed(tmp_path: Path):
    with pytest.raises(InputError, match="seed -1: must not be negative"):
        write_benchmark(tmp_path / "new", seed=-1)
