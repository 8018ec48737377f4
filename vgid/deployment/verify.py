"""Verifies a deployment: that nothing was changed, and that its scores come out again.

In order: the signature if a key is given, all files of an export, the file's seal, the adapter's
files, what the record says of the adapter, the base's revision, the data's hash; then base and
adapter, and an export's merged weights, are loaded and the recorded questions are put to them again
with the recorded seeds. The teacher store of the study
plays no part: every score is computed anew. ``vgid verify`` does all this in a process of its own.

A base from the hub is known by its commit, and its files are not hashed: who trusts the cache's
folder names less than its own eyes has the re-scored base for it.
"""

import gc
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from vgid.config import Config
from vgid.data.benchmark import Benchmark
from vgid.deployment.record import (
    ADAPTER,
    CARD_SCORES,
    DEPLOYMENT,
    MERGED,
    Deployment,
    Frame,
    Scores,
    hash_files,
    read_deployment,
    recorded_benchmark,
    request_of,
)
from vgid.deployment.scores import Scored, attacks_of, score_with_seeds
from vgid.deployment.signing import differences, manifest_fault, signature_fault
from vgid.errors import InputError
from vgid.models.adapter_files import read_adapter
from vgid.models.backbones import locate, revision_of, skeleton, spec
from vgid.report.tables import Grid
from vgid.results import Score


class Check(Config):
    """One thing that was looked at.

    Attributes:
        name: what.
        passed: whether it is as recorded; None if it was not looked at.
        detail: what was found, in words.
    """

    name: str
    passed: bool | None
    detail: str


class ScoreCheck(Config):
    """One score, measured again.

    Attributes:
        of: ``base``, ``deployed`` or an attack's name, with ``, merged`` of an export's weights.
        name: of the score.
        stated: in the record.
        found: now; None if the questions are not there any more.
        merged: whether it is of merged weights. They are rounded, which may change one answer: that
            is allowed for, since an interval may have no width.
    """

    of: str
    name: str
    stated: Score
    found: Score | None
    merged: bool = False

    @property
    def within(self) -> bool:
        """Whether it is within the stated interval, over as many questions."""
        found, stated = self.found, self.stated
        return found is not None and found.n == stated.n and self._inside(found.value)

    @property
    def equal(self) -> bool:
        """Whether value and interval are the same bits."""
        return self.found == self.stated

    def _inside(self, value: float) -> bool:
        slack = 1 / self.stated.n if self.merged else 0.0
        return self.stated.low - slack <= value <= self.stated.high + slack


class Verification(Config):
    """What a verification found.

    Attributes:
        file: the deployment file.
        checks: hashes and the like.
        scores: what was measured again; empty if a check failed before or only hashes were wanted.
    """

    file: Path
    checks: tuple[Check, ...]
    scores: tuple[ScoreCheck, ...] = ()

    @property
    def verified(self) -> bool:
        """Whether all that was looked at is as recorded."""
        failed = any(check.passed is False for check in self.checks)
        return not failed and all(score.within for score in self.scores)

    @property
    def bit_equal(self) -> bool | None:
        """Whether every score is the same to the last bit; None if none was measured."""
        return all(score.equal for score in self.scores) if self.scores else None

    @property
    def conclusion(self) -> str:
        """One sentence."""
        wrong = [check.name for check in self.checks if check.passed is False]
        wrong += [f"{score.name} ({score.of})" for score in self.scores if not score.within]
        if wrong:
            return f"{self.file}: NOT verified; it differs in {', '.join(wrong)}."
        if not self.scores:
            return f"{self.file}: hashes verified; scores were not measured again."
        bits = "bit for bit" if self.bit_equal else "within their intervals"
        return f"{self.file}: verified; {len(self.scores)} scores came out again {bits}."

    def print(self, console: Console) -> None:
        """Show the checks, the scores of the model card, and every other that differs."""
        words = {True: "ok", False: "DIFFERS", None: "not checked"}
        rows = [(check.name, words[check.passed], check.detail) for check in self.checks]
        wrong = [n for n, check in enumerate(self.checks) if check.passed is False]
        console.print(
            Grid(("check", "", "found"), rows, marks=dict.fromkeys(wrong, "wrong")).rich()
        )
        shown = [s for s in self.scores if s.name in CARD_SCORES or not s.within]
        if shown:
            table = [
                (
                    score.of,
                    score.name,
                    score.stated.n,
                    score.stated,
                    "none" if score.found is None else score.found.value,
                    ("bit-equal" if score.equal else "within") if score.within else words[False],
                )
                for score in shown
            ]
            wrong = [n for n, score in enumerate(shown) if not score.within]
            header = ("of", "score", "n", "recorded [95 % interval]", "again", "")
            console.print(Grid(header, table, marks=dict.fromkeys(wrong, "wrong")).rich())
        if len(shown) < len(self.scores):
            console.print(f"{len(self.scores) - len(shown)} other scores are within, not shown.")


