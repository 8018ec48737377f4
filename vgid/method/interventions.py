"""The visual perturbations P_phi of VGID (paper section 3.3).

A perturbation acts on pixels in [0, 1], before normalisation, at the resolution that the model
sees (after the processor's resize), so that sigma means the same for every image. The released
script adds its noise in normalised space instead; ``TrialConfig.released`` reproduces that.
"""

import numpy as np
from numpy.typing import NDArray

from vgid.config import NoiseType


def perturb(
    pixels_HWC: NDArray[np.uint8],
    noise_type: NoiseType,
    sigma: float | None,
    generator: np.random.Generator,
) -> NDArray[np.uint8]:
    """Perturb one image: v' = P_phi(v), paper section 3.3.

    Args:
        pixels_HWC: 8-bit RGB image of shape (height, width, 3).
        noise_type: ``gaussian`` adds noise of standard deviation sigma and clips to [0, 1];
            ``random`` replaces the image with uniform noise; ``white`` replaces it with white.
        sigma: in units of the [0, 1] pixel range; None unless Gaussian.
        generator: source of the noise, see ``sample_generator``.

    Returns:
        8-bit RGB image of the same shape.

    Raises:
        ValueError: sigma missing for Gaussian noise.
    """
    match noise_type:
        case "white":
            return np.full_like(pixels_HWC, 255)
        case "random":
            return generator.integers(0, 256, pixels_HWC.shape, dtype=np.uint8)
        case "gaussian":
            if sigma is None:
                raise ValueError("Gaussian noise needs a sigma")
            # Clipped and rounded to 8 bits: the teacher sees a picture that a camera could have
            # given, and none that only a processor could be fed with.
            noisy = pixels_HWC / 255.0 + sigma * generator.standard_normal(pixels_HWC.shape)
            return np.rint(noisy.clip(0.0, 1.0) * 255.0).astype(np.uint8)
