"""Merges an adapter into its base: safetensors in, safetensors out, one shard in memory at a time.

Dtypes and shards stay the base's, and names are the hub's (``vgid.models.weight_names``), so that
whatever loads the public base loads what is merged.

Shape legend: r rank, I inputs and O outputs of a linear map.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgid.errors import InputError
from vgid.models.adapter_files import LoraWeights
from vgid.models.backbones import skeleton
from vgid.models.weight_names import WeightNames

INDEX = "model.safetensors.index.json"

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
