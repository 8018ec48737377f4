"""``vgid verify --served`` tells a deployment from its base, by the real models' answers."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.deployment.openai_server import Answers, model_answers, serving
from vgid.cli import app
from vgid.data.benchmark import Benchmark
from vgid.deployment.record import read_deployment
from vgid.deployment.verify import KINDS, Verification, open_questions, verify_served
from vgid.errors import InputError

NAME = "tiny-llava-0000"


@pytest.fixture(scope="module")
def answers(deployment_file: Path, benchmark_folder: Path) -> tuple[Answers, Answers]:
    """Of the base and of the deployed model, to every question that is asked."""
    deployment, _ = read_deployment(deployment_file)
    asked = open_questions(deployment, Benchmark.open(benchmark_folder))
    contents = [one.content for one in asked]
    folder = deployment.adapter_folder(deployment_file)
    return (
        model_answers("tiny-llava", contents, None),
        model_answers("tiny-llava", contents, folder),
    )


@pytest.fixture
def asking(deployment_file: Path, benchmark_folder: Path):
    def ask(models: Mapping[str | None, Answers], suffix: str = "") -> Verification:
        with serving(models) as url:
            return verify_served(deployment_file, url + suffix, benchmark_folder)

    return ask


def verdicts(found: Verification) -> dict[str, bool | None]:
    return {c.name: c.passed for c in found.checks if c.name.startswith("served")}


def test_the_merged_model_under_one_name_is_verified(asking, answers, deployment_file):
    _, deployed = answers
    found = asking({NAME: deployed, None: deployed}, "/v1/")
    assert found.verified
    assert verdicts(found) == {f"served under {NAME}": True, "served under no name": True}
    scores = {(s.of, s.name): s for s in found.scores}
    record = read_deployment(deployment_file)[0].scores
    for of in (NAME, "no name"):
        for name in (s + kind for s in ("forget_rougeL", "retain_rougeL") for kind in KINDS):
            stated = record.deployed[name]
            again = scores[of, name].found
            assert scores[of, name].stated == stated and again is not None
            assert (again.n, again.value) == (stated.n, pytest.approx(stated.value, abs=1e-12))


def test_a_server_that_keeps_the_base_beside_the_adapter_is_not(asking, answers):
    base, deployed = answers
    found = asking({"org/base": base, NAME: deployed, None: base})
    assert not found.verified
    assert verdicts(found) == {
        "served under org/base": False,
        f"served under {NAME}": True,
        "served under no name": False,
    }
    (told,) = [c.detail for c in found.checks if c.name == "served under no name"]
    assert told.startswith("answers as the base: forget_rougeL ")
    assert "served under org/base, served under no name" in found.conclusion


def test_text_questions_that_go_to_the_base_are_found(asking, answers, deployment_file):
    """What a default adapter for images does."""
    base, deployed = answers
    mixed = {key: (base if key[1] is None else deployed)[key] for key in base}
    found = asking({NAME: mixed})
    assert not found.verified
    assert verdicts(found)["served under no name"] is True  # such requests are refused
    (told,) = [c.detail for c in found.checks if c.name == f"served under {NAME}"]
    assert told.startswith("answers as the base: forget_rougeL_text ")
    assert "forget_rougeL " not in told


def test_other_answers_than_recorded_are_found_though_not_the_bases(asking, answers):
    _, deployed = answers
    found = asking({NAME: dict.fromkeys(deployed, "I cannot say.")})
    assert verdicts(found)[f"served under {NAME}"] is True
    assert not found.verified and "retain_rougeL" in found.conclusion


def test_a_server_that_refuses_everything_shows_nothing(asking):
    found = asking({})
    assert not found.verified
    assert found.checks[-1].detail == "every name refuses"


def test_the_command(answers, deployment_file, benchmark_folder, tmp_path):
    base, deployed = answers

    def run(url: str, *more: str) -> tuple[int, str]:
        arguments = ["verify", str(deployment_file), "--data", str(benchmark_folder)]
        done = CliRunner().invoke(app, [*arguments, "--served", url, *more])
        return done.exit_code, done.stdout

    with serving({NAME: deployed}) as url:
        code, shown = run(url, "--json")
        assert code == 0 and json.loads(shown)["verified"]
        with pytest.raises(InputError, match="leave out --hashes-only"):
            CliRunner().invoke(
                app,
                ["verify", str(deployment_file), "--served", url, "--hashes-only"],
                catch_exceptions=False,
            )
    with serving({NAME: deployed, None: base}) as url:
        code, shown = run(url)
    assert code == 1 and "NOT verified; it differs in served under no name" in shown
    questions = {key[0].partition("\n")[0] for key in base}
    assert not any(question in shown for question in questions)
    for gone in (url, "nonsense", "ftp://127.0.0.1"):
        with pytest.raises(InputError, match="is no OpenAI-compatible endpoint that answers"):
            verify_served(deployment_file, gone, benchmark_folder)
