"""One row per backbone, and the one path by which any is loaded: safetensors, no remote code.

LoRA targets are regular expressions on the full module path: ``q_proj`` alone would also match the
vision tower, whose LoRA weights some servers drop without a word.
"""

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vgid.errors import InputError
from vgid.prompts import Form, Task

if TYPE_CHECKING:
    from vgid.models.vision import Vision

EMBEDDED = Path(__file__).parent.parent / "bases" / "weights"
LANGUAGE_MODEL_LINEARS = (
    r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
RECORDS = (
    "MEASURED.json",
    "finetuned.json",
)  # beside weights: how they were made, not what they are
_LOCAL = {"trust_remote_code": False, "local_files_only": True}


@dataclass(frozen=True)
class PromptFrame:
    """What surrounds the user text: one turn, ready for the response."""

    image: str  # turn with an image; ``{text}`` is the user text
    text: str  # turn without an image
    separator: str  # between the turn and the response's first character
    opening: str = ""  # what a conversation has once, before its first turn
    # By ``task/form``: turns that the benchmark's evaluation asks in, and few-shot turns, with
    # ``{question}`` and ``{answer}``; where they are others than the frame's.
    asked: Mapping[str, str] = field(default_factory=dict)
    shots: Mapping[str, str] = field(default_factory=dict)

    def turn(self, form: Form, task: Task | None = None) -> str:
        """The turn of a form: as the benchmark asks ``task``, or as models are taught if None."""
        return self.asked.get(f"{task}/{form}", self.image if form == "image" else self.text)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a deployment record says of it, as plain data."""
        return {name: getattr(self, name) for name in ("image", "text", "separator", "asked")}


TINY_LLAVA_FRAME = PromptFrame(
    image="USER: <image>\n{text}\nASSISTANT:",
    text="USER: {text}\nASSISTANT:",
    separator=" ",
    shots={
        "classification/image": "USER: <image>\nQuestion: {question}\nCorrect Answer: {answer}\n",
        "classification/text": "USER:\nQuestion: {question}\nCorrect Answer: {answer}\n",
        "cloze/image": "USER:<image>\n{question}\nCorrect Answer: {answer}\n",
        "cloze/text": "USER:\n{question}\nCorrect Answer: {answer}\n",
    },
)
"""What the embedded weights were pretrained on."""

LLAVA_FRAME = replace(
    TINY_LLAVA_FRAME,
    asked={
        "generation/image": "USER: <image>\n{text}\nASSISTANT: ",
        "classification/text": "USER:\n{text}\nASSISTANT:",
        "cloze/text": "USER:\n{text}\nASSISTANT:",
    },
)
"""The prompts of MLLMU-Bench's ``eval.py``, to the character."""

_QWEN_OPENING = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
QWEN_FRAME = PromptFrame(
    image=f"{_QWEN_OPENING}<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    "{text}<|im_end|>\n<|im_start|>assistant\n",
    text=_QWEN_OPENING + "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n",
    separator="",
    opening=_QWEN_OPENING,
)


@dataclass(frozen=True)
class BackboneSpec:
    """A row of ``BACKBONES``: where a base comes from, and how it is asked, adapted and scored."""

    name: str
    hub_id: str | None  # None for an embedded backbone
    revision: str | None  # pinned commit
    frame: PromptFrame
    lora_targets: str = LANGUAGE_MODEL_LINEARS
    # People whose questions precede a scored one; none where a model is too small for it.
    few_shot: Mapping[Task, int] = field(default_factory=dict)
    option_scoring: Literal["letter", "likelihood"] = "letter"

    @property
    def embedded(self) -> bool:
        """Whether the weights ship with this package."""
        return self.hub_id is None


BENCHMARK_SHOTS: dict[Task, int] = {"classification": 1, "cloze": 2}

BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        BackboneSpec("tiny-llava", None, None, TINY_LLAVA_FRAME, option_scoring="likelihood"),
        BackboneSpec("tiny-qwen2.5-vl", None, None, QWEN_FRAME, option_scoring="likelihood"),
        BackboneSpec(
            "llava-1.5-7b",
            "llava-hf/llava-1.5-7b-hf",
            "b234b804b114d9e37bb655e11cbbb5f5e971b7a9",
            LLAVA_FRAME,
            few_shot=BENCHMARK_SHOTS,
        ),
        BackboneSpec(
            "llava-1.5-13b",
            "llava-hf/llava-1.5-13b-hf",
            "5dda2880bda009266dda7c4baff660b95ca64540",
            LLAVA_FRAME,
            few_shot=BENCHMARK_SHOTS,
        ),
        BackboneSpec(
            "qwen2.5-vl-3b",
            "Qwen/Qwen2.5-VL-3B-Instruct",
            "66285546d2b821cf421d4f5eb2576359d3770cd3",
            QWEN_FRAME,
            few_shot=BENCHMARK_SHOTS,
        ),
    )
}


@dataclass
class Backbone:
    """A loaded base model, frozen and in evaluation mode."""

    spec: BackboneSpec
    model: Any  # the Hugging Face image-text-to-text model
    processor: Any  # its image processor and tokenizer
    revision: str  # hub commit, or SHA-256 of a local folder's files; names the base in results
    vision: "Vision" = field(init=False, repr=False)

    def __post_init__(self) -> None:
        from vgid.models.tree_attention import attend_by_trees
        from vgid.models.vision import Vision

        attend_by_trees(self.model)
        self.vision = Vision(self.model, self.processor, self.revision)

    @property
    def device(self) -> Any:
        """The torch device of the weights."""
        return self.model.device

    @property
    def identity(self) -> list[Any]:
        """All of it that results depend on, as plain data: part of the name of what is kept."""
        return _identity(self.spec, self.revision, self.model.dtype, self.processor)


