"""The replay of warm starts, against the samplers' benchmark."""

from itertools import pairwise

from tests.benchmarks import samplers, warm_start


def test_without_a_prior_it_is_the_samplers_study_and_a_random_one_hears_nothing():
    space = samplers.spaces()["sigma conditional"]
    found = warm_start.studies(space, "random", 1)
    plain = samplers.study(space, "random", 1, warm_start.AFTER).missing
    for given, missing in found.items():
        assert (missing == plain) == (given == "no prior" or given.endswith("told")), given
        assert all(later <= sooner for sooner, later in pairwise(missing))
    assert found["wrong, 4 settings"][0] > found["wrong, 2 settings"][0] > plain[0]
