"""Merges an adapter into its base: safetensors in, safetensors out, one shard in memory at a time.

Names, dtypes and shards stay the base's, so that whatever loads the base loads what is merged.

Shape legend: r rank, I inputs and O outputs of a linear map.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgid.adapter_files import LoraWeights
from vgid.errors import InputError

INDEX = "model.safetensors.index.json"
LANGUAGE_MODEL = "language_model."

_COPIED = (".json", ".jinja", ".txt", ".model")
_RECORDS = ("MEASURED.json", "finetuned.json")
"""How the base was made; no part of what is merged."""


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
    shards = _shards(base)
    places = _places(base, shards, adapter.modules)
    for shard in shards:
        with safe_open(base / shard, "pt") as file:
            names = list(file.keys())
            if not places.keys() & set(names):
                shutil.copyfile(base / shard, output / shard)
                continue
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata()
        for name in names:
            if name in places:
                tensors[name] = _merged(tensors[name], adapter, places[name])
        save_file(tensors, output / shard, metadata)
    for path in sorted(base.iterdir()):
        if path.suffix in _COPIED and path.name not in _RECORDS:
            shutil.copyfile(path, output / path.name)
    for path in output.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def _merged(weight_OI: Tensor, adapter: LoraWeights, module: str) -> Tensor:
    a_rI, b_Or = adapter.modules[module]
    if weight_OI.shape != (b_Or.shape[0], a_rI.shape[1]):
        raise InputError(
            f"{adapter.folder}: {module} has another shape than in the base; name the base that "
            "the adapter was trained on with --model-path."
        )
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


def _places(base: Path, shards: Iterable[str], modules: Iterable[str]) -> dict[str, str]:
    """The module of each weight that changes, by the weight's name in the files.

    Files on the hub keep names of older releases (``language_model.model.layers.0`` or
    ``model.layers.0`` for what is now ``model.language_model.layers.0``), so a module is found by
    its path within the language model.
    """
    names: list[str] = []
    for shard in shards:
        with safe_open(base / shard, "pt") as file:
            names += file.keys()
    places: dict[str, str] = {}
    for module in modules:
        tail = f"{module.rpartition(LANGUAGE_MODEL)[2]}.weight"
        found = [
            name
            for name in names
            if (name == tail or name.endswith(f".{tail}")) and "vis" not in name.removesuffix(tail)
        ]
        if len(found) != 1:
            raise InputError(
                f"{base}: {module} of the adapter is {len(found)} times in the weights; name the "
                "base that the adapter was trained on with --model-path."
            )
        places[found[0]] = module
    return places
