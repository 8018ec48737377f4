"""Portraits changed: the teacher's perturbations P_phi (paper section 3.3), the student's views.

Views are shown in turn with the portrait: a person is to be forgotten, not a picture. With ranges
nearly twice as large the original itself was less forgotten (``search_spaces/README.md``).
"""

from math import cos, radians, sin

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vgid.config import NoiseType
from vgid.seeds import image_digest, sample_generator

MAX_TURN = 6.0  # degrees to either side
MAX_SCALING = 0.07
MAX_SHIFT = 0.05  # in widths and heights of the image
MAX_BRIGHTNESS = 0.12
MAX_TINT = 0.05  # of each colour channel on its own


def perturb(
    pixels_HWC: NDArray[np.uint8],
    noise_type: NoiseType,
    sigma: float | None,
    generator: np.random.Generator,
) -> NDArray[np.uint8]:
    """Perturb one 8-bit RGB image, at the resolution that the model sees: v' = P_phi(v).

    ``gaussian`` adds noise of deviation ``sigma`` (in units of the [0, 1] pixel range), which must
    be given, and clips; ``random`` and ``white`` replace the image with uniform noise or white.
    """
    match noise_type:
        case "white":
            return np.full_like(pixels_HWC, 255)
        case "random":
            return generator.integers(0, 256, pixels_HWC.shape, dtype=np.uint8)
        case "gaussian":
            if sigma is None:
                raise ValueError("Gaussian noise needs a sigma")
            # Rounded to 8 bits: the teacher sees a picture that a camera could have given.
            noisy = pixels_HWC / 255.0 + sigma * generator.standard_normal(pixels_HWC.shape)
            return np.rint(noisy.clip(0.0, 1.0) * 255.0).astype(np.uint8)


def portrait_view(image: Image.Image, number: int, seed: int) -> Image.Image:
    """View ``number`` of an RGB portrait, of its size, drawn by ``seed``; 0 is the portrait."""
    if number == 0:
        return image
    generator = sample_generator(seed, f"view {number} of {image_digest(image)}")

    def draw(reach: float) -> float:
        return float(generator.uniform(-reach, reach))

    angle, scale = radians(draw(MAX_TURN)), 1.0 + draw(MAX_SCALING)
    shift_x, shift_y = draw(MAX_SHIFT) * image.width, draw(MAX_SHIFT) * image.height
    light = (1.0 + draw(MAX_BRIGHTNESS)) * (1.0 + np.array([draw(MAX_TINT) for _ in range(3)]))
    # Pillow wants the way back, from a pixel of the view to one of the portrait with its border.
    # More than the largest turn, scaling and shift together reach, so a view never shows beyond it.
    border = max(image.size) // 4
    pixels_HWC = np.asarray(image)
    wide_HWC = np.pad(pixels_HWC, ((border, border), (border, border), (0, 0)), mode="edge")
    a, b = cos(angle) / scale, sin(angle) / scale
    middle_x, middle_y = image.width / 2, image.height / 2
    x, y = middle_x + shift_x, middle_y + shift_y
    back = (
        a, b, middle_x - a * x - b * y + border,
        -b, a, middle_y + b * x - a * y + border,
    )  # fmt: skip
    moved = Image.fromarray(wide_HWC).transform(
        image.size, Image.Transform.AFFINE, back, Image.Resampling.BILINEAR
    )
    lit_HWC = np.asarray(moved, dtype=np.float64) * light
    return Image.fromarray(np.rint(lit_HWC.clip(0, 255)).astype(np.uint8))
