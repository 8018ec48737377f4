"""Qwen2.5-VL's processor, whose video processor needs torchvision, for images and text only."""

from typing import Any

from transformers import AutoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """``Qwen2_5_VLProcessor`` without a video processor."""

    # What the constructor names is what ``from_pretrained`` loads.
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def processor_class(model_type: str) -> Any:
    """The class whose ``from_pretrained`` loads the processor of a configuration's model type."""
    # Not by ``AutoProcessor.register``: the stock class, named in a hub's folder, comes first.
    if model_type == "qwen2_5_vl" and not is_torchvision_available():
        return ImageOnlyQwenProcessor
    return AutoProcessor
