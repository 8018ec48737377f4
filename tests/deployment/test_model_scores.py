"""Any model is scored and attacked, and a deployment gives the numbers of its record again."""

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from tests.small_benchmark import write_small
from vgid import cli
from vgid.config import parse
from vgid.deployment.record import read_deployment
from vgid.deployment.scores import ModelScores, ScoringConfig, score_model
from vgid.errors import InputError
from vgid.results import Score, shots_left_out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One person to forget, eight others."""
    root = tmp_path_factory.mktemp("scored") / "data"
    write_small(root, forget=1, others=8)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr("sys.argv", ["vgid", *map(str, arguments)])
    cli.main()


def printed(found: dict[str, Any]) -> str:
    text = io.StringIO()
    ModelScores.model_validate(found).print(Console(file=text, width=160))
    return text.getvalue()


def test_a_deployments_own_numbers_come_out_again(deployment_file, benchmark_folder, tmp_path):
    deployment, _ = read_deployment(deployment_file)
    shutil.copy(deployment_file, tmp_path / "deployment.yaml")  # as an export has them
    shutil.copytree(deployment.adapter_folder(deployment_file), tmp_path / "adapter")
    config = ScoringConfig(target=tmp_path, data=benchmark_folder, seeds=1)
    found = score_model(config, attacked=True)
    assert found.model == "deployment" and found.adapter_files == deployment.adapter.files
    assert found.scores == deployment.scores.deployed
    assert found.attacks == deployment.scores.attacks
    assert found.not_run == deployment.scores.not_run
    text = io.StringIO()
    found.print(Console(file=text, width=160))
    rows = [line for line in text.getvalue().splitlines() if " forget_rougeL " in line]
    assert len(rows) == 2 and " plain " in rows[0] and " reverse prompt " in rows[1]
    reverse = next(a for a in deployment.scores.attacks if "reverse" in a.name)
    for row, scores in zip(rows, (deployment.scores.deployed, reverse.scores), strict=True):
        assert f" {scores['forget_rougeL'].value:.3f} " in row


def test_the_benchmarks_protocol_asks_everything_by_letter(
    small, monkeypatch, capsys: pytest.CaptureFixture[str]
):
    flags = ["--data", small, "--retain-people", 2, "--protocol", "benchmark"]
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "evaluate", *flags, "--json")
    assert ended.value.code == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (found["model"], found["part"], found["option_scoring"]) == ("base", "all", "letter")
    (row,) = pq.read_table(small / "forget_5").to_pylist()
    forms = Counter(question["Type"] for question in row["Generation_Task"])
    letters = row["Classification_Task"]["Image_Textual_Questions"]
    scores = {name: Score(**score) for name, score in found["scores"].items()}
    assert scores["forget_rougeL"].n == forms["Image_Textual"]
    assert scores["forget_rougeL_text"].n == forms["Pure_Text"]
    assert scores["forget_classification"].n == len(letters)
    assert all(s.low - 1e-9 <= s.value <= s.high + 1e-9 for s in scores.values())
    # Few-shot turns for a context of 512 tokens: not all cloze questions of two people.
    assert 0 < scores["forget_cloze_shots"].value < 1
    sentence = shots_left_out(scores)
    assert sentence is not None and "cloze_shots 0." in sentence
    assert sentence in printed(found)
    ignorant = {"scores": {"forget_rougeL": Score(value=0.2, n=9, low=0.1, high=0.3)}}
    assert "may never have known" in printed(found | ignorant)
    assert "may never have known" not in printed(found | ignorant | {"model": "adapter"})


def test_an_adapter_is_scored_on_its_base(small, deployment_file, monkeypatch, capsys):
    folder = deployment_file.parent / "tiny-llava" / "adapter"
    config = ScoringConfig(target=folder, data=small, retain_people=2, seeds=1)
    adapter = score_model(config, attacked=False)
    base = score_model(config.model_copy(update={"target": None}), attacked=False)
    assert (adapter.model, base.model) == ("adapter", "base")
    assert (adapter.option_scoring, adapter.part) == ("likelihood", "held_out")
    assert adapter.scores["forget_rougeL"].value < base.scores["forget_rougeL"].value - 0.1
    assert adapter.scores["forget_rougeL"].n == base.scores["forget_rougeL"].n


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--protocol", "theirs"], "command line: argument --protocol: invalid choice: 'theirs' "),
        (["--protocol", "benchmark", "--part", "search"], "asks all questions; leave it out."),
        (["--backbone", "llava-1.5-7b"], "--data: name the benchmark folder."),
        (["--forget-ratio", "7"], "command line: argument --forget-ratio: invalid choice: 7 "),
        (["{file}", "--seed", "1"], "--seed: is in the record of "),
        (["{file}", "--forget-ratio", "5"], "--forget-ratio: is in the record of "),
        (["{folder}"], "is no deployment file, no export's folder and no PEFT adapter"),
    ],
)
def test_bad_input_is_one_sentence(deployment_file, tmp_path, monkeypatch, capsys, flags, message):
    places = {"file": deployment_file, "folder": tmp_path}
    own = "--protocol" in flags  # of `vgid evaluate` alone
    for command in ("evaluate",) if own else ("evaluate", "attack"):
        with pytest.raises(SystemExit) as ended:
            run(monkeypatch, command, *(flag.format(**places) for flag in flags))
        error = capsys.readouterr().err
        assert ended.value.code == 2
        assert message.replace("evaluate", command) in error and error.count("\n") == 1


def test_another_adapter_than_the_recorded_one_is_refused(deployment_file, tmp_path):
    shutil.copytree(deployment_file.parent, tmp_path / "deployments")
    file = tmp_path / "deployments" / deployment_file.name
    weights = file.parent / "tiny-llava" / "adapter" / "adapter_config.json"
    weights.write_text(weights.read_text() + "\n")
    with pytest.raises(InputError, match=r"is not the adapter of .*; see `vgid verify"):
        score_model(parse(ScoringConfig, {"target": file, "seeds": 1}, "test"), attacked=True)
