"""For an auditor: which deployments were to suppress a subject, and under which tests they do.

Read are ``deployments/*.yaml`` of studies and ``deployment.yaml`` of exports below some folders.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from rich.console import Console

from vgid.config import PSEUDONYM, Config
from vgid.deployment import record
from vgid.deployment.record import Deployment
from vgid.errors import InputError
from vgid.evaluation.suppression import is_suppressed
from vgid.files import READY, recover
from vgid.report.page import rendered
from vgid.results import Score


class Suppression(Config):
    """One deployment that answers for the subject, whether or not it suppresses it.

    Its own request named the subject, or it was ``kept`` from an earlier one; scores and the number
    of people are of that split only. Earlier requests stand in front. ``chain`` is the sha256 of
    its ancestors, the latest first; None at the end says that the last one's file was not found,
    so that what it follows is unknown.
    """

    file: Path
    sha256: str
    backbone: str
    created: str
    role: Literal["own", "kept"]
    requests: tuple[str, ...]
    chain: tuple[str | None, ...]
    people: int
    suppressed: bool
    verdict: str
    base: dict[str, Score]
    deployed: dict[str, Score]
    attacks: tuple[record.Attack, ...]
    not_run: tuple[str, ...]


class SubjectReport(Config):
    """What is known of a subject: its ``suppressions`` in the order of their creation.

    ``damaged`` tells which deployment files were not believed, and why; ``looked_at`` were read.
    """

    subject: str
    suppressions: tuple[Suppression, ...]
    damaged: tuple[str, ...]
    looked_at: int

    def print(self, console: Console) -> None:
        """Show it, one block a deployment; of the scores those of the model card."""
        for found in self.suppressions:
            told = rendered("vgid.deployment", "report.txt.jinja", **dict(found))
            console.print(told, end="", highlight=False, markup=False)
            console.print(record.score_grid(found.base, found.deployed, found.attacks).rich())
            console.print(f"  not run: {'; '.join(found.not_run)}\n", highlight=False)
        for line in self.damaged:
            console.print(f"not believed: {line}", highlight=False, markup=False, style="red")


def report(subject: str, folders: Iterable[Path]) -> SubjectReport:
    """Find the deployments below some folders that suppress a subject.

    InputError where it is no pseudonym, a folder is not there, or none holds a deployment.
    """
    if not re.fullmatch(PSEUDONYM, subject):
        raise InputError(
            "--subject: is no pseudonym (letters, digits, '.', '_' and '-'); give the ID that the "
            "benchmark has, never a name."
        )
    found: dict[str, tuple[Path, Deployment]] = {}
    damaged = []
    for file in _files(folders):
        try:
            deployment, sha256 = record.read_deployment(file)
        except InputError as error:
            damaged.append(str(error))
        else:
            found.setdefault(sha256, (file, deployment))  # an export holds a copy of the file
    if not found and not damaged:
        raise InputError("DIR: no deployment file is in any of the folders; name other folders.")
    known = {sha256: deployment for sha256, (_, deployment) in found.items()}
    suppressions = [
        _suppression(subject, sha256, file, deployment, known)
        for sha256, (file, deployment) in found.items()
        if subject in deployment.subjects
        or (deployment.parent is not None and subject in deployment.parent.subjects)
    ]
    return SubjectReport(
        subject=subject,
        suppressions=tuple(sorted(suppressions, key=lambda s: (s.created, s.sha256))),
        damaged=tuple(damaged),
        looked_at=len(found),
    )


def _files(folders: Iterable[Path]) -> list[Path]:
    files: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder}: is no folder; name one that holds deployments.")
        # What a killed pick had ready is in no folder of deployments yet.
        for ready in list(folder.rglob(READY)):
            recover(ready.parent)
        files |= {
            path
            for path in folder.rglob("*.yaml")
            if path.parent.name == record.FOLDER or path.name == record.DEPLOYMENT
        }
    return sorted(files)


def _suppression(
    subject: str, sha256: str, file: Path, deployment: Deployment, known: Mapping[str, Deployment]
) -> Suppression:
    own, parent, scores = subject in deployment.subjects, deployment.parent, deployment.scores
    splits = ("forget", "test") if own else ("earlier",)

    def of_split(values: dict[str, Score]) -> dict[str, Score]:
        return {name: score for name, score in values.items() if name.split("_")[0] in splits}

    attacks = [record.Attack(name=a.name, scores=of_split(a.scores)) for a in scores.attacks]
    earlier = () if own or parent is None else parent.requests
    chain: list[str | None] = []
    ancestor = parent
    while ancestor is not None:
        chain.append(ancestor.sha256)
        # An ancestor's own parent is known only if its file was found.
        if ancestor.sha256 not in known:
            chain.append(None)
            break
        ancestor = known[ancestor.sha256].parent
    return Suppression(
        file=file,
        sha256=sha256,
        backbone=deployment.backbone,
        created=deployment.created,
        role="own" if own else "kept",
        requests=(*earlier, *deployment.requests),
        chain=tuple(chain),
        people=len(deployment.subjects) if own or parent is None else len(parent.subjects),
        suppressed=is_suppressed(scores.base, scores.deployed, splits[0]),
        verdict=scores.verdict(*splits),
        base=of_split(scores.base),
        deployed=of_split(scores.deployed),
        attacks=tuple(attack for attack in attacks if attack.scores),
        not_run=scores.not_run,
    )
