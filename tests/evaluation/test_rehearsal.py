"""What the check calls fine runs, and what it refuses the plan of a study refuses as well."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.test_check import huge_png
from tests.tiny_benchmark import SHARD, encoded
from vgid.config import RequestConfig, StudyConfig, TrialConfig
from vgid.data.benchmark import Benchmark
from vgid.data.check import Report, check_benchmark
from vgid.data.layout import CONFIGS, shard_paths
from vgid.data.synthetic import write_benchmark
from vgid.errors import InputError
from vgid.evaluation.rehearsal import Run
from vgid.method.teacher import Intervention
from vgid.models import backbones
from vgid.paper.first_tokens import first_token_scores
from vgid.paper.run import PaperConfig, run_paper_tables
from vgid.report.front import Front
from vgid.report.note import Place, study_note
from vgid.results import Score, TrialResult
from vgid.study.plan import make_plan
from vgid.trial import TrialSession

outline = functools.cache(backbones.outline)

Rows = list[dict[str, Any]]
Edit = Callable[[Rows], object]
RETAIN_PEOPLE = 2
FORGET = ("0028", "0038")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic benchmark, cut to a few people to be quick."""
    root = tmp_path_factory.mktemp("benchmark")
    write_benchmark(root)
    retain = Benchmark.open(root).person_ids("retain_85")[: RETAIN_PEOPLE + 4]
    for config in CONFIGS:
        paths = shard_paths(root, config)
        table = pa.concat_tables([pq.read_table(path) for path in paths])
        for path in paths:
            path.unlink()
        kept = [i for i, who in enumerate(table["ID"].to_pylist()) if who in (*FORGET, *retain)]
        pq.write_table(table.take(kept or [0]), root / config / SHARD)
    return root


