"""What is served of an export: how vLLM serves it, and whether a server answers as it should.

What is deployed is the merged model. A server of the base with the adapter beside it keeps the base
itself under a name, and takes it for every request that names no model. Servers bind to the
loopback; who wants more puts something with authentication before them.

A server may answer otherwise than the deployment that it was started from: as the base under
another name, as the base for whoever names no model, with another prompt, or sampled. So
``verify_served`` puts the open questions of the record to every name that the endpoint lists and,
without a name, to whatever answers then. Nothing about decoding is sent, since most clients send
nothing. The test set is left out, for its portraits change with the seed, and so are tasks that the
benchmark asks behind few-shot turns. No model is loaded here.
"""

import base64
import json
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from vgid.data.benchmark import Benchmark, Person, Question, decode_image, split_questions
from vgid.data.splits import choose_people
from vgid.deployment.record import (
    DEPLOYMENT,
    Deployment,
    Frame,
    Scores,
    read_deployment,
    recorded_benchmark,
    request_of,
)
from vgid.deployment.verify import (
    Check,
    ScoreCheck,
    Verification,
    same_check,
    signature_check,
)
from vgid.errors import InputError
from vgid.evaluation.metrics import bootstrap_interval, rouge
from vgid.prompts import Form, Wording, generation_text
from vgid.results import Score
from vgid.study.mlflow_client import first_line

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be: ``MaxLoRARanks`` in vLLM's ``vllm/config/lora.py``."""

CHAT_TEMPLATE = "chat_template.jinja"

COMPARISON_ONLY = (
    "For comparison only, never to deploy: the server lists the base as well, and whoever names "
    "the base, or names no model, gets the base's answers, nothing suppressed."
)
"""Stands before every command that serves the adapter."""

TIMEOUT_S = 600
AT_ONCE = 8
NO_NAME = "no name"

SUPPRESSED = ("forget_rougeL", "earlier_rougeL")
KINDS = ("", "_text", "_raw")
"""Of questions, as the ends of score names (``vgid.evaluation.evaluate``)."""


