"""Exports a deployment to a folder that is served without this package.

::

    OUT/adapter/             PEFT adapter; its config names the base by hub id and revision
    OUT/merged/              base and adapter in one, as the base has it: safetensors, processor
    OUT/README.md            model card
    OUT/chat_template.jinja  the prompt frame, for servers
    OUT/deployment.yaml      the deployment file, byte for byte
    OUT/SHA256SUMS           the hash of each of these files (``vgid.deployment.signing``)

Merged is one shard in memory at a time; dtypes and shards stay the base's, and names are the hub's
(``vgid.models.weight_names``), so whatever loads the public base loads what is merged. Subjects and
requests stay in ``deployment.yaml``: a card travels further than an audit's record.

Shape legend: r rank, I inputs and O outputs of a linear map.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgid.config import Config
from vgid.deployment import record
from vgid.deployment.record import Deployment
from vgid.deployment.signing import write_manifest
from vgid.errors import InputError
from vgid.files import appearing, unwritable
from vgid.models.adapter_files import LoraWeights, copy_adapter, read_adapter
from vgid.models.backbones import copy_beside_weights, skeleton, spec
from vgid.models.weight_names import WeightNames
from vgid.prompts import Form, generation_text
from vgid.report.page import rendered

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be: ``MaxLoRARanks`` in vLLM's ``vllm/config/lora.py``."""

CHAT_TEMPLATE = "chat_template.jinja"

COMPARISON_ONLY = (
    "For comparison only, never to deploy: the server lists the base as well, and whoever names "
    "the base, or names no model, gets the base's answers, nothing suppressed."
)
"""Stands before every command that serves the adapter."""

INDEX = "model.safetensors.index.json"

HUB_METRICS = {"rougeL": "rouge", "cloze": "accuracy", "classification": "accuracy"}
"""The hub's names of metrics, by what follows the split in ours."""


class Exported(Config):
    """An export's folder, with commands to be run in it (``serve``, ``serve_adapter``)."""

    output: Path
    serve: str
    compare: str | None


