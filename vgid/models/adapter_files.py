"""PEFT adapters as folders: read, copied, joined. Shapes: r rank, I inputs, O outputs."""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vgid.errors import InputError
from vgid.files import appearing

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILES = (CONFIG, WEIGHTS)
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}
# Read, or without effect. Others add weights, leave modules out, or scale (``peft.LoraConfig``).
_WITHOUT_EFFECT = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "task_type", "inference_mode"),
    *("peft_version", "auto_mapping", "base_model_name_or_path", "revision"),
    *("megatron_core", "qalora_group_size"),
}


@dataclass(frozen=True)
class LoraWeights:
    """A plain LoRA adapter, by its files: each map W of its modules becomes W + scale * B A."""

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, "Tensor"] = field(repr=False)

    @property
    def rank(self) -> int:
        """Rank r of every module."""
        return int(self.config["r"])

    @property
    def scale(self) -> float:
        """``lora_alpha`` over rank."""
        return float(self.config["lora_alpha"]) / self.rank

    @property
    def targets(self) -> str | tuple[str, ...]:
        """A regular expression on module paths, or module names in order."""
        found = self.config["target_modules"]
        return found if isinstance(found, str) else tuple(sorted(found))

    @cached_property
    def modules(self) -> dict[str, tuple["Tensor", "Tensor"]]:
        """A of shape (r, I) and B of shape (O, r) by module path, in the order of the paths."""
        sides: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            match = _NAME.fullmatch(name)
            if match is None:
                raise self._refused(f"{name} is no LoRA weight; name another adapter")
            sides.setdefault(match["module"], {})[match["side"]] = tensor
        for module, pair in sides.items():
            shapes = [tuple(pair[side].shape) if side in pair else () for side in "AB"]
            if [len(s) for s in shapes] != [2, 2] or not shapes[0][0] == shapes[1][1] == self.rank:
                raise self._refused(
                    f"{module} has no A and B of rank {self.rank}; name another adapter"
                )
        return {module: (sides[module]["A"], sides[module]["B"]) for module in sorted(sides)}

    def _refused(self, problem: str) -> InputError:
        return InputError(f"{self.folder / WEIGHTS}: {problem}.")

    def check(self, base: "nn.Module", targets: str) -> None:
        """Every module of the base that the adapter's own pattern names has its weights.

        peft takes an adapter that lacks some, and what was forgotten is told again: here it is an
        ``InputError``. A skeleton of the base will do (``backbones.skeleton``).
        """
        from peft import LoraConfig
        from peft.tuners.tuners_utils import check_target_module_exists

        self.check_targets(targets)
        config = LoraConfig(target_modules=self.config["target_modules"])
        try:
            named = {
                name: tuple(getattr(getattr(module, "weight", None), "shape", ()))
                for name, module in base.named_modules()
                if check_target_module_exists(config, name)
            }
        except re.error:
            raise InputError(
                f"{self.folder / CONFIG}: target_modules is no regular expression; restore the "
                "adapter's files."
            ) from None
        found = {name: (b.shape[0], a.shape[1]) for name, (a, b) in self.modules.items()}
        faults = {
            "has no weights": named.keys() - found.keys(),
            "is no target module of the base": found.keys() - named.keys(),
            "has another shape than in the base": {
                name for name in named.keys() & found.keys() if named[name] != found[name]
            },
        }
        for fault, modules in faults.items():
            if modules:
                raise self._refused(
                    f"{min(modules)} {fault} (so {len(modules)} of {len(named)}); restore the "
                    "adapter's files, or name the base that it was trained on"
                )

    def check_targets(self, targets: str) -> None:
        """Refuse weights of modules that ``targets`` does not match: servers drop them silently."""
        for module in self.modules:
            if not re.fullmatch(targets, module):
                raise self._refused(
                    f"{module} is outside the language model; only an adapter of modules that "
                    f"match {targets} can be shipped"
                )


