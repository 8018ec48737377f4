"""Fictitious people, their portraits, and what is asked about them."""

from collections import Counter
from dataclasses import asdict
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vgid.data.fictitious import (
    FACTS,
    PEOPLE,
    VALUES,
    biography,
    classification_questions,
    cloze_questions,
    forget_people,
    generation_questions,
    make_world,
    portrait,
    test_portrait,
    training_pairs,
)
from vgid.data.portraits import ATTRIBUTE_SIZES, PORTRAIT_SIZE, draw_portrait, random_face
from vgid.prompts import BLANK


@pytest.fixture(scope="module", params=[0, 7])
def world(request):
    return make_world(request.param)


def test_world_holds_distinct_people_of_three_kinds(world):
    assert Counter(person.kind for person in world.people) == PEOPLE
    assert len({person.name for person in world.people}) == len(world.people)
    ids = [person.id for person in world.people]
    assert ids == sorted(set(ids))
    assert all(len(i) == 4 and i.isdigit() for i in ids)


def test_any_two_faces_differ_in_five_attributes_or_more(world):
    faces = [list(asdict(person.face).values()) for person in world.people]
    differences = [
        sum(a != b for a, b in zip(x, y, strict=True)) for x, y in combinations(faces, 2)
    ]
    assert min(differences) >= 5


def test_people_follow_from_the_seed_alone():
    world = make_world(3)
    make_world.cache_clear()
    assert make_world(3) == world
    assert make_world(4) != world


def test_facts_come_from_the_known_values(world):
    for person in world.people:
        assert set(person.facts) == set(FACTS)
        assert person.facts["name"] == person.name
        assert all(person.facts[fact] in values for fact, values in VALUES.items())
        assert all(person.facts[fact] in biography(person) for fact in FACTS)


@pytest.mark.parametrize("seed", [0, 1])
def test_forget_people_are_nested(seed):
    sets = {ratio: forget_people(seed, ratio) for ratio in (5, 10, 15)}
    assert {ratio: len(ids) for ratio, ids in sets.items()} == {5: 5, 10: 10, 15: 15}
    assert set(sets[5]) < set(sets[10]) < set(sets[15])
    assert all(ids == sorted(ids) for ids in sets.values())
    everyone = {person.id for person in make_world(seed).of_kind("benchmark")}
    assert set(sets[15]) <= everyone


def test_generation_questions(world):
    for person in world.people[::10]:
        plain = generation_questions(person, paraphrased=False)
        other = generation_questions(person, paraphrased=True)
        assert Counter(form for _, _, form in plain) == {"image": 12, "text": 3}
        assert [x[1:] for x in plain] == [x[1:] for x in other]
        assert not {question for question, _, _ in plain} & {question for question, _, _ in other}
        for question, answer, form in plain + other:
            assert (person.name in question) == (form == "text")
            assert person.name in answer
        assert training_pairs(person) == [(q, a) for q, a, form in plain if form == "image"]


def test_cloze_questions_have_one_blank_and_no_answer_in_them(world):
    for person in world.people[::10]:
        for paraphrased in (False, True):
            questions = cloze_questions(person, paraphrased)
            assert Counter(form for _, _, form in questions) == {"image": 4, "text": 4}
            for question, answer, form in questions:
                assert question.count(BLANK) == 1
                assert answer in person.facts.values()
                assert answer not in question
                assert (person.name in question) == (form == "text")


def test_classification_questions_hold_the_right_option_once(world):
    letters = Counter()
    for person in world.people:
        rng = np.random.default_rng(int(person.id))
        questions = classification_questions(person, rng, paraphrased=False)
        assert Counter(form for *_, form in questions) == {"image": 5, "text": 5}
        for _, options, letter, _ in questions:
            assert list(options) == list("ABCD")
            assert len(set(options.values())) == 4
            assert [o for o in options.values() if o in person.facts.values()].count(
                options[letter]
            ) == 1
            letters[letter] += 1
    assert min(letters.values()) > 0.8 * max(letters.values())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.floats(0, 2))
def test_portraits_are_deterministic_rgb(seed, variation):
    face = random_face(np.random.default_rng(seed))
    assert all(0 <= value < ATTRIBUTE_SIZES[name] for name, value in asdict(face).items())
    first, second = (draw_portrait(face, np.random.default_rng(seed), variation) for _ in range(2))
    assert first.mode == "RGB"
    assert first.size == (PORTRAIT_SIZE, PORTRAIT_SIZE)
    assert first.tobytes() == second.tobytes()


def test_every_attribute_shows():
    base = random_face(np.random.default_rng(2))
    base = type(base)(**{**asdict(base), "style": 1, "hat": 0, "glasses": 0, "beard": 0})
    for name, size in ATTRIBUTE_SIZES.items():
        pictures = {
            draw_portrait(
                type(base)(**{**asdict(base), name: value}), np.random.default_rng(0), 0.0
            ).tobytes()
            for value in range(size)
        }
        assert len(pictures) == size, name


def test_pictures_of_a_person_vary_more_in_the_test_set(world):
    def distance(a, b):
        return np.abs(np.asarray(a, float) - np.asarray(b, float)).mean()

    people = world.people[:40]
    profile = [distance(portrait(0, p, 0), portrait(0, p, 1)) for p in people]
    test = [distance(portrait(0, p, 0), test_portrait(0, p, 0)) for p in people]
    strangers = [distance(portrait(0, p, 0), portrait(0, q, 0)) for p, q in pairwise(people)]
    assert 0 < np.mean(profile) < np.mean(test) < np.mean(strangers)
    assert portrait(0, people[0], 0).tobytes() == portrait(0, people[0], 0).tobytes()
    assert portrait(0, people[0], 0).tobytes() != portrait(1, people[0], 0).tobytes()
