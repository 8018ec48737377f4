from math import cos, radians, sin

import numpy as np
import pytest
from PIL import Image

from vgid.method import interventions as views
from vgid.method.interventions import portrait_view
from vgid.seeds import image_digest, sample_generator


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth in part and with edges, so that a wrong half pixel shows."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def sampled(pixels_HWC: np.ndarray, x: float, y: float) -> np.ndarray:
    """Bilinear, coordinates of pixel centres at .5, clamped at the border."""
    height, width, _ = pixels_HWC.shape
    x, y = x - 0.5, y - 0.5
    left, top = int(np.floor(x)), int(np.floor(y))
    total = np.zeros(3)
    for row, by in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, bx in ((left, 1 - (x - left)), (left + 1, x - left)):
            at = pixels_HWC[min(max(row, 0), height - 1), min(max(column, 0), width - 1)]
            total += by * bx * at
    return total


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_a_view_is_the_inverse_of_turn_scale_shift_then_light(size):
    """Against the forward matrix, inverted by numpy, and bilinear sampling written out here."""
    portrait = picture(*size)
    width, height = size
    rng = sample_generator(7, f"view 2 of {image_digest(portrait)}")
    angle = radians(rng.uniform(-views.MAX_TURN, views.MAX_TURN))
    scale = 1 + rng.uniform(-views.MAX_SCALING, views.MAX_SCALING)
    x, y = rng.uniform(-views.MAX_SHIFT, views.MAX_SHIFT, 2) * size
    light = 1 + rng.uniform(-views.MAX_BRIGHTNESS, views.MAX_BRIGHTNESS)
    tint = 1 + rng.uniform(-views.MAX_TINT, views.MAX_TINT, 3)

    def move(dx, dy):
        return np.array([[1, 0, dx], [0, 1, dy], [0, 0, 1.0]])

    turn = np.array([[cos(angle), -sin(angle), 0], [sin(angle), cos(angle), 0], [0, 0, 1.0]])
    forward = move(width / 2 + x, height / 2 + y) @ turn @ np.diag([scale, scale, 1])
    back = np.linalg.inv(forward @ move(-width / 2, -height / 2))
    pixels = np.asarray(portrait, dtype=np.float64)
    expected = np.array(
        [
            [sampled(pixels, *(back @ [i + 0.5, j + 0.5, 1])[:2]) for i in range(width)]
            for j in range(height)
        ]
    )
    expected = (expected * light * tint).clip(0, 255)
    found = np.asarray(portrait_view(portrait, 2, seed=7), dtype=np.float64)
    # Pillow cuts off to 8 bits before the light, which at most adds a sixth; then it is rounded.
    assert np.abs(found - expected).max() < 1.75
    assert np.abs(found - pixels).mean() > 3


def test_view_0_is_the_portrait():
    portrait = picture(32, 32)
    assert portrait_view(portrait, 0, seed=3) is portrait


def test_a_view_depends_on_portrait_number_and_seed_only():
    portrait, other = picture(32, 32), picture(32, 32, seed=1)
    view = portrait_view(portrait, 1, seed=0)
    assert (view.mode, view.size) == ("RGB", (32, 32))
    portrait_view(other, 1, seed=0)
    assert portrait_view(portrait.copy(), 1, seed=0).tobytes() == view.tobytes()
    found = [(portrait, 2, 0), (portrait, 1, 1), (portrait, 3, 0)]
    assert len({portrait_view(*each).tobytes() for each in found} | {view.tobytes()}) == 4


def test_a_flat_portrait_stays_flat_up_to_the_border():
    flat = Image.new("RGB", (40, 24), (90, 120, 60))
    for number in range(1, 20):
        pixels = np.asarray(portrait_view(flat, number, seed=0))
        assert (pixels == pixels[0, 0]).all()
        change = pixels[0, 0] / np.array([90, 120, 60])
        assert (
            np.abs(change - 1) <= (1 + views.MAX_BRIGHTNESS) * (1 + views.MAX_TINT) - 1 + 0.01
        ).all()
