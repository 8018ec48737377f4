"""Seeds: the numbers that scores which were kept before were made with."""

from vgid.deployment.scores import pick_seeds
from vgid.seeds import held_out_seed


def test_held_out_questions_have_a_seed_of_their_own_and_a_pick_counts_from_its_studys():
    assert (held_out_seed(7), held_out_seed(7, study=True)) == (8, 1_000_010)
    assert pick_seeds(7, 3) == (1_000_010, 1_000_011, 1_000_012)
