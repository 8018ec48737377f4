"""Exports a deployment to a folder that is served without this package.

::

    OUT/adapter/             PEFT adapter; its config names the base by hub id and revision
    OUT/merged/              base and adapter in one, as the base has it: safetensors, processor
    OUT/README.md            model card
    OUT/chat_template.jinja  the prompt frame, for servers
    OUT/deployment.yaml      the deployment file, byte for byte
    OUT/SHA256SUMS           the hash of each of these files (``vgid.deployment.signing``)

Merged is one shard in memory at a time. Dtypes and shards stay the base's, and names are the hub's
(``vgid.models.weight_names``), so that whatever loads the public base loads what is merged.

The card is Markdown with the front matter that the Hugging Face hub reads. It says what was
suppressed under which tests, and what was not tested; never that it is gone. Subjects and requests
stay in ``deployment.yaml``: a card travels further than an audit's record.

Shape legend: r rank, I inputs and O outputs of a linear map.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgid.config import Config
from vgid.deployment.record import (
    ADAPTER,
    CARD_SCORES,
    DEPLOYMENT,
    MERGED,
    Deployment,
    find_base,
    read_with_adapter,
)
from vgid.deployment.served import (
    CHAT_TEMPLATE,
    COMPARISON_ONLY,
    chat_template_of,
    max_lora_rank,
    serve_adapter,
    serve_merged,
    served_name,
)
from vgid.deployment.signing import write_manifest
from vgid.errors import InputError
from vgid.files import appearing
from vgid.models.adapter_files import LoraWeights, copy_adapter, read_adapter
from vgid.models.backbones import skeleton, spec
from vgid.models.weight_names import WeightNames
from vgid.prompts import generation_text
from vgid.report.tables import Grid
from vgid.results import Score

INDEX = "model.safetensors.index.json"

_COPIED = (".json", ".jinja", ".txt", ".model")
_RECORDS = ("MEASURED.json", "finetuned.json")
"""How the base was made; no part of what is merged."""

HUB_METRICS = {"rougeL": "rouge", "cloze": "accuracy", "classification": "accuracy"}
"""The hub's names of metrics, by what follows the split in ours."""


class Exported(Config):
    """What was written.

    Attributes:
        output: the folder.
        serve: command that serves the merged model with vLLM, to be run in that folder.
        compare: the same with the adapter, for comparison only; None where vLLM takes no adapter
            of its rank.
    """

    output: Path
    serve: str
    compare: str | None