def verify(
    target: Path,
    data: Path | None = None,
    model_path: str | None = None,
    public_key: Path | None = None,
    hashes_only: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Verify a deployment file, or an export's folder with all its files.

    Args:
        target: deployment file or export folder.
        data: benchmark folder; by default the study's own, or the embedded backbone's, made anew.
        model_path: folder or hub id of the base, where it is not what the file says.
        public_key: PEM; the signature beside the target must be of this key.
        hashes_only: leave out what needs the model.
        tell: shows a line of progress.

    Raises:
        InputError: something that the verification needs is not there, or the file is not the one
            that was sealed.
    """
    exported = target.is_dir()
    file = target / DEPLOYMENT if exported else target
    checks = [signature_check(target, public_key)] if public_key is not None else []
    if exported:
        fault = manifest_fault(target)
        detail = fault or "exactly those that were exported"
        checks.append(Check(name="exported files", passed=fault is None, detail=detail))
    deployment, sha256 = read_deployment(file)
    checks.append(Check(name="seal", passed=True, detail=f"sha256 {sha256}"))
    folder = target / ADAPTER if exported else deployment.adapter_folder(file)
    checks += [_adapter_files(deployment, folder), _frame(deployment)]
    base = locate(spec(deployment.backbone), model_path or deployment.base.model_path)
    if checks[-2].passed:
        checks.append(_adapter_settings(deployment, folder, base))
    checks.append(same_check("base", deployment.base.revision, revision_of(base), "revision"))
    scores: tuple[ScoreCheck, ...] = ()
    with recorded_benchmark(deployment, file, data, optional=hashes_only) as benchmark:
        if benchmark is None:
            checks.append(Check(name="data", passed=None, detail="name its folder with --data"))
        else:
            found = Benchmark.open(benchmark).sha256
            checks.append(same_check("data", deployment.data.sha256, found, "sha256"))
        # Measuring takes minutes and loads weights: nothing that fails its hash gets that far.
        if not hashes_only and not any(check.passed is False for check in checks):
            assert benchmark is not None
            merged = target / MERGED if exported else None
            measured = _measure(deployment, folder, merged, benchmark, model_path, tell)
            checks.append(measured[0])
            scores = measured[1]
    return Verification(file=file, checks=tuple(checks), scores=scores)


def signature_check(target: Path, public_key: Path) -> Check:
    """Whether the signature beside the target is of this key."""
    fault = signature_fault(target, public_key)
    return Check(name="signature", passed=fault is None, detail=fault or "of the given key")


def _adapter_files(deployment: Deployment, folder: Path) -> Check:
    recorded, found = deployment.adapter.files, hash_files(folder)
    below = {path.name: "" for path in folder.iterdir() if not path.is_file()}
    told = differences(recorded, found | below)
    detail = told or f"{len(recorded)} files with their sha256"
    return Check(name="adapter files", passed=not told, detail=detail)


def _adapter_settings(deployment: Deployment, folder: Path, base: Path) -> Check:
    """The adapter is what the record says of it, whole, and the language model's only."""
    try:
        adapter = read_adapter(folder)
        adapter.check(skeleton(base), spec(deployment.backbone).lora_targets)
    except InputError as error:
        return Check(name="adapter", passed=False, detail=str(error))
    recorded = deployment.adapter
    found = (adapter.rank, adapter.scale, adapter.targets)
    return Check(
        name="adapter",
        passed=found == (recorded.rank, recorded.scale, recorded.targets),
        detail=f"LoRA of rank {found[0]}, scale {found[1]:g}, on the language model only",
    )


def _frame(deployment: Deployment) -> Check:
    same = Frame(**spec(deployment.backbone).frame.recorded) == deployment.frame
    detail = "as this version has it" if same else "this version has another"
    return Check(name="prompt frame", passed=same, detail=detail)


def same_check(name: str, recorded: str, found: str, kind: str) -> Check:
    """Whether a hash or revision is the recorded one."""
    if recorded == found:
        return Check(name=name, passed=True, detail=f"{kind} {found}")
    return Check(name=name, passed=False, detail=f"{kind} {found}, recorded was {recorded}")


def _measure(
    deployment: Deployment,
    folder: Path,
    merged: Path | None,
    data: Path,
    model_path: str | None,
    tell: Callable[[str], None],
) -> tuple[Check, tuple[ScoreCheck, ...]]:
    """Put the questions to base, adapter and merged weights again.

    The dtype is told and never fails.
    """
    from vgid.cluster.resources import worker_threads
    from vgid.trial import TrialSession

    recorded = deployment.scores
    with tempfile.TemporaryDirectory(prefix="vgid-verify-") as store, worker_threads():
        tell("Loading the base model")
        session = TrialSession(request_of(deployment, data, Path(store), model_path))
        dtype = re.sub(r"^torch\.", "", str(session.backbone.model.dtype))
        tell(f"Scoring the base model, {len(recorded.seeds)} seeds")
        base = score_with_seeds(session, recorded.seeds, None)
        tell(f"Scoring the deployed model, {len(recorded.seeds)} seeds")
        scores = _score_checks(recorded, score_with_seeds(session, recorded.seeds, folder))
        if merged is not None:
            del session  # two models may not fit
            gc.collect()
            tell(f"Scoring the merged weights, {len(recorded.seeds)} seeds")
            session = TrialSession(request_of(deployment, data, Path(store), str(merged)))
            served = score_with_seeds(session, recorded.seeds, None)
            scores += _score_checks(recorded, served, merged=True)
    same = dtype == deployment.base.precision
    detail = f"{dtype}, as recorded" if same else f"{dtype}, recorded {deployment.base.precision}"
    of_base = _compared("base", recorded.base, base.plain)
    check = Check(name="precision", passed=True if same else None, detail=detail)
    return check, (*of_base, *scores)


def _score_checks(recorded: Scores, scored: Scored, merged: bool = False) -> tuple[ScoreCheck, ...]:
    """What was recorded of the deployed model, plainly and under attacks, beside what it has."""
    from vgid.trial import DIFFERENCES

    # Beside merged weights there is no base to take a difference from; both its scores are checked.
    beyond = DIFFERENCES if merged else {}
    deployed = {name: score for name, score in recorded.deployed.items() if name not in beyond}
    again = {attack.name: attack.scores for attack in attacks_of(scored)[0]}
    rows = [("deployed", deployed, scored.plain)]
    rows += [
        (attack.name, attack.scores, again.get(attack.name, {})) for attack in recorded.attacks
    ]
    return tuple(check for row in rows for check in _compared(*row, merged=merged))


def _compared(
    of: str, stated: Mapping[str, Score], found: Mapping[str, Score], merged: bool = False
) -> tuple[ScoreCheck, ...]:
    of = f"{of}, merged" if merged else of
    return tuple(
        ScoreCheck(of=of, name=name, stated=score, found=found.get(name), merged=merged)
        for name, score in stated.items()
    )