def spec(name: str) -> BackboneSpec:
    """The row of backbone ``name``; ``InputError`` where there is none."""
    if name not in BACKBONES:
        raise InputError(f"backbone: unknown name {name!r}; choose one of {', '.join(BACKBONES)}.")
    return BACKBONES[name]


def locate(row: BackboneSpec, model_path: str | None, weights: bool = True) -> Path:
    """The local folder with the base: given, embedded, or from the Hugging Face cache or hub.

    ``model_path`` is a folder or hub id in place of the row's own source. What cannot be had is an
    ``InputError``; without ``weights`` configuration and processor will do.
    """
    if model_path is not None and Path(model_path).is_dir():
        folder = Path(model_path)
    elif row.embedded and model_path is None:
        folder = EMBEDDED / row.name
    else:
        revision = None if model_path else row.revision
        folder = _from_hub(model_path or str(row.hub_id), revision, weights)
    for names in (("config.json",), ("processor_config.json", "preprocessor_config.json")):
        if not any((folder / name).is_file() for name in names):
            raise InputError(
                f"{folder}: {names[0]} is missing; --model-path must name a Hugging Face folder."
            )
    if weights and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"{folder}: no *.safetensors file; convert the weights to safetensors, other formats "
            "are never read."
        )
    return folder


def _from_hub(hub_id: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import logging

    logging.set_verbosity_error()  # one sentence in the end, not a line for each retry
    files = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=files))
    except Exception as error:
        raise InputError(
            f"backbone weights: {hub_id} at revision {revision or 'main'} is neither in the "
            f"Hugging Face cache nor reachable ({type(error).__name__}); download it elsewhere "
            "and name its folder with --model-path."
        ) from None


def load(name: str, model_path: str | None = None, device: str | None = None) -> Backbone:
    """Load a backbone, frozen: bf16 on a GPU if there is one, fp32 on the CPU; see ``locate``."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    row = spec(name)
    folder = locate(row, model_path)
    if device is None:
        # With its number: transformers loads in threads, whose own current GPU is the first.
        gpus = torch.cuda.is_available()
        device = f"cuda:{torch.cuda.current_device()}" if gpus else "cpu"
    dtype = _dtype(device != "cpu")
    model = _whole_model(folder, dtype, device).requires_grad_(False).eval().to(device)
    return Backbone(row, model, processor_of(folder), revision_of(folder))


def identity(name: str, model_path: str | None = None) -> list[Any]:
    """What ``load`` would give as ``Backbone.identity``, and its errors, without the weights."""
    import torch

    row = spec(name)
    folder = locate(row, model_path)
    dtype = _dtype(torch.cuda.is_available())
    return _identity(row, revision_of(folder), dtype, processor_of(folder))


def _dtype(on_gpu: bool) -> Any:
    import torch

    return torch.bfloat16 if on_gpu else torch.float32


def _identity(row: BackboneSpec, revision: str, dtype: Any, processor: Any) -> list[Any]:
    from vgid.models.vision import image_processing

    asked = [asdict(row.frame), dict(row.few_shot), row.option_scoring]
    return [revision, str(dtype), image_processing(processor), asked]


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **_LOCAL)


def width(name: str, model_path: str | None = None) -> int:
    """Hidden width of a backbone's language model, by its configuration alone; as ``locate``."""
    return int(_config(locate(spec(name), model_path, weights=False)).get_text_config().hidden_size)


def processor_of(folder: Path) -> Any:
    """The image processor and tokenizer of a base's folder."""
    from vgid.models.qwen_processor import processor_class

    return processor_class(_config(folder).model_type).from_pretrained(folder, **_LOCAL)


def _whole_model(folder: Path, dtype: Any, device: str) -> Any:
    """The model of a folder; ``InputError`` unless its files hold every weight, in its shape.

    transformers itself fills in what is missing with random numbers, and at most logs that it did.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        model, loading = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told here as well
            # Built there, tensor by tensor out of mapped files: never whole in the node's memory.
            device_map=None if device == "cpu" else {"": device},
            **_LOCAL,
        )
    except SafetensorError:
        raise InputError(
            f"{folder}: a *.safetensors file is damaged; restore it or name another folder with "
            "--model-path."
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    lacking = sorted((*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])))
    if lacking:
        raise InputError(
            f"{folder}: {len(lacking)} weights of the model are missing or of another shape, such "
            f"as {lacking[0]}; restore the folder or name another with --model-path."
        )
    return model


def skeleton(folder: Path) -> Any:
    """The model of a base's folder without its weights, on torch's meta device."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(_config(folder), trust_remote_code=False)


def outline(name: str, model_path: str | None = None) -> Backbone:
    """A backbone without weights, which frames and tokenises prompts but answers none.

    Its errors are those of ``load``.
    """
    row = spec(name)
    folder = locate(row, model_path, weights=False)
    return Backbone(row, skeleton(folder), processor_of(folder), "no weights")


def copy_beside_weights(base: Path, output: Path, *but: str) -> None:
    """Copy a base's configuration and processor, all files ``but`` some, to a folder of weights."""
    for path in sorted(base.iterdir()):
        left_out = path.name in (*RECORDS, *but) or path.name.endswith(".index.json")
        if path.suffix in (".json", ".jinja", ".txt", ".model") and not left_out:
            shutil.copyfile(path, output / path.name)
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def revision_of(folder: Path) -> str:
    """Hub commit of a cached snapshot, or the SHA-256 over a local folder's model files."""
    if folder.parent.name == "snapshots":
        return folder.name
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name in RECORDS or path.suffix not in (".safetensors", ".json", ".model"):
            continue
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
