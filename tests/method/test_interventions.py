import numpy as np
import pytest

from vgid.method.interventions import perturb
from vgid.seeds import sample_generator

IMAGE = np.random.default_rng(0).integers(60, 200, (64, 48, 3), dtype=np.uint8)


def noise(kind, sigma=None, seed=0, sample="a"):
    return perturb(IMAGE, kind, sigma, sample_generator(seed, sample))


def test_white_replaces_everything():
    assert (noise("white") == 255).all()


def test_random_replaces_the_image_with_uniform_noise():
    pixels = np.stack([noise("random", sample=str(i)) for i in range(20)]) / 255.0
    assert pixels.mean() == pytest.approx(0.5, abs=0.005)
    assert pixels.std() == pytest.approx((1 / 12) ** 0.5, abs=0.005)
    correlation = np.corrcoef(pixels[0].ravel(), IMAGE.ravel())[0, 1]
    assert abs(correlation) < 0.05


@pytest.mark.parametrize("sigma", [0.05, 0.1])
def test_gaussian_adds_noise_of_the_given_deviation_in_pixel_units(sigma):
    grey = np.full((200, 200, 3), 128, dtype=np.uint8)
    noisy = perturb(grey, "gaussian", sigma, sample_generator(0, "a")) / 255.0
    assert noisy.std() == pytest.approx(sigma, rel=0.02)
    assert noisy.mean() == pytest.approx(128 / 255, abs=0.002)


def test_gaussian_clips_to_the_pixel_range():
    noisy = noise("gaussian", 2.0)
    assert noisy.dtype == np.uint8
    assert (noisy == 0).mean() > 0.2
    assert (noisy == 255).mean() > 0.2


def test_gaussian_without_sigma_is_refused():
    with pytest.raises(ValueError, match="sigma"):
        noise("gaussian")


@pytest.mark.parametrize("kind", ["random", "gaussian"])
def test_noise_depends_on_seed_and_sample_only(kind):
    sigma = 0.5 if kind == "gaussian" else None
    first = noise(kind, sigma)
    noise(kind, sigma, sample="other")
    assert (noise(kind, sigma) == first).all()
    assert (noise(kind, sigma, sample="b") != first).any()
    assert (noise(kind, sigma, seed=1) != first).any()
    assert first.shape == IMAGE.shape


def test_the_image_itself_is_left_alone():
    before = IMAGE.copy()
    for kind in ("random", "gaussian", "white"):
        noise(kind, 0.5 if kind == "gaussian" else None)
    assert (before == IMAGE).all()
