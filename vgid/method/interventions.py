"""The visual perturbations P_phi of VGID (paper section 3.3)."""

import numpy as np
from numpy.typing import NDArray

from vgid.config import NoiseType


def perturb(
    pixels_HWC: NDArray[np.uint8],
    noise_type: NoiseType,
    sigma: float | None,
    generator: np.random.Generator,
) -> NDArray[np.uint8]:
    """Perturb one 8-bit RGB image, at the resolution that the model sees: v' = P_phi(v).

    ``gaussian`` adds noise of standard deviation ``sigma`` (in units of the [0, 1] pixel range),
    which must be given, and clips; ``random`` and ``white`` replace the image with uniform noise or
    white.
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
