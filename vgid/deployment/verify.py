"""Verifies a deployment: that nothing was changed, and that its scores come out again.

Hashes come first. Then base and adapter, and an export's merged weights, are loaded and the
recorded questions put to them again with the recorded seeds, every score computed anew. A base from
the hub is known by its commit: for who distrusts the cache's folder names it is scored again.

A server may answer otherwise than the deployment that it was started from: as the base under
another name, as the base for whoever names no model, with another prompt, or sampled. So
``verify_served`` puts the record's open questions to every name that the endpoint lists and,
without a name, to whatever answers then. Nothing about decoding is sent, since most clients send
nothing. Left out are the test set, whose portraits change with the seed, and tasks that the
benchmark asks behind few-shot turns.
"""

import base64
import gc
import json
import tempfile
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from vgid.config import Config
from vgid.data.benchmark import Benchmark, Person, Question, decode_image
from vgid.data.splits import choose_people
from vgid.deployment import record
from vgid.deployment.record import Deployment
from vgid.deployment.scores import as_recorded, score_with_seeds
from vgid.deployment.signing import differences, manifest_fault, signature_fault
from vgid.errors import InputError
from vgid.evaluation.metrics import bootstrap_interval, rouge
from vgid.evaluation.questions import suffix, worded
from vgid.models.adapter_files import read_adapter
from vgid.models.backbones import locate, revision_of, skeleton, spec
from vgid.prompts import generation_text
from vgid.report.tables import Grid
from vgid.results import Score
from vgid.study.mlflow_client import first_line

TIMEOUT_S = 600
AT_ONCE = 8
NO_NAME = "no name"

SUPPRESSED = ("forget_rougeL", "earlier_rougeL")
KINDS = ("", "_text", "_raw")
"""Of questions, as the ends of score names (``vgid.evaluation.evaluate``)."""


class Check(Config):
    """One thing that was looked at, ``passed`` if as recorded, None if not looked at."""

    name: str
    passed: bool | None
    detail: str