def export(file: Path, output: Path, model_path: str | None = None) -> Exported:
    """Export a deployment to a new or empty folder, which appears whole or not at all.

    InputError where the file or its adapter was changed, the base is not there or another one, the
    adapter lacks a weight or holds one outside the language model, or nothing can be written there.
    """
    output = output.expanduser().absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output}: is there already; name a new folder to export to.")
    shipped = record.read_shipped(file)
    deployment, adapter = shipped.deployment, read_adapter(shipped.adapter)
    base = record.find_base(deployment, model_path)
    adapter.check(skeleton(base), spec(deployment.backbone).lora_targets)
    try:
        with appearing(output) as made:
            recorded = deployment.base
            copy_adapter(shipped.adapter, made / record.ADAPTER, recorded.hub_id, recorded.revision)
            merge(base, adapter, made / record.MERGED)
            shutil.copyfile(file, made / record.DEPLOYMENT)
            (made / "README.md").write_text(model_card(deployment), encoding="utf-8")
            template = chat_template_of(deployment.frame, base)
            (made / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
            write_manifest(made)
    except OSError as error:
        raise InputError(str(unwritable(output, error))) from None
    compare = serve_adapter(deployment)
    return Exported(output=output, serve=serve(deployment), compare=compare)


def merge(base: Path, adapter: LoraWeights, output: Path) -> None:
    """Write a Hugging Face folder with a fitting adapter (``LoraWeights.check``) in its weights.

    InputError where a module of the adapter is not in the base.
    """
    output.mkdir(parents=True)
    names = WeightNames(skeleton(base))
    index = _index(base)
    modules = {f"{module}.weight": module for module in adapter.modules}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(base / shard, "pt") as file:
            renamed = {name: names.on_hub(name) for name in list(file.keys())}
            inner = {names.in_model(name): new for name, new in renamed.items()}
            changed = {inner[name]: modules.pop(name) for name in inner.keys() & modules.keys()}
            # Nothing in it changes: bytes are copied, and keep the hash that the hub states.
            if list(renamed) == list(renamed.values()) and not changed:
                shutil.copyfile(base / shard, output / shard)
                continue
            tensors = {new: file.get_tensor(old) for old, new in renamed.items()}
            metadata = file.metadata()
        for name, module in changed.items():
            tensors[name] = _merged(tensors[name], adapter, module)
        save_file(tensors, output / shard, metadata)
    if modules:
        raise InputError(
            f"{base}: {min(modules.values())} of the adapter is not in the weights; name the base "
            "that the adapter was trained on with --model-path."
        )
    if (base / INDEX).is_file():
        index["weight_map"] = {names.on_hub(n): shard for n, shard in index["weight_map"].items()}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    copy_beside_weights(base, output)


def _merged(weight_OI: Tensor, adapter: LoraWeights, module: str) -> Tensor:
    a_rI, b_Or = adapter.modules[module]
    # In fp32, and rounded once to the base's dtype: in bf16 the small product would be rounded
    # before it is added, and then again.
    delta_OI = adapter.scale * (b_Or.float() @ a_rI.float())
    return (weight_OI.float() + delta_OI).to(weight_OI.dtype).contiguous()


def _index(base: Path) -> dict[str, Any]:
    """Which shard holds each weight, as loaders read it: a repository may hold them twice."""
    if not (base / INDEX).is_file():
        return {"weight_map": {path.name: path.name for path in base.glob("*.safetensors")}}
    index: dict[str, Any] = json.loads((base / INDEX).read_text())
    if any(Path(shard).name != shard for shard in index["weight_map"].values()):
        raise InputError(f"{base / INDEX}: names a file outside the folder; name another base.")
    return index


def model_card(deployment: Deployment) -> str:
    """The card's text, of ``card.md.jinja``."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    from vgid.models.decoding import MAX_NEW_TOKENS

    data, scores, name = deployment.data, deployment.scores, served_name(deployment)
    # The public model that the base is or comes from; the embedded ones go by their name.
    source = spec(deployment.backbone).hub_id or deployment.backbone
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type="mllmu-bench",
            dataset_name=f"MLLMU-Bench layout, sha256 {data.sha256[:12]}",
            dataset_split=f"{score.partition('_')[0]} people, {scores.part} questions",
            metric_type=HUB_METRICS[score.rpartition("_")[2]],
            metric_name=score,
            metric_value=round(found.value, 4),
        )
        for score, found in record.shown_scores(scores.deployed).items()
        if score.rpartition("_")[2] in HUB_METRICS  # not those of text-only and raw questions
    ]
    card_data = ModelCardData(
        base_model=source,
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "machine-unlearning", "vgid", deployment.hyperparameters.method],
        metrics=sorted({str(result.metric_type) for result in results}),
        model_name=name,
        eval_results=results,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("card.md.jinja")),
        **dict(deployment),
        name=name,
        source=source,
        table=scores.grid().markdown(),
        serve=serve(deployment),
        compare=serve_adapter(deployment),
        comparison_only=COMPARISON_ONLY,
        question=generation_text("QUESTION", "image"),
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return f"{card}\n"


def max_lora_rank(rank: int) -> int | None:
    """The least ``--max-lora-rank`` that holds an adapter; None above all that vLLM knows."""
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def serve_adapter(deployment: Deployment) -> str | None:
    """The command that serves the base with the adapter; None where vLLM takes none of its rank."""
    limit = max_lora_rank(deployment.adapter.rank)
    return None if limit is None else serve(deployment, limit)


def served_name(deployment: Deployment) -> str:
    """What clients call the model."""
    return f"{deployment.backbone}-{deployment.origin.trial_id}"


def chat_template(frame: record.Frame, bos: str, image_tokens: Sequence[str]) -> str:
    """The turns that open questions were measured in, as a Jinja template.

    Where the benchmark asks in another turn than models are taught in, a question is asked in its
    turn by the answer instructions that end it (``prompts.generation_text``). One user message with
    at most one image is taken and nothing else, for nothing else was measured. Base models' own
    templates may put white space elsewhere, and so ask another question than the measured one.

    vLLM looks for its loops over ``messages`` and ``message.content`` to hand a message on in its
    parts; otherwise it joins them with line breaks of its own. ``bos`` is the text of the token
    that the tokenizer puts in front; no text may contain ``image_tokens``.
    """
    turns = {}
    forms: tuple[Form, ...] = ("image", "text")
    for form in forms:
        taught = frame.image if form == "image" else frame.text
        measured = frame.asked.get(f"generation/{form}", taught)
        turns[form] = {
            "ending": generation_text("", form),
            "measured": (bos + measured).split("{text}"),
            "taught": (bos + taught).split("{text}"),
        }
    # JSON's texts, lists and objects are Jinja's too.
    given = {"turns": turns, "image_tokens": list(image_tokens)}
    head = [f"{{%- set {name} = {json.dumps(value)} -%}}\n" for name, value in given.items()]
    return "".join(head) + Path(__file__).with_name(CHAT_TEMPLATE).read_text(encoding="utf-8")


def chat_template_of(frame: record.Frame, base: Path) -> str:
    """The chat template with the tokens that a base's own files name."""
    from transformers import AutoConfig, AutoTokenizer

    offline = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(base, **offline)
    # A server takes the template's text as it is and adds no such token of its own.
    first = tokenizer.decode(tokenizer("")["input_ids"][:1])
    settings = AutoConfig.from_pretrained(base, **offline).to_dict()
    # Of tokens that stand for images or around them.
    ids = [
        settings[name]
        for name in sorted(settings)
        if re.fullmatch(r"(image|video|vision)_(.*_)?token_(id|index)", name)
    ]
    return chat_template(frame, first, tokenizer.convert_ids_to_tokens(ids))


def serve(deployment: Deployment, limit: int | None = None) -> str:
    """The command to deploy with, run in the export's folder: serves the merged weights.

    With ``limit``, a ``--max-lora-rank``, it serves the adapter.
    """
    from vgid.models.decoding import MAX_NEW_TOKENS

    told = {"name": served_name(deployment), "limit": limit, "max_new_tokens": MAX_NEW_TOKENS}
    return rendered("vgid.deployment", "serve.sh.jinja", **dict(deployment) | told).rstrip()