def read_adapter(folder: Path) -> LoraWeights:
    """Read an adapter folder; anything but two sound files of plain LoRA is an ``InputError``."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        there = sorted(path.name for path in folder.iterdir())
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(
            f"{folder}: {CONFIG} or {WEIGHTS} cannot be read ({type(error).__name__}); name a PEFT "
            "adapter folder with safetensors weights."
        ) from None
    surplus = [name for name in there if name not in FILES]
    if surplus:
        raise InputError(
            f"{folder}: {surplus[0]} is no part of an adapter; keep {CONFIG} and {WEIGHTS} only."
        )
    if not isinstance(config, dict) or not _is_lora(config):
        raise InputError(
            f"{folder / CONFIG}: is no LoRA configuration; name a PEFT adapter folder."
        )
    for key, value in config.items():
        # By what is known to be harmless: a new peft may have a setting that scales otherwise.
        if key not in _WITHOUT_EFFECT and (value not in _PLAIN[key] if key in _PLAIN else value):
            raise InputError(f"{folder / CONFIG}: {key} is set; only plain LoRA can be shipped.")
    return LoraWeights(folder, config, tensors)


def _is_lora(config: Mapping[str, Any]) -> bool:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    targets = config.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets
    numbers = isinstance(rank, int) and rank > 0 and isinstance(alpha, (int, float))
    return numbers and isinstance(names, list) and all(isinstance(name, str) for name in names)


def copy_adapter(source: Path, target: Path, base: str | None, revision: str) -> None:
    """Copy an adapter into a new folder, and write in its base's hub id, if any, and revision."""
    config = read_adapter(source).config
    target.mkdir(parents=True)
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    _write_config(target, {**config, "base_model_name_or_path": base, "revision": revision})


def rescaled(source: Path, target: Path, scale: float) -> None:
    """Write into a new folder an adapter that counts ``scale`` times as much, of the same weights.

    The folder appears whole or not at all. The weights are linked where the disk allows it, and
    not read: a study's driver, which does this, has no torch. ``OSError`` where there are none.
    """
    config = json.loads((source / CONFIG).read_text())
    with appearing(target, replace=True) as temporary:
        try:
            os.link(source / WEIGHTS, temporary / WEIGHTS)
        except OSError:
            shutil.copyfile(source / WEIGHTS, temporary / WEIGHTS)
        _write_config(temporary, {**config, "lora_alpha": config["lora_alpha"] * scale})


def concatenate(first: Path, second: Path, target: Path) -> None:
    """Write the one adapter that does what two on top of each other do.

    B1 A1 s1 + B2 A2 s2 = [s1 B1 | s2 B2] [A1; A2]: nothing is rounded but the products with the
    scales (peft's ``combination_type="cat"``). Other settings are the second's; other modules are
    an ``InputError``.
    """
    import torch
    from safetensors.torch import save_file

    parts = [read_adapter(folder) for folder in (first, second)]
    if parts[0].modules.keys() != parts[1].modules.keys():
        raise InputError(f"{second}: its modules are not those of {first}; keep the LoRA targets.")
    tensors: dict[str, Tensor] = {}
    for module in parts[0].modules:
        prefix = f"base_model.model.{module}.lora_"
        a_rI = [part.modules[module][0] for part in parts]
        b_Or = [part.scale * part.modules[module][1] for part in parts]
        tensors[f"{prefix}A.weight"] = torch.cat(a_rI)
        tensors[f"{prefix}B.weight"] = torch.cat(b_Or, dim=1)
    rank = parts[0].rank + parts[1].rank
    target.mkdir(parents=True)
    save_file(tensors, target / WEIGHTS, {"format": "pt"})
    (target / WEIGHTS).chmod(0o644)  # safetensors writes files that only their owner can read
    _write_config(target, {**parts[1].config, "r": rank, "lora_alpha": rank})


def _write_config(folder: Path, config: Mapping[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
