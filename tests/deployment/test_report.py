"""What an auditor is told of a subject, from records written by hand."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deployment.test_record import SCORE, deployment  # noqa: F401
from vgid.deployment.audit import report
from vgid.deployment.record import Attack, Deployment, Parent, write_deployment
from vgid.errors import InputError
from vgid.results import Score

KEPT = {"earlier_rougeL": Score(value=0.02, n=60, low=0.0, high=0.05)}
KNEW = {
    f"{split}_{metric}": Score(value=0.95, n=30, low=0.9, high=1.0)
    for split in ("forget", "earlier")
    for metric in ("rougeL", "cloze")
}


@pytest.fixture
def folders(tmp_path: Path, deployment: Deployment) -> dict[str, Path]:  # noqa: F811
    """A chain of three in folders of their own: the first forgets 0001 and 0002."""
    made, parent = {}, None
    for number, subjects in enumerate([("0001", "0002"), ("0003",), ("0004",)]):
        attack = Attack(name="reverse prompt", scores=SCORE | KEPT)
        scores = deployment.scores.model_copy(
            update={"base": KNEW, "deployed": SCORE | KEPT, "attacks": (attack,)}
        )
        values = {
            "created": f"2030-01-0{number + 1}T00:00:00+00:00",
            "requests": (f"R-{number + 1}",),
            "subjects": subjects,
            "scores": scores,
            "parent": parent,
        }
        made[f"R-{number + 1}"] = tmp_path / str(number) / "deployments"
        record = deployment.model_copy(update=values)
        sha256 = write_deployment(made[f"R-{number + 1}"] / "tiny-llava.yaml", record)
        before = parent or Parent(sha256="0" * 64, requests=(), subjects=())
        parent = Parent(
            sha256=sha256,
            requests=(*before.requests, f"R-{number + 1}"),
            subjects=(*before.subjects, *subjects),
        )
    return made


def test_a_subject_is_followed_along_the_chain(folders, tmp_path):
    found = report("0001", [tmp_path])
    assert [(s.role, s.requests) for s in found.suppressions] == [
        ("own", ("R-1",)),
        ("kept", ("R-1", "R-2")),
        ("kept", ("R-1", "R-2", "R-3")),
    ]
    first, second, third = found.suppressions
    assert first.created < second.created < third.created
    assert (first.people, second.people, third.people) == (2, 2, 3)
    assert first.chain == () and second.chain == (first.sha256,)
    assert third.chain == (second.sha256, first.sha256)
    assert first.deployed == SCORE and first.attacks[0].scores == SCORE
    assert second.deployed == KEPT and second.attacks[0].scores == KEPT
    assert "membership inference" in first.not_run
    assert [s.suppressed for s in found.suppressions] == [True] * 3
    assert "by the intervals' unfavourable ends: earlier_rougeL." in second.verdict
    assert found.looked_at == 3 and found.damaged == ()


@pytest.mark.parametrize(
    ("base", "told"),
    [
        (KNEW, "Not suppressed under any test, for under none .* forget_rougeL .0.950 to 0.950"),
        (SCORE, "The base may never have known the forget people: its ROUGE-L of 0.100"),
    ],
)
def test_whom_nothing_was_taken_from_is_not_called_suppressed(
    tmp_path,
    deployment,  # noqa: F811
    base,
    told,
):
    left = Score(value=0.95, n=30, low=0.9, high=1.0) if base is KNEW else SCORE["forget_rougeL"]
    update = {"base": base, "deployed": {"forget_rougeL": left}}
    record = deployment.model_copy(update={"scores": deployment.scores.model_copy(update=update)})
    write_deployment(tmp_path / "deployments" / "tiny-llava.yaml", record)
    (found,) = report("0001", [tmp_path]).suppressions
    assert not found.suppressed and re.search(told, found.verdict)
    command = [sys.executable, "-m", "vgid.cli", "report", "--subject", "0001", str(tmp_path)]
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "NOT suppressed" in shown and "1 answer for it and 0 suppress it" in shown


def test_others_are_told_apart(folders, tmp_path):
    assert [s.role for s in report("0003", [tmp_path]).suppressions] == ["own", "kept"]
    assert [s.role for s in report("0004", [tmp_path]).suppressions] == ["own"]
    assert report("0005", [tmp_path]).suppressions == ()


def test_an_ancestor_that_is_not_there_is_said_to_be_missing(folders):
    (found,) = report("0004", [folders["R-3"], folders["R-1"]]).suppressions
    assert len(found.chain) == 2 and found.chain[1] is None


def test_copies_count_once_and_other_yaml_files_are_left_alone(folders, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    shutil.copy(folders["R-1"] / "tiny-llava.yaml", export / "deployment.yaml")
    (tmp_path / "space.yaml").write_text("backbone: tiny-llava\n")
    found = report("0001", [tmp_path, tmp_path / "export", folders["R-1"]])
    assert found.looked_at == 3 and len(found.suppressions) == 3


def test_a_damaged_file_is_told_and_not_believed(folders, tmp_path):
    file = folders["R-2"] / "tiny-llava.yaml"
    file.write_bytes(file.read_bytes().replace(b"R-2", b"R-7"))
    found = report("0001", [tmp_path])
    assert len(found.damaged) == 1 and str(file) in found.damaged[0]
    assert [s.requests[-1] for s in found.suppressions] == ["R-1", "R-3"]
    command = [sys.executable, "-m", "vgid.cli", "report", "--subject", "0001", str(tmp_path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and len(json.loads(done.stdout)["suppressions"]) == 2
    shown = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "not believed" in shown and "kept suppressed" in shown and "not found here" in shown


def test_bad_input_is_one_sentence_that_repeats_no_name(tmp_path):
    with pytest.raises(InputError, match="is no pseudonym") as caught:
        report("Fay Moss", [tmp_path])
    assert "Fay" not in str(caught.value)
    with pytest.raises(InputError, match="no deployment file is in any"):
        report("0001", [tmp_path])
    with pytest.raises(InputError, match="is no folder"):
        report("0001", [tmp_path / "nothing"])
