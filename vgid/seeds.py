"""Where randomness and names of images come from: the seed and the sample, never an order."""

import hashlib

import numpy as np
from PIL import Image


def image_digest(image: Image.Image) -> str:
    """SHA-256 of an image's mode, size and pixels: what it is called, and what seeds its noise."""
    return hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest()


def sample_generator(seed: int, sample_id: str) -> np.random.Generator:
    """A generator that depends on the seed and the sample only, never on batch order."""
    # Not `hash`, which differs from process to process.
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))


def held_out_seed(seed: int, study: bool = False) -> int:
    """The seed of held-out few-shot people, test poses and bootstrap: another than the trials'."""
    # Where a study scores its front, or a pick what it chooses from, far off: no session's own seed
    # nearby is met, nor any of the seeds that a pick counts up from it.
    return seed + (1_000_003 if study else 1)