@pytest.fixture(autouse=True)
def one_outline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made once for all cases, as nothing of it changes."""
    monkeypatch.setattr(backbones, "outline", outline)
    monkeypatch.setattr("vgid.evaluation.rehearsal.outline", outline)


def edited(whole: Path, root: Path, config: str, edit: Edit | None, free: bool = False) -> Path:
    """A copy with the rows of one config, or of all, changed; ``free`` lets types follow values."""
    shutil.copytree(whole, root)
    for name in CONFIGS if config == "all" else (config,):
        path = root / name / SHARD
        table = pq.read_table(path)
        rows = table.to_pylist()
        assert edit is not None
        edit(rows)
        pq.write_table(pa.Table.from_pylist(rows, schema=None if free else table.schema), path)
    return root


def checked(root: Path) -> Report:
    return check_benchmark(root, stops=Run("tiny-llava", retain_people=RETAIN_PEOPLE).defects)


def planned(root: Path, **others: object) -> str | None:
    """The sentence that a study is refused with, None if it can start."""
    values = {"data": root, "output": root / "out", "retain_people": RETAIN_PEOPLE}
    try:
        make_plan(StudyConfig.model_validate(values | others))
    except InputError as error:
        return str(error)
    finally:
        assert not (root / "out").exists()
    return None


def renamed(rows: Rows) -> None:
    for row in rows:
        row["ID"] = row["ID"].replace("000", "no ")


def option_numbers(rows: Rows) -> None:
    for row in rows:
        for entries in row["Classification_Task"].values():
            for entry in entries:
                entry["Options"] = {letter: 1980 + i for i, letter in enumerate(entry["Options"])}


def one_question(rows: Rows) -> None:
    rows[0]["Generation_Task"] = rows[0]["Generation_Task"][:1]
    rows[0].update(Mask_Task=[], Classification_Task=None)


def without(column: str) -> Edit:
    def edit(rows: Rows) -> None:
        for row in rows:
            row[column] = None

    return edit


def one_generation_question(rows: Rows) -> None:
    del rows[1:]
    rows[0]["Mask_Task"] = []
    images = [q for q in rows[0]["Generation_Task"] if q["Type"] == "Image_Textual"]
    rows[0]["Generation_Task"] = images[:1]


def answer(text: str) -> Edit:
    return lambda rows: rows[0]["Generation_Task"][0].update(Ground_Truth=text)


def pairs(**values: str) -> Edit:
    def edit(rows: Rows) -> None:
        found = json.loads(rows[0]["metadata"])
        rows[0]["metadata"] = json.dumps([entry | values for entry in found])

    return edit


def long_questions(rows: Rows) -> None:
    for row in rows:
        row["Mask_Task"][0]["Question"] = "__ is who " * 300


def overlap(rows: Rows) -> None:
    rows[0]["ID"] = FORGET[0]


def not_tested(rows: Rows) -> None:
    rows[:] = [row for row in rows if row["ID"] != FORGET[0]]


FINE: dict[str, tuple[str, Edit, bool]] = {
    "untouched": ("forget_5", lambda rows: None, False),
    "options as whole numbers": ("forget_5", option_numbers, True),
    "a forget person with one question": ("forget_5", one_question, False),
    "forget people without cloze questions": ("forget_5", without("Mask_Task"), False),
    "a test set without a task": ("Test_Set", without("Generation_Task"), False),
    "no celebrities": ("Retain_Set", list.clear, False),
    "retain people without choices": ("retain_95", without("Classification_Task"), False),
}
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "IDs with a space": ("all", renamed, "is no pseudonym"),
    "an empty forget set": ("forget_5", list.clear, "holds no person"),
    "no generation question": ("forget_5", without("Generation_Task"), "no generation question"),
    "one generation question": ("forget_5", one_generation_question, "no generation question"),
    "retain without generation": ("retain_95", without("Generation_Task"), "no generation quest"),
    "too few retain people": ("retain_95", lambda rows: rows.pop(), "lower retain_people"),
    "an image token in an answer": ("forget_5", answer("At <image>."), "holds the image token"),
    "an image token in a pair": ("ft_Data", pairs(Answer="<image>"), "holds the image token"),
    "questions beyond the context": ("retain_95", long_questions, "exceed the context"),
    "an answer beyond the context": (
        "ft_Data",
        pairs(Answer="who " * 600),
        "of the response exceed",
    ),
    "a person on both sides": ("retain_95", overlap, "overlap"),
    "nobody in the test set": ("Test_Set", not_tested, "is missing in Test_Set"),
    "a retain person without pairs": ("ft_Data", lambda rows: rows.pop(), "is missing in ft_Data"),
    "a torn image": (
        "forget_5",
        lambda rows: rows[0]["image"].update(bytes=rows[0]["image"]["bytes"][:60]),
        "cannot be read",
    ),
    "a decompression bomb": (
        "retain_95",
        lambda rows: rows[0]["image"].update(bytes=huge_png()),
        "more than 50,000,000 pixels",
    ),
}


@pytest.mark.parametrize("case", FINE)
def test_what_the_check_calls_fine_can_be_planned(whole: Path, tmp_path: Path, case: str):
    config, edit, free = FINE[case]
    root = edited(whole, tmp_path / "data", config, edit, free)
    assert (checked(root).defects, planned(root)) == ([], None)


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_check_refuses_the_plan_refuses(whole: Path, tmp_path: Path, case: str):
    config, edit, problem = REFUSED[case]
    root = edited(whole, tmp_path / "data", config, edit)
    problems = [defect.problem for defect in checked(root).defects]
    assert problems and all(problem in found for found in problems)
    refusal = planned(root)
    assert refusal is not None and problem in refusal and "\n" not in refusal


def test_the_paper_s_tables_refuse_it_before_the_first_experiment(whole: Path, tmp_path: Path):
    config, edit, problem = REFUSED["an answer beyond the context"]
    root, out = edited(whole, tmp_path / "data", config, edit), tmp_path / "out"
    asked = {"data": root, "output": out, "tables": (3,), "seeds": 1}
    with pytest.raises(InputError, match=problem):
        run_paper_tables(PaperConfig.model_validate(asked | {"retain_people": RETAIN_PEOPLE}))
    assert not list(out.rglob("*.json"))


def broken(rows: Rows) -> None:
    """A question without an answer, and one that leaves the response no room."""
    rows[0]["Mask_Task"][0]["Ground_Truth"] = ""
    rows[1]["Generation_Task"][0]["Question"] = "who " * 600


def test_defective_questions_are_left_out_and_counted(whole: Path, tmp_path: Path):
    root = edited(whole, tmp_path / "one", "forget_5", broken)
    root = edited(root, tmp_path / "two", "ft_Data", lambda rows: rows[-1].update(metadata="{"))
    root = edited(
        root, tmp_path / "three", "retain_95", lambda rows: rows[0]["image"].update(bytes=b"torn")
    )
    expected = {
        "ft_Data": {"questions": 0, "people": 1},
        "forget_5": {"questions": 2, "people": 0},
        "retain_95": {"questions": 0, "people": 1},
    }
    assert planned(root) is not None
    assert "lower retain_people" in str(planned(root, skip_defects=True))
    values = {"data": root, "output": root / "out", "retain_people": RETAIN_PEOPLE}
    sound = edited(whole, tmp_path / "sound", "retain_95", lambda rows: None)
    values |= {"data": edited(sound, tmp_path / "four", "forget_5", broken), "skip_defects": True}
    plan = make_plan(StudyConfig.model_validate(values))
    assert plan.left_out == {"forget_5": expected["forget_5"]}
    assert "Left out as defective: 2 questions and 0 people of forget_5" in plan.lines()
    known = Score(value=0.9, n=1, low=0.9, high=0.9)
    base = {"forget_rougeL": known, "retain_rougeL": known}
    note = study_note(Front("t", [], base), {}, Place("1", "s", "r"), {}, plan.left_out)
    assert "**Left out as defective.** 2 questions and 0 people of forget_5." in note

    session = TrialSession(plan.request)
    asked = {q.id for person in session.people.forget for q in person.questions}
    before = {q.id for p in Benchmark.open(whole).forget(5) for q in p.questions}
    assert len(before - asked) == 2 and asked < before

    run = Run("tiny-llava", retain_people=RETAIN_PEOPLE, skip_defects=True)
    report = check_benchmark(root, stops=run.defects, skipping=True)
    counts = {
        name: {"questions": count.questions_left_out, "people": count.people_left_out}
        for name, count in report.configs.items()
        if count.questions_left_out or count.people_left_out
    }
    assert counts == expected | {"forget_5": {"questions": 1, "people": 0}}
    assert all("lower retain_people" in defect.problem for defect in report.defects)


def test_an_image_that_only_the_processor_refuses_is_a_defect_for_both(whole: Path, tmp_path: Path):
    """A sound image, but no processor of Qwen takes one side 200 times the other."""
    thin = encoded(Image.new("RGB", (1, 500)))
    root = edited(
        whole, tmp_path / "data", "forget_5", lambda rows: rows[0]["image"].update(bytes=thin)
    )
    run = Run("tiny-qwen2.5-vl", retain_people=RETAIN_PEOPLE)
    problems = {defect.problem for defect in check_benchmark(root, stops=run.defects).defects}
    told = "the image processor of tiny-qwen2.5-vl takes no such image"
    assert len(problems) == 1 and told in problems.pop()
    assert told in str(planned(root, backbone="tiny-qwen2.5-vl"))
    assert (checked(root).defects, planned(root)) == ([], None)


def test_a_doubled_column_is_refused_by_both(whole: Path, tmp_path: Path):
    root = edited(whole, tmp_path / "data", "forget_5", lambda rows: None)
    path = root / "forget_5" / SHARD
    table = pq.read_table(path)
    pq.write_table(table.append_column("Mask_Task", table["Mask_Task"]), path)
    assert [defect.field for defect in checked(root).defects] == ["Mask_Task"]
    assert "more than once" in str(planned(root))


def test_a_session_scores_what_there_is_and_trains_nothing_without_an_objective(
    whole: Path, tmp_path: Path
):
    def run(edit: Edit) -> TrialResult:
        root = edited(whole, tmp_path / edit.__name__, "forget_5", edit)
        request = RequestConfig.model_validate(
            {"data": root, "store": root / "store", "retain_people": RETAIN_PEOPLE}
            | {"bootstrap_samples": 100}
        )
        trial = TrialConfig.model_validate({"epochs": 1})
        session = TrialSession(request)
        assert first_token_scores(session, Intervention()) == {}
        return session.run(trial, "0000", root / "adapter")

    result = run(one_question_each)
    assert result.status == "completed"
    assert {"forget_rougeL", "test_cloze", "retain_cloze"} <= result.scores.keys()
    assert not {"forget_cloze", "forget_classification"} & result.scores.keys()
    with pytest.raises(InputError, match="forget_5: Generation_Task: no generation question"):
        run(one_generation_question)
    assert not (tmp_path / "one_generation_question" / "adapter").exists()


def one_question_each(rows: Rows) -> None:
    """But one, who has two, so that either part has one."""
    for row in rows:
        row.update(Mask_Task=[], Classification_Task=None)
        images = [q for q in row["Generation_Task"] if q["Type"] == "Image_Textual"]
        row["Generation_Task"] = images[: 2 if row is rows[0] else 1]
