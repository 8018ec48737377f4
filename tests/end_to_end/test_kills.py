"""A study of which each kind of process is killed ends complete; after its node, by a resume."""

import json
from typing import Any

from tests.end_to_end.light import LightStudy
from vgid.requirement import OBJECTIVES
from vgid.study.halving import goes_on

TRIALS = 70
AT_ONCE = (("trainable", "worker"), ("slot host", "mailbox"), ("slot host",))
"""Kinds of process that die together; the next ones when the study has got over it."""


def test_a_study_that_stops_trials_outlives_each_of_its_processes(tmp_path):
    flags = ("--max-concurrent", "2", "--halving", "2")
    with LightStudy(tmp_path, TRIALS, *flags, LIGHT_EPOCH_S="0.3") as study:
        study.wait_for(study.ended)
        # The slots keep what trials go on from: Tune, which would keep more of each, saves none.
        assert not list(study.output.glob(".ray/tune-*/*/checkpoint_*"))
        for kinds in AT_ONCE:
            killed = [study.kill(kind) for kind in kinds]
            ended = len(study.ended())
            study.wait_for(lambda ended=ended: len(study.ended()) >= ended + 3)
            assert not [p for kind in kinds for p in study.processes(kind) if p.pid in killed]
        assert ": its Ray Tune process died; it is tried again" in study.shown().replace("\n", " ")
        study.kill("raylet")  # takes the driver along, and all that Ray runs
        assert study.finish() != 0
        before = {name: study.record(name) for name in study.ended()}
        study.start("--resume")
        assert study.finish() == 0
        assert {name: study.record(name) for name in before} == before
    study.assert_consistent()
    assert "or Ray's on its node; go on with --resume." in study.shown()
    records = [json.loads(study.record(f"{number:04d}")) for number in range(TRIALS)]
    whole = assert_judged_by_who_came_before(records)
    # Which trials are stopped depends on who comes first, and tau wants three that were not.
    told = "Kendall's tau of rung and end" in study.shown().replace("\n", " ")
    assert 0 < whole < TRIALS and told == (whole > 2)


def assert_judged_by_who_came_before(records: list[dict[str, Any]]) -> int:
    """Each trial was stopped at the first of the rungs 1 and 2 where it was to be; who was not."""
    came: dict[int, list[tuple[str, tuple[float, ...]]]] = {1: [], 2: [], 3: []}
    for record in records:
        for heard in record["epochs"]:
            told = heard["report"]["metrics"]
            scores = tuple(told[name] for name in OBJECTIVES) if OBJECTIVES[0] in told else ()
            came[heard["report"]["epoch"]].append((heard["at"], scores))
    for record in records:
        last = record["epochs"][-1]
        for heard in record["epochs"][:2]:
            own = tuple(heard["report"]["metrics"][name] for name in OBJECTIVES)
            others = [scores for at, scores in came[heard["report"]["epoch"]] if at < heard["at"]]
            stopped = record["result"]["status"] == "pruned" and heard is last
            assert goes_on(own, others, 2) != stopped
    return sum(record["result"]["status"] == "completed" for record in records)
