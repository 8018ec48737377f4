"""What a study amounts to while its trials end one by one, against all of them at once."""

import random
from dataclasses import replace
from datetime import datetime, timedelta

import pytest

from vgid.config import StudyConfig, TrialConfig
from vgid.pareto import front_mask, hypervolume
from vgid.requirement import OBJECTIVES
from vgid.results import Harvested, Score, TrialResult
from vgid.study.console import Standing
from vgid.study.ledger import Header, Ledger, now, trial_id
from vgid.study.outcome import Scoreboard, said_of_growth, shortfall

STATUSES = ("completed", "pruned", "failed", "lost")
NOWHERE = (float("nan"), float("nan"))


@pytest.fixture
def ledger(tmp_path, request):
    with Ledger(tmp_path / "s") as made:
        config = StudyConfig(
            output=tmp_path / "s", objectives=getattr(request, "param", OBJECTIVES)
        )
        made.begin(Header(study_id="s", config=config, search_space_sha256="", started=now()))
        yield made


def end(ledger, number, rng, scales=()):
    """End a trial with coarse scores, so that ties are common; some fail."""
    name = trial_id(number)
    ledger.start(name, TrialConfig())
    failed = rng.random() < 0.2
    objectives = ledger.header.config.objectives
    scores = {objective: rng.randint(0, 9) / 10 for objective in objectives}
    scores_of = {n: Score(value=v, n=9, low=v, high=v) for n, v in scores.items()}
    status = rng.choice(("failed", "pruned")) if failed else "completed"
    harvest = [
        Harvested(
            scale=scale,
            metrics={name: rng.randint(0, 9) / 10 for name in objectives},
            scores=scores_of,
        )
        for scale in scales
    ]
    return ledger.end(
        name,
        TrialResult(trial_id=name, status=status)
        if failed
        else TrialResult(
            trial_id=name, status=status, metrics=scores, scores=scores_of, harvest=harvest
        ),
    )


def test_board_agrees_at_any_moment_with_what_all_trials_say_and_with_a_resumed_one(ledger):
    rng = random.Random(0)
    board = Scoreboard(ledger)
    assert (board.trials(), board.front(), board.hypervolume) == ([], [], None)
    assert board.history == []
    volumes = []
    board.base["search"] = {"retain_rougeL": Score(value=0.9, n=1, low=0.9, high=0.9)}
    order = rng.sample(range(9_990, 10_020), 30)  # trials end in any order
    for number in order:
        ended = board.add(end(ledger, number, rng))
        trials = board.trials()
        points = [trial.point or NOWHERE for trial in trials]
        marks = front_mask(points).tolist()
        assert [trial.on_front for trial in trials] == marks
        named = {t.result.trial_id: t.on_front for t in trials}
        assert ended.on_front == named[ended.result.trial_id]
        ids = [name for name, on_front in named.items() if on_front]
        assert [t.result.trial_id for t in board.front()] == sorted(ids, key=int)
        board.show_on(standing := Standing(30))
        assert standing.front == sum(marks)
        statuses = [trial.result.status for trial in trials]
        assert board.counts() == {s: statuses.count(s) for s in STATUSES}
        assert board.hypervolume == hypervolume(points, (0.0, 0.45))
        volumes.append(board.hypervolume)
    assert board.growth == volumes
    start, *ends = (
        datetime.fromisoformat(time)
        for time in (ledger.header.started, *sorted(r.ended for r in ledger.ended))
    )
    assert board.history == [
        ((end - start) / timedelta(seconds=1), volume)
        for end, volume in zip(ends, volumes, strict=True)
    ]
    resumed = Scoreboard(ledger)
    resumed.base = board.base
    assert resumed.trials() == board.trials()
    assert resumed.hypervolume == board.hypervolume
    assert sorted(resumed.growth) == resumed.growth  # the clock does not part all trials' ends


