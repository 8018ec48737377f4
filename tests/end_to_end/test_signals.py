"""A signal to a real study: heard at once, and what there is is written."""

import json
import signal
import time

from tests.end_to_end.light import LightStudy


def test_a_signal_while_the_front_is_scored_again_is_heard_at_once(tmp_path):
    flags = ("--max-concurrent", "1")
    with LightStudy(tmp_path, 2, *flags, epochs=1, LIGHT_RESCORE_S="600") as study:
        study.wait_for(lambda: "on held-out questions" in study.shown())
        time.sleep(1)  # the slot is at it
        began = time.monotonic()
        study.signal(signal.SIGTERM)
        code = study.finish()
        took = time.monotonic() - began
    print(f"ended {took:.1f} s after the signal")
    assert took < 60  # 600 if it were not heard; some 5 on a quiet machine
    assert code == 130
    assert "go on with --resume" in study.shown()
    assert "Traceback" not in study.shown()
    summary = json.loads((study.output / "study.json").read_text())
    assert summary["interrupted"]
    assert summary["counts"]["completed"] == 2
    for name in summary["files"]:
        assert (study.output / name).exists()
    assert "heldout_" not in (study.output / "front.csv").read_text()
