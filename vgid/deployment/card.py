"""The model card of an export: Markdown with the front matter that the Hugging Face hub reads.

It says what was suppressed under which tests, and what was not tested; never that it is gone.
Subjects and requests stay in ``deployment.yaml``: a card travels further than an audit's record.
"""

from vgid.deployment.record import Deployment
from vgid.deployment.vllm import (
    COMPARISON_ONLY,
    max_lora_rank,
    serve_adapter,
    serve_merged,
    served_name,
)
from vgid.models.backbones import spec
from vgid.prompts import generation_text
from vgid.report.records import FURTHER_METRICS, MAIN_METRICS
from vgid.report.tables import Grid
from vgid.results import Score

CARD_SCORES = (
    *MAIN_METRICS,
    *FURTHER_METRICS,
    "forget_classification",
    "test_classification",
    "retain_classification",
    "celebrity_classification",
    "earlier_rougeL",
    "earlier_cloze",
    "earlier_memorisation",
)
HUB_METRICS = {"rougeL": "rouge", "cloze": "accuracy", "classification": "accuracy"}
"""The hub's names of metrics, by what follows the split in ours."""


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