@pytest.mark.parametrize(
    "ledger", [("forget_rougeL_reduction", "retain_rougeL", "test_rougeL")], indirect=True
)
def test_three_objectives_of_which_one_is_to_be_small(ledger):
    rng = random.Random(3)
    board = Scoreboard(ledger)
    base = {"retain_rougeL": 0.9, "forget_rougeL": 0.8, "test_rougeL": 0.7}
    board.base["search"] = {n: Score(value=v, n=1, low=v, high=v) for n, v in base.items()}
    for number in range(40):
        board.add(end(ledger, number, rng, scales=(0.5,)))
    every = [each for each in board.candidates(board.trials()) if each.result.metrics]
    scores = {t.result.trial_id: tuple(t.result.metrics.values()) for t in every}

    def beats(one, other):
        better = one[0] >= other[0], one[1] >= other[1], one[2] <= other[2]
        return all(better) and one != other

    front = {n for n, s in scores.items() if not any(beats(o, s) for o in scores.values())}
    assert {each.result.trial_id for each in board.front()} == front
    # Scores are tenths: the volume is that of the small boxes that some trial beats.
    tiny = 1e-9
    boxes = sum(
        any(x <= a + tiny and y <= b + tiny and z <= 0.7 - c + tiny for a, b, c in scores.values())
        for x in (i / 10 for i in range(1, 11))
        for y in ((45 + 5 * i) / 100 for i in range(1, 11))
        for z in (i / 10 for i in range(1, 8))
    )
    assert board.reference_point == (0.0, 0.45, -0.7)
    assert board.hypervolume == pytest.approx(boxes * 0.1 * 0.05 * 0.1, abs=1e-9)


def test_held_out_scores_stand_with_their_trial(ledger):
    board = Scoreboard(ledger)
    rng = random.Random(1)
    for number in range(8):
        board.add(end(ledger, number, rng))
    name = board.front()[0].result.trial_id
    board.held_out[name] = {"retain_rougeL": Score(value=0.8, n=1, low=0.8, high=0.8)}
    assert {t.result.trial_id for t in board.trials() if t.held_out} == {name}


def test_lost_trials_stand_among_the_ended_ones_until_they_end(ledger):
    board = Scoreboard(ledger)
    rng = random.Random(2)
    for number in (0, 2):
        board.add(end(ledger, number, rng))
    ledger.start("0001", TrialConfig(alpha=0.7))
    board.lost["0001"] = "its disk is full"
    lost = board.trials()[1]
    assert (lost.result.status, lost.result.error) == ("lost", "its disk is full")
    assert (lost.config.alpha, lost.on_front) == (0.7, False)
    assert board.counts()["lost"] == 1
    board.add(ledger.end("0001", TrialResult(trial_id="0001", status="pruned")))
    assert [t.result.trial_id for t in board.trials()] == ["0000", "0001", "0002"]
    assert board.counts()["lost"] == 0


def test_scores_with_their_intervals_stay_on_disk_but_for_the_front(ledger, tmp_path):
    rng = random.Random(2)
    board = Scoreboard(ledger)
    for number in range(12):
        board.add(end(ledger, number, rng))
    ledger.close()
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), "")
        for held, shown in ((ledger, board), (again, Scoreboard(again))):
            assert not any(record.result.scores for record in held.ended)
            for trial in shown.with_scores(shown.trials()):
                scores = trial.result.scores
                assert {n: s.value for n, s in scores.items()} == (
                    trial.result.metrics if trial.on_front else {}
                )


def scored(ledger, board, name, reduction, retain=0.9):
    """End a trial with these two scores."""
    ledger.start(name, TrialConfig())
    metrics = dict(zip(OBJECTIVES, (reduction, retain), strict=True))
    board.add(ledger.end(name, TrialResult(trial_id=name, status="completed", metrics=metrics)))


def test_a_front_is_flat_once_so_many_trials_have_added_next_to_nothing(ledger):
    board = Scoreboard(ledger)
    scored(ledger, board, "0000", 0.5)
    assert not board.is_flat(1)  # nobody knows yet what the volume is counted from
    board.base["search"] = {"retain_rougeL": Score(value=1.0, n=1, low=1.0, high=1.0)}
    scored(ledger, board, "0001", 0.8)
    assert not board.is_flat(1)
    for name, reduction in (("0002", 0.7), ("0003", 0.802), ("0004", 0.1)):
        scored(ledger, board, name, reduction)
    assert board.is_flat(3)
    assert not board.is_flat(4)
    assert not board.is_flat(None)
    scored(ledger, board, "0005", 0.9)
    assert not board.is_flat(1)