def max_lora_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` that holds an adapter; None above all that vLLM knows."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def serve_merged(deployment: Deployment) -> str:
    """The command to deploy with: serves the merged weights, from the export's folder."""
    return _command("./merged", deployment, [f"--served-model-name {served_name(deployment)}"])


def serve_adapter(deployment: Deployment) -> str | None:
    """The command that serves the base with the adapter, see ``COMPARISON_ONLY``.

    Returns:
        None where the adapter's rank is larger than vLLM takes.
    """
    limit = max_lora_rank(deployment.adapter.rank)
    if limit is None:
        return None
    base, flags = deployment.base, []
    if base.hub_id is None:
        source = "BASE"
    else:
        source = base.hub_id
        flags.append(f"--revision {base.revision}")
    flags += [
        "--enable-lora",
        f"--lora-modules {served_name(deployment)}=./adapter",
        f"--max-lora-rank {limit}",
    ]
    return _command(source, deployment, flags)


def served_name(deployment: Deployment) -> str:
    """What clients call the model."""
    return f"{deployment.backbone}-{deployment.origin.trial_id}"


def chat_template(frame: Frame, bos: str, image_tokens: Sequence[str]) -> str:
    """The turns that open questions were measured in, as a Jinja template.

    Where the benchmark asks in another turn than models are taught in, a question is asked in its
    turn by the answer instructions that end it (``prompts.generation_text``). One user message with
    at most one image is taken and nothing else, for nothing else was measured. Base models' own
    templates may put another white space somewhere, and so ask another question than the one that
    was trained and measured.

    The loops over ``messages`` and ``message.content`` are what vLLM looks for to hand a message on
    in its parts; otherwise it joins them to one text with line breaks of its own.

    Args:
        frame: the prompt frame.
        bos: text of the token that the tokenizer puts in front; empty if there is none.
        image_tokens: what a text must not contain.
    """

    def turn(framed: str) -> str:
        before, after = framed.split("{text}")
        return f"{{{{ {json.dumps(bos + before)} + user.text + {json.dumps(after)} }}}}"

    def refuse(sentence: str) -> str:
        return f"{{{{ raise_exception({json.dumps(sentence)}) }}}}"

    def open_question(form: Form) -> str:
        taught = frame.image if form == "image" else frame.text
        measured = frame.asked.get(f"generation/{form}", taught)
        if measured == taught:
            return turn(taught)
        ends = f"user.text.endswith({json.dumps(generation_text('', form))})"
        return f"{{%- if {ends} -%}}{turn(measured)}{{%- else -%}}{turn(taught)}{{%- endif -%}}"

    one_turn = refuse("One user message and no system message, as in training and measurement.")
    return (
        "{%- set user = namespace(text='', images=0, turns=0) -%}\n"
        "{%- for message in messages -%}\n"
        "{%- set user.turns = user.turns + 1 -%}\n"
        f"{{%- if message.role != 'user' -%}}{one_turn}{{%- endif -%}}\n"
        "{%- if message.content is string -%}{%- set user.text = message.content -%}\n"
        "{%- else -%}\n"
        "{%- for part in message.content -%}\n"
        "{%- if part.type == 'text' -%}{%- set user.text = user.text + part.text -%}\n"
        "{%- elif part.type == 'image' -%}{%- set user.images = user.images + 1 -%}\n"
        f"{{%- else -%}}{refuse('Text and one image at most.')}{{%- endif -%}}\n"
        "{%- endfor -%}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if user.turns != 1 -%}}{one_turn}{{%- endif -%}}\n"
        f"{{%- if user.images > 1 -%}}{refuse('One image at most.')}{{%- endif -%}}\n"
        f"{{%- for token in {json.dumps(list(image_tokens))} -%}}\n"
        "{%- if token in user.text -%}"
        f"{refuse('The text holds an image token; send the image as a part of its own.')}"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        f"{{%- if user.images -%}}{open_question('image')}"
        f"{{%- else -%}}{open_question('text')}{{%- endif -%}}\n"
    )


def chat_template_of(frame: Frame, base: Path) -> str:
    """The chat template with the tokens that a base's own files name."""
    from transformers import AutoConfig, AutoTokenizer

    offline = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(base, **offline)
    # A server takes the template's text as it is and adds no such token of its own.
    first = tokenizer.decode(tokenizer("")["input_ids"][:1])
    settings = AutoConfig.from_pretrained(base, **offline).to_dict()
    ids = [settings[name] for name in sorted(settings) if _names_image_token(name)]
    return chat_template(frame, first, tokenizer.convert_ids_to_tokens(ids))


def _names_image_token(setting: str) -> bool:
    """Whether a config's setting is the id of a token that stands for images or around them."""
    kind = setting.startswith(("image_", "video_", "vision_"))
    return kind and setting.endswith(("_token_id", "_token_index"))


def _command(model: str, deployment: Deployment, flags: list[str]) -> str:
    """The flags behind the template make requests without their own settings decode as measured."""
    from vgid.models.decoding import MAX_NEW_TOKENS

    # As measured: sampled, or given more room, the same weights may say more than the record
    # promises.
    decoding = json.dumps({"temperature": 0, "max_new_tokens": MAX_NEW_TOKENS})
    parts = [
        f"vllm serve {model}",
        f"--dtype {deployment.base.precision}",
        *flags,
        f"--chat-template ./{CHAT_TEMPLATE}",
        "--chat-template-content-format openai",
        "--generation-config vllm",
        f"--override-generation-config '{decoding}'",
        f"--limit-mm-per-prompt '{json.dumps({'image': 1})}'",
        "--host 127.0.0.1",
    ]
    return " \\\n  ".join(parts)


@dataclass(frozen=True)
class Asked:
    """A question as it is sent.

    Attributes:
        score: that the answer counts for.
        question: the benchmark's.
        content: parts of the user message.
    """

    score: str
    question: Question
    content: list[dict[str, Any]]


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible server.

    Attributes:
        url: of its root or of its ``/v1``.
    """

    url: str

    def names(self) -> list[str]:
        """The models that it lists.

        Raises:
            InputError: it cannot be reached, or lists none.
        """
        try:
            listed = self._send("models")
            return [str(model["id"]) for model in listed["data"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._unusable(error) from None

    def answer(self, name: str | None, content: Sequence[Mapping[str, Any]]) -> str | None:
        """The answer to one message; None where the server refuses it.

        Raises:
            InputError: it cannot be reached, or answers in another form.
        """
        body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
        if name is not None:
            body["model"] = name
        try:
            return str(
                self._send("chat/completions", body)["choices"][0]["message"]["content"] or ""
            ).strip()
        except urllib.error.HTTPError as error:
            # Refused, as a name that is not served should be; a server's own fault says nothing of
            # the model.
            if error.code < 500:
                return None
            raise self._unusable(error) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise self._unusable(error) from None

    def _send(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        root = self.url.rstrip("/").removesuffix("/v1")
        request = urllib.request.Request(
            f"{root}/v1/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # Questions are private: they go to this server and through no proxy.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=TIMEOUT_S) as response:
            return json.load(response)

    def _unusable(self, error: Exception) -> InputError:
        told = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else None
        return InputError(
            f"--served {self.url}: is no OpenAI-compatible endpoint that answers "
            f"({told or first_line(error)}); name the server's root, as http://127.0.0.1:8000."
        )


def verify_served(
    target: Path,
    url: str,
    data: Path | None = None,
    public_key: Path | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> Verification:
    """Put the recorded questions to an endpoint.

    Args:
        target: deployment file or export folder.
        url: of the endpoint.
        data: as for ``verify``.
        public_key: as for ``verify``.
        tell: shows a line of progress.

    Returns:
        What was found. It is not verified where some name answers as the base, or scores outside
        the recorded intervals, or where no name answers.

    Raises:
        InputError: the endpoint does not answer, the file is not the one that was sealed, or the
            data is not there.
    """
    file = target / DEPLOYMENT if target.is_dir() else target
    checks = [signature_check(target, public_key)] if public_key is not None else []
    deployment, sha256 = read_deployment(file)
    checks.append(Check(name="seal", passed=True, detail=f"sha256 {sha256}"))
    scores: tuple[ScoreCheck, ...] = ()
    with recorded_benchmark(deployment, file, data, optional=False) as folder:
        assert folder is not None
        benchmark = Benchmark.open(folder)
        checks.append(same_check("data", deployment.data.sha256, benchmark.sha256, "sha256"))
        if all(check.passed for check in checks):
            asked = open_questions(deployment, benchmark, folder)
            found = _ask_all(Endpoint(url), deployment.scores, asked, tell)
            checks += found[0]
            scores = found[1]
    return Verification(file=file, checks=tuple(checks), scores=scores)


def open_questions(deployment: Deployment, benchmark: Benchmark, folder: Path) -> list[Asked]:
    """The generation questions of a record, worded as in the evaluation and with its images.

    Args:
        deployment: the record.
        benchmark: that it was measured on.
        folder: of the benchmark.
    """
    with tempfile.TemporaryDirectory(prefix="vgid-served-") as store:
        request = request_of(deployment, folder, Path(store))
    people = choose_people(benchmark, request)
    splits = {"forget": people.forget, "earlier": people.earlier, "retain": people.retain}
    asked = []
    for split, members in splits.items():
        for person in members:
            for question in split_questions(person, deployment.scores.part, request.seed):
                if question.task != "generation":
                    continue
                score = f"{split}_rougeL"
                if question.form == "text":
                    asked.append(_asked(f"{score}_text", person, question, "wrapped"))
                    continue
                asked.append(_asked(score, person, question, "wrapped"))
                if f"{score}_raw" in deployment.scores.deployed:
                    asked.append(_asked(f"{score}_raw", person, question, "raw"))
    return asked


def _asked(score: str, person: Person, question: Question, wording: Wording) -> Asked:
    text = generation_text(question.text, question.form, wording)
    parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
    if question.form == "image":
        png = BytesIO()
        image = decode_image(person.images[0], f"image 0 of person {person.id}")
        image.save(png, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return Asked(score, question, parts)


def _ask_all(
    endpoint: Endpoint, recorded: Scores, asked: Sequence[Asked], tell: Callable[[str], None]
) -> tuple[list[Check], tuple[ScoreCheck, ...]]:
    checks: list[Check] = []
    scores: list[ScoreCheck] = []
    # A server that is given an adapter commonly lists the base beside it, and takes the base for a
    # request without a model: the two ways by which what was suppressed is told all the same.
    for name in (*endpoint.names(), None):
        shown = NO_NAME if name is None else name
        tell(f"Asking {endpoint.url} under {shown}, {len(asked)} questions")
        with ThreadPoolExecutor(AT_ONCE) as threads:
            answers = list(threads.map(lambda a: endpoint.answer(name, a.content), asked))  # noqa: B023
        found = _scored(asked, answers, recorded.seeds[0])
        checks.append(_check(f"served under {shown}", recorded, found))
        if found:
            scores += [
                ScoreCheck(of=shown, name=s, stated=stated, found=found.get(s), merged=True)
                for s, stated in recorded.deployed.items()
                if s in found
            ]
    if not scores:
        checks.append(Check(name="served", passed=False, detail="every name refuses"))
    return checks, tuple(scores)


def _scored(asked: Sequence[Asked], answers: Sequence[str | None], seed: int) -> dict[str, Score]:
    tally: dict[str, tuple[list[float], list[str]]] = {}
    for one, answer in zip(asked, answers, strict=True):
        if answer is None:
            continue
        values, groups = tally.setdefault(one.score, ([], []))
        values.append(rouge(one.question.answer, answer)["rougeL"])
        groups.append(one.question.person_id)
    return {
        name: bootstrap_interval(values, groups, seed=seed)
        for name, (values, groups) in tally.items()
    }


def _check(name: str, recorded: Scores, found: Mapping[str, Score]) -> Check:
    """Whether answers about suppressed people are nearer to the base's than to those recorded.

    Only scores tell that set the two apart: those whose recorded intervals do not meet.
    """
    if not found:
        return Check(name=name, passed=True, detail="refuses every question")
    telling = [
        (score, recorded.base[score], recorded.deployed[score])
        for score in (s + kind for s in SUPPRESSED for kind in KINDS)
        if score in found
        and score in recorded.base
        and score in recorded.deployed
        and recorded.deployed[score].high < recorded.base[score].low
    ]
    if not telling:
        detail = "the record does not set base and deployed model apart"
        return Check(name=name, passed=None, detail=detail)
    as_base = [
        (score, base, deployed)
        for score, base, deployed in telling
        # Nearer to the base than to what was deployed; a third model is for the intervals to tell.
        if found[score].value > (base.value + deployed.value) / 2
    ]
    told = [
        f"{score} {found[score].value:.3f} (recorded {deployed.value:.3f}, base {base.value:.3f})"
        for score, base, deployed in as_base or telling
    ]
    verdict = "answers as the base" if as_base else "not as the base"
    return Check(name=name, passed=not as_base, detail=f"{verdict}: {', '.join(told)}")
