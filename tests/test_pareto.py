"""Front and hypervolume against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from vgid.pareto import flat_since, front_mask, hypervolume

# Few distinct values, so that ties and duplicates are common.
GRID = st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0])
POINTS = st.tuples(st.integers(1, 7), st.integers(1, 3)).flatmap(
    lambda shape: arrays(np.float64, shape, elements=GRID)
)


def brute_front(points):
    return [
        not any((other >= point).all() and (other > point).any() for other in points)
        for point in points
    ]


def brute_hypervolume(points, reference):
    """Inclusion and exclusion over all subsets of the points' boxes."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for subset in itertools.combinations(points, size):
            sides = np.min(subset, axis=0) - reference
            if (sides > 0).all():
                total += (-1) ** (size + 1) * np.prod(sides)
    return total


@given(POINTS)
@settings(deadline=None)
def test_front_is_what_nothing_dominates(points):
    assert front_mask(points).tolist() == brute_front(points)


@given(POINTS, st.sampled_from([-0.5, 0.0, 0.25, 0.6]))
@settings(deadline=None)
def test_hypervolume_is_the_volume_of_the_union_of_boxes(points, corner):
    reference = np.full(points.shape[1], corner)
    assert hypervolume(points, reference) == pytest.approx(
        brute_hypervolume(points, reference), abs=1e-12
    )


@given(POINTS)
@settings(deadline=None)
def test_the_front_alone_holds_the_whole_volume(points):
    reference = np.full(points.shape[1], -0.1)
    assert hypervolume(points[front_mask(points)], reference) == pytest.approx(
        hypervolume(points, reference), abs=1e-12
    )


def test_every_copy_of_a_front_point_is_on_the_front():
    assert front_mask([[1, 0], [0, 1], [1, 0], [0, 0]]).tolist() == [True, True, True, False]


def test_nan_and_infinity_are_never_on_the_front_and_add_nothing():
    points = [[np.nan, 9.0], [0.5, 0.5], [np.inf, 0.0], [0.2, -np.inf]]
    assert front_mask(points).tolist() == [False, True, False, False]
    assert hypervolume(points, [0.0, 0.0]) == 0.25
    assert front_mask([[np.nan, np.nan]]).tolist() == [False]


def test_no_points():
    assert front_mask(np.empty((0, 2))).shape == (0,)
    assert hypervolume(np.empty((0, 2)), [0.0, 0.0]) == 0.0


def test_points_below_or_level_with_the_reference_add_nothing():
    assert hypervolume([[0.5, 0.0], [-1.0, 3.0]], [0.0, 0.0]) == 0.0


@pytest.mark.parametrize("points", [[1.0, 2.0], 3.0, [[[1.0]]]])
def test_wrong_shapes_are_refused(points):
    with pytest.raises(ValueError, match="shape"):
        front_mask(points)


@pytest.mark.parametrize("reference", [[0.0], [0.0, np.nan], 0.0])
def test_wrong_reference_is_refused(reference):
    with pytest.raises(ValueError, match="reference point"):
        hypervolume([[1.0, 1.0]], reference)


@given(st.lists(st.integers(0, 20), max_size=12))
def test_a_front_is_flat_since_the_first_trial_that_leaves_a_two_hundredth_to_gain(gains):
    volumes = np.cumsum(gains).astype(float).tolist()
    since = flat_since(volumes)
    left = [volumes[-1] - volume for volume in [0.0, *volumes]] if volumes else [0.0]
    bar = 0.005 * (volumes[-1] if volumes else 0.0)
    assert left[since] <= bar
    assert since <= 1 or left[since - 1] > bar
