"""A study of which each kind of process is killed ends complete; after its node, by a resume."""

from tests.end_to_end.light import LightStudy

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