class ScoreCheck(Config):
    """One score, measured again; not ``found`` if the questions are not there any more.

    It is ``of`` ``base``, ``deployed`` or an attack, with ``, merged`` of an export's weights,
    whose rounding may change one answer: allowed for, since an interval may have no width.
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
        if found is None or found.n != stated.n:
            return False
        slack = 1 / stated.n if self.merged else 0.0
        return stated.low - slack <= found.value <= stated.high + slack

    @property
    def equal(self) -> bool:
        """Whether value and interval are the same bits."""
        return self.found == self.stated


class Verification(Config):
    """What was found; no ``scores`` if a check failed before or only hashes were wanted."""

    file: Path
    checks: tuple[Check, ...]
    scores: tuple[ScoreCheck, ...] = ()

    @property
    def wrong(self) -> list[str]:
        """What was looked at and is not as recorded."""
        wrong = [check.name for check in self.checks if check.passed is False]
        return wrong + [f"{score.name} ({score.of})" for score in self.scores if not score.within]

    @property
    def verified(self) -> bool:
        """Whether all that was looked at is as recorded."""
        return not self.wrong

    @property
    def bit_equal(self) -> bool | None:
        """Whether every score is the same to the last bit; None if none was measured."""
        return all(score.equal for score in self.scores) if self.scores else None

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if self.wrong:
            return f"{self.file}: NOT verified; it differs in {', '.join(self.wrong)}."
        if not self.scores:
            return f"{self.file}: hashes verified; scores were not measured again."
        bits = "bit for bit" if self.bit_equal else "within their intervals"
        return f"{self.file}: verified; {len(self.scores)} scores came out again {bits}."

    def print(self, console: Console) -> None:
        """Show the checks, the scores of the model card, and every other that differs."""
        words = {True: "ok", False: "DIFFERS", None: "not checked"}
        checks = [(check.name, words[check.passed], check.detail) for check in self.checks]
        shown = [s for s in self.scores if s.name in record.CARD_SCORES or not s.within]
        scores = []
        for score in shown:
            again = "none" if score.found is None else score.found.value
            fits = ("bit-equal" if score.equal else "within") if score.within else words[False]
            stated = score.stated
            scores.append((score.of, score.name, stated.n, stated, again, fits))
        header = ("of", "score", "n", "recorded [95 % interval]", "again", "")
        for titles, rows in ((("check", "", "found"), checks), (header, scores)):
            wrong = [number for number, row in enumerate(rows) if words[False] in row]
            if rows:
                console.print(Grid(titles, rows, marks=dict.fromkeys(wrong, "wrong")).rich())
        if len(shown) < len(self.scores):
            console.print(f"{len(self.scores) - len(shown)} other scores are within, not shown.")


def verify(
    target: Path,
    data: Path | None = None,
    model_path: str | None = None,
    public_key: Path | None = None,
    hashes_only: bool = False,
    tell: record.Tell = lambda line: None,
) -> Verification:
    """Verify a deployment file, or an export, by its folder or its file, with all that is in it.

    Without ``data`` the benchmark is the study's own, or the embedded backbone's, made anew.
    ``model_path`` is where the base is if not where the file says. The signature beside the target
    must be of the PEM's ``public_key``; ``hashes_only`` leaves out what needs the model. InputError
    where something that is needed is not there, or the file is not the one that was sealed.
    """
    if target.name == record.DEPLOYMENT and target.is_file():
        target = target.parent  # the merged weights beside it are what is served
    file, checks = record.deployment_file(target), _signed(target, public_key)
    exported = target.is_dir()
    if exported:
        fault = manifest_fault(target)
        checks.append(_judged("exported files", fault, "exactly those that were exported"))
    deployment, sha256 = record.read_deployment(file)
    folder = deployment.adapter_folder(file)
    base = locate(spec(deployment.backbone), model_path or deployment.base.model_path)
    frame = record.Frame(**spec(deployment.backbone).frame.recorded)
    another = None if frame == deployment.frame else "this version has another"
    files = differences(deployment.adapter.files, record.hash_files(folder))
    checks += [
        _judged("seal", None, f"sha256 {sha256}"),
        _judged("adapter files", files, f"{len(deployment.adapter.files)} files with their sha256"),
        _judged("prompt frame", another, "as this version has it"),
    ]
    if not files:
        checks.append(_adapter_settings(deployment, folder, base))
    checks.append(_same("base", deployment.base.revision, revision_of(base), "revision"))
    if hashes_only and data is None and not record.benchmark_beside(file).is_dir():
        checks.append(Check(name="data", passed=None, detail="name its folder with --data"))
        return Verification(file=file, checks=tuple(checks))
    scores: tuple[ScoreCheck, ...] = ()
    with record.recorded_benchmark(deployment, file, data) as benchmark:
        checks.append(_same("data", deployment.data.sha256, benchmark.sha256, "sha256"))
        # Measuring takes minutes and loads weights: nothing that fails its hash gets that far.
        if not hashes_only and not any(check.passed is False for check in checks):
            places = (folder, target / record.MERGED if exported else None, benchmark.root)
            precision, scores = _measure(deployment, *places, model_path, tell)
            checks.append(precision)
    return Verification(file=file, checks=tuple(checks), scores=scores)


def _judged(name: str, fault: str | None, fine: str) -> Check:
    return Check(name=name, passed=not fault, detail=fault or fine)


def _signed(target: Path, public_key: Path | None) -> list[Check]:
    if public_key is None:
        return []
    return [_judged("signature", signature_fault(target, public_key), "of the given key")]


def _same(name: str, recorded: str, found: str, kind: str) -> Check:
    told = f"{kind} {found}"
    return _judged(name, None if recorded == found else f"{told}, recorded was {recorded}", told)


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


def _measure(
    deployment: Deployment,
    adapter: Path,
    merged: Path | None,
    data: Path,
    model_path: str | None,
    tell: record.Tell,
) -> tuple[Check, tuple[ScoreCheck, ...]]:
    from vgid.cluster.resources import worker_threads
    from vgid.trial import DIFFERENCES, TrialSession

    recorded, seeds = deployment.scores, deployment.scores.seeds
    with tempfile.TemporaryDirectory(prefix="vgid-verify-") as store, worker_threads():
        tell("Loading the base model")
        session = TrialSession(record.request_of(deployment, data, Path(store), model_path))
        dtype = session.precision
        tell(f"Scoring the base model, {len(seeds)} seeds")
        base = score_with_seeds(session, seeds, None)
        tell(f"Scoring the deployed model, {len(seeds)} seeds")
        deployed = score_with_seeds(session, seeds, adapter)
        again = _tests(as_recorded(seeds, base, deployed))
        checks = _compared(_tests(recorded), again)
        if merged is not None:
            del session  # two models may not fit
            gc.collect()
            tell(f"Scoring the merged weights, {len(seeds)} seeds")
            session = TrialSession(record.request_of(deployment, data, Path(store), str(merged)))
            served = score_with_seeds(session, seeds, None)
            # Beside them there is no base to take a difference from; both its scores are checked.
            plain = {k: s for k, s in recorded.deployed.items() if k not in DIFFERENCES}
            again = _tests(as_recorded(seeds, base, served))
            stated = _tests(recorded) | {"base": {}, "deployed": plain}
            checks += _compared(stated, again, merged=True)
    same = dtype == deployment.base.precision
    detail = f"{dtype}, as recorded" if same else f"{dtype}, recorded {deployment.base.precision}"
    # Another dtype is told and never fails: whether the scores are the same is what counts.
    return Check(name="precision", passed=same or None, detail=detail), tuple(checks)


def _tests(scores: record.Scores) -> dict[str, Mapping[str, Score]]:
    """What was measured, in the order of a record."""
    attacks = {attack.name: attack.scores for attack in scores.attacks}
    return {"base": scores.base, "deployed": scores.deployed, **attacks}


def _compared(
    stated: Mapping[str, Mapping[str, Score]],
    found: Mapping[str, Mapping[str, Score]],
    merged: bool = False,
) -> list[ScoreCheck]:
    return [
        ScoreCheck(
            of=f"{of}, merged" if merged else of,
            name=name,
            stated=score,
            found=found.get(of, {}).get(name),
            merged=merged,
        )
        for of, scores in stated.items()
        for name, score in scores.items()
    ]


class Asked(NamedTuple):
    """A question as it is sent: the score that its answer counts for, and the message's parts."""

    score: str
    question: Question
    content: list[dict[str, Any]]


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server, by the address of its root or of its ``/v1``."""

    url: str

    def names(self) -> list[str]:
        """The models that it lists; InputError where it cannot be reached, or lists none."""
        return self._ask("models", None, lambda found: [model["id"] for model in found["data"]])

    def answer(self, name: str | None, content: Sequence[Mapping[str, Any]]) -> str | None:
        """The answer to one message; None where the server refuses it."""
        named = {} if name is None else {"model": name}
        return self._ask(
            "chat/completions",
            {"messages": [{"role": "user", "content": content}], **named},
            lambda answer: str(answer["choices"][0]["message"]["content"] or "").strip(),
        )

    def _ask(self, path: str, body: Mapping[str, Any] | None, take: Callable[[Any], Any]) -> Any:
        address = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        sent = None if body is None else json.dumps(body).encode()
        # Questions are private: they go to this server and through no proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            request = urllib.request.Request(address, sent, {"Content-Type": "application/json"})
            with opener.open(request, timeout=TIMEOUT_S) as response:
                return take(json.load(response))
        except (OSError, ValueError, LookupError, TypeError) as error:
            code = error.code if isinstance(error, urllib.error.HTTPError) else None
            # A question is refused where its name is not served, as it should be; a server's own
            # fault says nothing of the model.
            if body is not None and code is not None and code < 500:
                return None
            raise InputError(
                f"--served {self.url}: is no OpenAI-compatible endpoint that answers "
                f"({f'HTTP {code}' if code else first_line(error)}); name the server's root, as "
                "http://127.0.0.1:8000."
            ) from None


def verify_served(
    target: Path,
    url: str,
    data: Path | None = None,
    public_key: Path | None = None,
    tell: record.Tell = lambda line: None,
) -> Verification:
    """Put the recorded questions to an endpoint; other arguments are those of ``verify``.

    It is not verified where some name answers as the base, or scores outside the recorded
    intervals, or where no name answers. InputError where the endpoint does not answer at all.
    """
    file, checks = record.deployment_file(target), _signed(target, public_key)
    deployment, sha256 = record.read_deployment(file)
    checks.append(_judged("seal", None, f"sha256 {sha256}"))
    scores: list[ScoreCheck] = []
    with record.recorded_benchmark(deployment, file, data) as benchmark:
        checks.append(_same("data", deployment.data.sha256, benchmark.sha256, "sha256"))
        if all(check.passed for check in checks):
            asked, endpoint = open_questions(deployment, benchmark), Endpoint(url)
            # Given an adapter, a server commonly lists the base beside it, and takes the base for a
            # request without a model: two ways by which what was suppressed is told all the same.
            for name in (*endpoint.names(), None):
                called = name or NO_NAME
                tell(f"Asking {url} under {called}, {len(asked)} questions")
                found = _ask_all(endpoint, name, asked, deployment.scores.seeds[0])
                checks.append(_nearer(called, deployment.scores, found))
                scores += [
                    ScoreCheck(of=called, name=s, stated=stated, found=found[s], merged=True)
                    for s, stated in deployment.scores.deployed.items()
                    if s in found
                ]
            if not scores:
                checks.append(_judged("served", "every name refuses", ""))
    return Verification(file=file, checks=tuple(checks), scores=tuple(scores))


def open_questions(deployment: Deployment, benchmark: Benchmark) -> list[Asked]:
    """The generation questions of a record, worded as in the evaluation and with its images."""
    with tempfile.TemporaryDirectory(prefix="vgid-served-") as store:
        request = record.request_of(deployment, benchmark.root, Path(store))
    people = choose_people(benchmark, request)
    splits = {"forget": people.forget, "earlier": people.earlier, "retain": people.retain}
    asked = []
    for split, person in ((name, person) for name in splits for person in splits[name]):
        for question, wording in worded(person, split, deployment.scores.part, request.seed):
            score = f"{split}_rougeL{suffix(question, wording)}"
            if question.task == "generation" and score in deployment.scores.deployed:
                text = generation_text(question.text, question.form, wording)
                parts = [_portrait(person)] if question.form == "image" else []
                asked.append(Asked(score, question, [*parts, {"type": "text", "text": text}]))
    return asked


def _portrait(person: Person) -> dict[str, Any]:
    png = BytesIO()
    decode_image(person.images[0], f"image 0 of person {person.id}").save(png, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _ask_all(
    endpoint: Endpoint, name: str | None, asked: Sequence[Asked], seed: int
) -> dict[str, Score]:
    """What the answers score; nothing where all questions are refused."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        answers = list(threads.map(lambda one: endpoint.answer(name, one.content), asked))
    marked: defaultdict[str, list[tuple[float, str]]] = defaultdict(list)
    for (score, question, _), answer in zip(asked, answers, strict=True):
        if answer is not None:
            mark = rouge(question.answer, answer)["rougeL"]
            marked[score].append((mark, question.person_id))
    return {
        score: bootstrap_interval([m for m, _ in marks], [p for _, p in marks], seed=seed)
        for score, marks in marked.items()
    }


def _nearer(name: str, recorded: record.Scores, found: Mapping[str, Score]) -> Check:
    """Whether answers about suppressed people are nearer to the base's than to those recorded.

    Only scores whose recorded intervals do not meet tell base and deployed model apart.
    """
    name = f"served under {name}"
    if not found:
        return _judged(name, None, "refuses every question")
    telling, as_base = [], []
    for score in (suppressed + kind for suppressed in SUPPRESSED for kind in KINDS):
        base, deployed = recorded.base.get(score), recorded.deployed.get(score)
        if score in found and base and deployed and deployed.high < base.low:
            value = found[score].value
            told = f"{score} {value:.3f} (recorded {deployed.value:.3f}, base {base.value:.3f})"
            telling.append(told)
            if value > (base.value + deployed.value) / 2:
                as_base.append(told)
    if not telling:
        detail = "the record does not set base and deployed model apart"
        return Check(name=name, passed=None, detail=detail)
    fault = f"answers as the base: {', '.join(as_base)}" if as_base else None
    return _judged(name, fault, f"not as the base: {', '.join(telling)}")