def test_a_trial_out_of_bounds_is_not_on_the_front(ledger):
    board = Scoreboard(ledger)
    board.base["search"] = {"retain_rougeL": Score(value=1.0, n=1, low=1.0, high=1.0)}
    for name, reduction, missed in (("0000", 0.9, 0.1), ("0001", 0.5, 0.0), ("0002", 0.4, -0.2)):
        ledger.start(name, TrialConfig())
        metrics = dict.fromkeys(OBJECTIVES, 0.9) | {OBJECTIVES[0]: reduction}
        bound = {"forget_cloze<=0.3": missed}
        board.add(
            ledger.end(
                name, TrialResult(trial_id=name, status="completed", metrics=metrics, missed=bound)
            )
        )
    for shown in (board, Scoreboard(ledger)):
        assert [trial.result.trial_id for trial in shown.front()] == ["0001"]
    assert board.hypervolume == hypervolume([(0.5, 0.9)], (0.0, 0.5))
    assert shortfall(board.trials(), None, {}) is None
    nearest = shortfall(board.trials()[:1], None, {})
    assert "the nearest, 0000, misses forget_cloze<=0.3 by 0.100" in nearest


def test_a_study_is_not_flat_while_it_has_found_nothing(ledger):
    board = Scoreboard(ledger)
    board.base["search"] = {"retain_rougeL": Score(value=1.0, n=1, low=1.0, high=1.0)}
    for name in ("0000", "0001", "0002"):
        scored(ledger, board, name, -0.1)
    assert not board.is_flat(1)


def test_a_sentence_says_whether_more_trials_are_worth_it():
    assert said_of_growth([]) is None
    assert said_of_growth([0.0, 0.0]) is None
    flat = said_of_growth([0.1, 0.4, 0.4, 0.401, 0.401, 0.401])
    assert flat.startswith("The front is flat: the last 4 of 6 trials added")
    assert "still grew at trial 2 of 5" in said_of_growth([0.1, 0.4, 0.4, 0.4, 0.4])


def test_the_front_is_that_of_all_candidates_and_each_is_a_trial_of_its_own_scale(ledger, tmp_path):
    rng = random.Random(5)
    board = Scoreboard(ledger)
    board.base["search"] = {"retain_rougeL": Score(value=0.9, n=1, low=0.9, high=0.9)}
    for number in range(12):
        board.add(end(ledger, number, rng, scales=(0.5, 1.25)))
        trials = board.trials()
        candidates = board.candidates(trials)
        completed = [trial for trial in trials if trial.result.status == "completed"]
        assert len(candidates) == len(trials) + 2 * len(completed)
        points = [candidate.point or NOWHERE for candidate in candidates]
        marks = front_mask(points).tolist()
        assert [candidate.on_front for candidate in candidates] == marks
        assert board.hypervolume == hypervolume(points, (0.0, 0.45))
        front = [c for c, on_front in zip(candidates, marks, strict=True) if on_front]
        assert board.front() == front
    harvested = [candidate for candidate in front if candidate.is_harvested]
    assert {c.config.adapter_scale for c in candidates if c.is_harvested} == {0.5, 1.25}
    assert harvested and all(c.result.trial_id.endswith(("x0.5", "x1.25")) for c in harvested)
    name = harvested[0].result.trial_id
    board.held_out[name] = {"retain_rougeL": Score(value=0.8, n=1, low=0.8, high=0.8)}
    assert [c.result.trial_id for c in board.candidates(board.trials()) if c.held_out] == [name]
    # In memory without their intervals, which the front's get back from the disk.
    assert not any(each.scores for r in ledger.ended for each in r.result.harvest)
    assert all(c.result.scores for c in board.with_scores(board.front()))
    ledger.close()
    with Ledger(tmp_path / "s") as again:
        again.resume(StudyConfig(output=tmp_path / "s"), "")
        assert Scoreboard(again).front() == [replace(c, held_out=None) for c in board.front()]
