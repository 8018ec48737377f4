"""A study of which each kind of process is killed ends complete; after its node, by a resume."""

import json
import signal

from tests.end_to_end.light import LightStudy
from vgid.requirement import OBJECTIVES
from vgid.study.halving import goes_on

TRIALS = 40
AT_ONCE = (("trainable", "worker"), ("slot host", "mailbox"), ("slot host",))
"""Kinds of process that die together; the next ones when the study has got over it."""


def test_a_study_outlives_each_of_its_processes(tmp_path):
    flags = ("--max-concurrent", "2")
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


def test_a_study_that_stops_trials_stops_the_same_ones_when_it_is_resumed(tmp_path):
    flags = ("--max-concurrent", "2", "--halving", "2")
    with LightStudy(tmp_path, 10, *flags, LIGHT_EPOCH_S="0.3") as study:
        study.wait_for(lambda: len(study.ended()) >= 3)
        study.signal(signal.SIGTERM)
        assert study.finish() != 0
        before = {name: study.record(name) for name in study.ended()}
        study.start("--resume")
        assert study.finish() == 0
        assert {name: study.record(name) for name in before} == before
    study.assert_consistent()
    records = [json.loads(study.record(f"{number:04d}")) for number in range(10)]
    assert {record["result"]["status"] for record in records} == {"completed", "pruned"}
    came: dict[int, list[tuple[str, tuple[float, ...]]]] = {1: [], 2: [], 3: []}
    for record in records:
        for heard in record["epochs"]:
            told = heard["report"]["metrics"]
            scores = tuple(told[name] for name in OBJECTIVES) if OBJECTIVES[0] in told else ()
            came[heard["report"]["epoch"]].append((heard["at"], scores))
    for record in records:  # a later trial than its own is nobody's judge
        last = record["epochs"][-1]
        for heard in record["epochs"][:2]:
            own = tuple(heard["report"]["metrics"][name] for name in OBJECTIVES)
            others = [scores for at, scores in came[heard["report"]["epoch"]] if at < heard["at"]]
            stopped = record["result"]["status"] == "pruned" and heard is last
            assert goes_on(own, others, 2) != stopped
    # Which trials are stopped depends on who comes first, and tau wants three that were not.
    whole = sum(record["result"]["status"] == "completed" for record in records)
    told = "Kendall's tau of rung and end" in study.shown().replace("\n", " ")
    assert told == (whole > 2)
