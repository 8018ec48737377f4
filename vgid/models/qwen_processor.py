"""Qwen2.5-VL's processor where torchvision is not installed: the same, for images and text only.

The stock processor insists on a video processor, and that on torchvision. Nothing here shows
videos.
"""

from typing import Any

from transformers import AutoProcessor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

MODEL_TYPE = "qwen2_5_vl"


class ImageOnlyQwenProcessor(Qwen2_5_VLProcessor):
    """``Qwen2_5_VLProcessor`` without a video processor.

    Args:
        image_processor: for instance a ``Qwen2VLImageProcessorPil``.
        tokenizer: with Qwen's special tokens.
        chat_template: as in the stock class.
    """

    # What the constructor names is what ``from_pretrained`` loads.
    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def processor_class(model_type: str) -> Any:
    """The class whose ``from_pretrained`` loads a model's processor.

    ``AutoProcessor.register`` could not do it: a folder from the hub names the stock class, and
    that name comes before any that was registered.

    Args:
        model_type: the one in the model's configuration.

    Returns:
        ``AutoProcessor``, except for Qwen2.5-VL without torchvision.
    """
    if model_type == MODEL_TYPE and not is_torchvision_available():
        return ImageOnlyQwenProcessor
    return AutoProcessor
