"""The student: LoRA on the language model; with it off, the model is the base, bit for bit."""

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vgid.config import TrialConfig
from vgid.errors import InputError
from vgid.files import appearing
from vgid.models.adapter_files import FILES, read_adapter
from vgid.models.backbones import Backbone


@contextmanager
def attached(backbone: Backbone, trial: TrialConfig) -> Iterator[Any]:
    """Attach a fresh LoRA adapter; yields the ``PeftModel``, and leaves the base as it was."""
    from peft import LoraConfig, get_peft_model

    _silence_renaming()
    torch.manual_seed(trial.seed)  # LoRA's A: equal on every rank and at every resume
    config = LoraConfig(
        r=trial.lora_rank,
        lora_alpha=trial.lora_rank if trial.released else 2 * trial.lora_rank,  # scale 1, or 2
        init_lora_weights="gaussian" if trial.released else True,
        lora_dropout=trial.lora_dropout,
        target_modules=backbone.spec.lora_targets,
        task_type="CAUSAL_LM",
    )
    student = get_peft_model(backbone.model, config)
    try:
        with checkpointed(backbone.model, trial.gradient_checkpointing):
            yield student
    finally:
        _freeze(backbone, student.unload())


@contextmanager
def checkpointed(model: Any, on: bool) -> Iterator[None]:
    """Gradient checkpointing of a model, if it is wanted; on leaving, the model is as it was."""
    if not on:
        yield
        return
    try:
        # This also hooks the input embeddings, whose outputs then require gradients: without them
        # checkpointed blocks leave LoRA untrained. Disabling it leaves the hooks where transformers
        # itself gave no adapter, and hooked again, their handles would be lost.
        model.gradient_checkpointing_enable({"use_reentrant": False})
        yield
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()


@contextmanager
def loaded(backbone: Backbone, adapter: Path) -> Iterator[Any]:
    """Attach a saved adapter as ``load_saved`` does; take it off on leaving."""
    student = load_saved(backbone, adapter)
    try:
        yield student
    finally:
        _freeze(backbone, student.unload())


def load_saved(backbone: Backbone, adapter: Path) -> Any:
    """Attach a saved adapter, in evaluation mode; ``InputError`` as of ``LoraWeights.check``."""
    from peft import PeftModel

    read_adapter(adapter).check(backbone.model, backbone.spec.lora_targets)
    _silence_renaming()
    return PeftModel.from_pretrained(backbone.model, adapter).eval()


def merge(backbone: Backbone, adapter: Path) -> None:
    """Make a deployed adapter part of the base in memory, for a next request: another base."""
    _freeze(backbone, load_saved(backbone, adapter).merge_and_unload())
    # Under its old name, the store would give out another base's states; image features stay.
    backbone.revision = sha256(adapter, backbone.revision)


@contextmanager
def scaled(student: Any, scale: float) -> Iterator[None]:
    """Inside, the adapter counts ``scale`` times as much: W + scale * BA, and so it is saved.

    Nothing is rounded: peft multiplies with ``lora_alpha / r``, of which this is the numerator.
    """
    if scale == 1:
        yield
        return
    config = student.peft_config["default"]
    trained = config.lora_alpha

    def put(alpha: float) -> None:
        config.lora_alpha = alpha
        for module in student.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling["default"] = alpha / config.r

    try:
        put(trained * scale)
        yield
    finally:
        put(trained)


def save(student: Any, folder: Path) -> None:
    """Write the adapter of a ``PeftModel``; the folder appears whole or not at all."""
    with appearing(folder, replace=True) as temporary:
        # By these: all of the state would put a base together that is dealt out over workers.
        learnt = {n: p.detach() for n, p in student.named_parameters() if "lora_" in n}
        student.save_pretrained(temporary, state_dict=learnt)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty model card


def sha256(folder: Path, base: str = "") -> str:
    """SHA-256 over a saved adapter's files, behind ``base``; ``InputError`` if one is missing."""
    digest = hashlib.sha256(base.encode())
    for name in FILES:
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: is missing; name a PEFT adapter folder.")
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _silence_renaming() -> None:
    """Of an attribute for which peft asks transformers by its old name."""
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


def _freeze(backbone: Backbone, base: Any) -> None:
    assert base is backbone.model
    vars(base).pop("peft_config", None)  # else peft warns of a second adapter next time
    base.requires_grad_(False)
    base.eval()
