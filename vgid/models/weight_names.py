"""What weights are called in files: by the names of the hub, which servers such as vLLM read."""

from pathlib import Path
from typing import Any


def save_weights(model: Any, folder: Path, weights: dict[str, Any] | None = None) -> None:
    """``save_pretrained`` with the names of the hub's files; ``weights`` stand for the model's."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    # Left alone it is what the model's own file needed: nothing, for a new model.
    model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(folder, state_dict=weights)


class WeightNames:
    """Both names of each weight of a model, of which a skeleton is enough."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import rename_source_key

        self._renamed = rename_source_key
        self._prefix = model.base_model_prefix
        self._weights = model.state_dict()
        self._reading = get_model_conversion_mapping(model)
        known = get_model_conversion_mapping(model, add_legacy=False)
        self._writing = [conversion.reverse_transform() for conversion in reversed(known)]

    def in_model(self, name: str) -> str:
        """A weight's name in the model, by that in a file of any release of transformers."""
        return str(self._renamed(name, self._reading, [], self._prefix, self._weights)[0])

    def on_hub(self, name: str) -> str:
        """A weight's name in the hub's files; what is no weight of the model keeps its name."""
        inner = self.in_model(name)
        if inner not in self._weights:
            return name
        return str(self._renamed(inner, self._writing, [], reverse=True)[0])