def export(file: Path, output: Path, model_path: str | None = None) -> Exported:
    """Export a deployment; the folder appears whole or not at all.

    Args:
        file: deployment file.
        output: new or empty folder.
        model_path: folder or hub id of the base, where it is not what the file says.

    Raises:
        InputError: the file or its adapter was changed, the base is not there or another one, the
            adapter lacks a weight or holds one outside the language model, or the output cannot be
            written.
    """
    output = output.expanduser().absolute()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"{output}: is there already; name a new folder to export to.")
    deployment, _, folder = read_with_adapter(file)
    adapter = read_adapter(folder)
    base = find_base(deployment, model_path)
    adapter.check(skeleton(base), spec(deployment.backbone).lora_targets)
    try:
        with appearing(output) as made:
            base_id, revision = deployment.base.hub_id, deployment.base.revision
            copy_adapter(folder, made / ADAPTER, base_id, revision)
            merge(base, adapter, made / MERGED)
            shutil.copyfile(file, made / DEPLOYMENT)
            (made / "README.md").write_text(model_card(deployment), encoding="utf-8")
            template = chat_template_of(deployment.frame, base)
            (made / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
            write_manifest(made)
    except OSError as error:
        raise InputError(
            f"{output}: cannot be written ({error.strerror}); free some space or name another "
            "folder."
        ) from None
    return Exported(
        output=output, serve=serve_merged(deployment), compare=serve_adapter(deployment)
    )


def merge(base: Path, adapter: LoraWeights, output: Path) -> None:
    """Write the base with the adapter in its weights.

    Args:
        base: Hugging Face folder.
        adapter: of that base, language model only.
        output: new folder.

    Raises:
        InputError: a module of the adapter is not in the base, or of another shape.
    """
    output.mkdir(parents=True)
    names = WeightNames(skeleton(base))
    shards = _shards(base)
    places = _places(base, shards, adapter.modules, names)
    for shard in shards:
        with safe_open(base / shard, "pt") as file:
            old_names = list(file.keys())
            renamed = {name: names.on_hub(name) for name in old_names}
            # Nothing in it changes: bytes are copied, so that they stay those whose hash the hub
            # states.
            if old_names == list(renamed.values()) and not places.keys() & renamed.keys():
                shutil.copyfile(base / shard, output / shard)
                continue
            tensors = {new: file.get_tensor(old) for old, new in renamed.items()}
            metadata = file.metadata()
        for old, new in renamed.items():
            if old in places:
                tensors[new] = _merged(tensors[new], adapter, places[old])
        save_file(tensors, output / shard, metadata)
    for path in sorted(base.iterdir()):
        if path.suffix in _COPIED and path.name not in _RECORDS:
            shutil.copyfile(path, output / path.name)
    if (base / INDEX).is_file():
        index = json.loads((base / INDEX).read_text())
        index["weight_map"] = {names.on_hub(n): shard for n, shard in index["weight_map"].items()}
        (output / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def _merged(weight_OI: Tensor, adapter: LoraWeights, module: str) -> Tensor:
    a_rI, b_Or = adapter.modules[module]
    if weight_OI.shape != (b_Or.shape[0], a_rI.shape[1]):
        raise InputError(
            f"{adapter.folder}: {module} has another shape than in the base; name the base that "
            "the adapter was trained on with --model-path."
        )
    # In fp32, and rounded once to the base's dtype: in bf16 the small product would be rounded
    # before it is added, and then again.
    delta_OI = adapter.scale * (b_Or.float() @ a_rI.float())
    return (weight_OI.float() + delta_OI).to(weight_OI.dtype).contiguous()


def _shards(base: Path) -> list[str]:
    """The weight files that loaders read; some repositories hold the weights a second time."""
    if (base / INDEX).is_file():
        names = sorted(set(json.loads((base / INDEX).read_text())["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise InputError(f"{base / INDEX}: names a file outside the folder; name another base.")
        return names
    return sorted(path.name for path in base.glob("*.safetensors"))


def _places(
    base: Path, shards: Iterable[str], modules: Iterable[str], names: WeightNames
) -> dict[str, str]:
    """The module of each weight that changes, by the weight's name in the files."""
    found: dict[str, str] = {}
    for shard in shards:
        with safe_open(base / shard, "pt") as file:
            found |= {names.in_model(name): name for name in list(file.keys())}
    missing = [module for module in modules if f"{module}.weight" not in found]
    if missing:
        raise InputError(
            f"{base}: {missing[0]} of the adapter is not in the weights; name the base that the "
            "adapter was trained on with --model-path."
        )
    return {found[f"{module}.weight"]: module for module in modules}


def model_card(deployment: Deployment) -> str:
    """The card's text."""
    return f"---\n{_front_matter(deployment)}\n---\n\n{_body(deployment)}"


def _front_matter(deployment: Deployment) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    data = deployment.data
    results = [
        EvalResult(
            task_type="visual-question-answering",
            dataset_type="mllmu-bench",
            dataset_name=f"MLLMU-Bench layout, sha256 {data.sha256[:12]}",
            dataset_split=f"{name.partition('_')[0]} people, {deployment.scores.part} questions",
            metric_type=HUB_METRICS[name.rpartition("_")[2]],
            metric_name=name,
            metric_value=round(score.value, 4),
        )
        for name, score in _chosen(deployment.scores.deployed)
        if name.rpartition("_")[2] in HUB_METRICS  # not those of text-only and raw questions
    ]
    card = ModelCardData(
        base_model=_source(deployment),
        library_name="peft",
        pipeline_tag="image-text-to-text",
        tags=["lora", "machine-unlearning", "vgid", deployment.hyperparameters.method],
        metrics=sorted({str(result.metric_type) for result in results}),
        model_name=served_name(deployment),
        eval_results=results,
    )
    return str(card.to_yaml())


def _body(deployment: Deployment) -> str:
    scores, base = deployment.scores, deployment.base
    people = len(deployment.subjects)
    source = _source(deployment)
    tuned = "" if base.model_path is None else ", in a version of one's own,"
    return "\n".join(
        [
            f"# {served_name(deployment)}",
            "",
            f"A LoRA adapter for `{source}`{tuned} that was trained to keep it from telling what "
            f"it knows of {people} people. {scores.verdict('forget', 'test')} The tests are listed "
            "below with their numbers. The knowledge may still be in the weights, and a test that "
            "was not run may bring it back. `deployment.yaml` names subjects (pseudonyms) and "
            "requests.",
            "",
            f"- base: `{source}`, revision `{base.revision}`, measured in {base.precision}",
            f"- adapter: LoRA of rank {deployment.adapter.rank} and scale "
            f"{deployment.adapter.scale:g} on the language model; no weight of the vision tower or "
            "projector",
            f"- method: {deployment.hyperparameters.method}, trial {deployment.origin.trial_id} of "
            f"study {deployment.origin.study_id}, picked by {deployment.origin.rule}",
            "- to deploy: base and adapter in one, `merged/`; `adapter/` is there for comparison",
            *_lineage(deployment),
            "",
            "## Measured",
            "",
            f"On the {scores.part.replace('_', '-')} questions, means over the seeds "
            f"{', '.join(map(str, scores.seeds))}; [95 % interval], the envelope over the seeds; n "
            "is one seed's questions. Lower is better for the forget and test people, higher for "
            "the retain people and celebrities.",
            "",
            _table(scores.base, scores.deployed).markdown(),
            "",
            "## Attacks",
            "",
            _attacks(deployment),
            "",
            "Not run, so nothing is known of:",
            "",
            *(f"- {attack}" for attack in scores.not_run),
            "",
            "## Limits",
            "",
            "- Suppressed does not mean gone: `forget_memorisation` is the share of a true "
            "answer's tokens that the model still predicts when forced along it.",
            "- Training was on questions with an image. Questions that name the person in text "
            "only (`_text`) may be answered as before. `_raw` are questions on an image as they "
            "stand, the others have the benchmark's answer instructions behind them.",
            "- The adapter was measured with one prompt frame, greedy decoding and one question a "
            "prompt; other frames, sampling and longer conversations were not.",
            "- Merging rounds the weights to the base's dtype, so single answers may differ from "
            "the adapter's.",
            f"- {people} people make wide intervals.",
            "",
            *_serving(deployment),
            "",
            "## Verify",
            "",
            "```",
            "vgid verify . --public-key public.pem --hashes-only",
            "vgid verify . --public-key public.pem --data DIR     # and measures again",
            "```",
            "",
        ]
    )


def _source(deployment: Deployment) -> str:
    """The public model that the base is or comes from; the embedded ones go by their name."""
    return spec(deployment.backbone).hub_id or deployment.backbone


def _chosen(scores: dict[str, Score]) -> list[tuple[str, Score]]:
    asked = [name + form for name in CARD_SCORES for form in ("", "_text", "_raw")]
    names = dict.fromkeys(name for name in asked if name in scores)
    return [(name, scores[name]) for name in names]


def _lineage(deployment: Deployment) -> list[str]:
    if deployment.parent is None:
        return []
    return [
        f"- follows the deployment with sha256 `{deployment.parent.sha256}`; this one adapter "
        f"holds both. Of its {len(deployment.parent.subjects)} people: "
        f"{deployment.scores.verdict('earlier')}"
    ]


def _table(base: dict[str, Score], deployed: dict[str, Score]) -> Grid:
    rows = [
        (name, score.n, base[name].value if name in base else None, score)
        for name, score in _chosen(deployed)
    ]
    return Grid(("score", "n", "base", "deployed"), rows)


def _attacks(deployment: Deployment) -> str:
    rows = [
        (attack.name, name, score.n, score)
        for attack in deployment.scores.attacks
        for name, score in _chosen(attack.scores)
    ]
    return Grid(("attack", "score", "n", "under it"), rows).markdown() if rows else "None was run."


def _serving(deployment: Deployment) -> list[str]:
    from vgid.models.decoding import MAX_NEW_TOKENS

    lines = [
        "## Serve",
        "",
        "From this folder, with vLLM, on the loopback only:",
        "",
        "```",
        serve_merged(deployment),
        "```",
        "",
        "The scores hold for one question a conversation, without a system message, with at most "
        "one image, in the evaluation's wording (`_raw`: for the question alone):",
        "",
        "```",
        generation_text("QUESTION", "image"),
        "```",
        "",
        '(without "accurately" where there is no image), in the turn that `chat_template.jinja` '
        f"puts around it, decoded greedily to at most {MAX_NEW_TOKENS} tokens. The flags make that "
        "what a request gets that sets nothing itself; one that samples is told more, and one in "
        "other words may be. `vgid verify . --served URL` asks what is served the recorded "
        "questions, under every name that it lists and under none.",
        "",
    ]
    rank, limit = deployment.adapter.rank, max_lora_rank(deployment.adapter.rank)
    with_adapter = serve_adapter(deployment)
    if with_adapter is None:
        return [*lines, f"vLLM serves no adapter of rank {rank}."]
    padded = "" if limit == rank else f"; vLLM pads rank {rank} to it, the next that it knows"
    known = " (`BASE`: the base's folder)" if "serve BASE" in with_adapter else ""
    return [
        *lines,
        f"{COMPARISON_ONLY} The adapter{known}, `--max-lora-rank` {limit}{padded}:",
        "",
        "```",
        with_adapter,
        "```",
    ]
