"""What many tests share: a small LLaVA of random weights, which needs no training."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from vgid.models.backbones import Backbone, spec

ONE_STUDY = ("test_pick.py", "test_pick_refusals.py", "test_pick_comparison.py", "test_notebook.py")
"""Files of ``tests/deployment`` whose tests need its study, which takes a minute to make."""

FIRST = ("tests/test_trial.py", "tests/test_shared_trial.py")
"""The long files of this folder, whose others come last and are short."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Short files are last, so that both processes of ``make test`` end together."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


class SharedStudies(LoadFileScheduling):
    """A file's tests share a process, and so do all tests of the files in ``ONE_STUDY``."""

    def _split_scope(self, nodeid: str) -> str:
        file = str(super()._split_scope(nodeid))
        return "one study" if file.endswith(ONE_STUDY) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> SharedStudies:
    """How ``pytest --numprocesses 2`` deals the tests out."""
    return SharedStudies(config, log)


def make_random_backbone(seed: int = 0) -> Backbone:
    """tiny-llava's classes and sizes with random weights, large enough to give varied answers."""
    from vgid.bases.tiny_llava import build_tokenizer, corpus, processor, untrained

    tokenizer = build_tokenizer(corpus())
    model = untrained("tiny-llava", tokenizer, seed=seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "vision" not in name:
                parameter.mul_(5.0)
    model.requires_grad_(False)
    return Backbone(
        spec("tiny-llava"),
        model.eval(),
        processor("tiny-llava", tokenizer),
        f"random weights {seed}",
    )


@pytest.fixture(scope="module")
def random_backbone() -> Backbone:
    return make_random_backbone()
