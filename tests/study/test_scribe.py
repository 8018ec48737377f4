"""The thread that writes while trials go on: every kind of error is seen, and it can be left."""

import threading
import time

from vgid.errors import InputError
from vgid.study.scribe import Scribe


def fail(error):
    raise error


def test_errors_of_any_kind_are_seen_and_keep_no_later_write(capsys):
    scribe, written = Scribe("tables"), []
    scribe.write(fail, ImportError("Fay Moss"))
    scribe.write(written.append, 1)
    scribe.write(fail, InputError("its disk is full."))
    scribe.write(fail, InputError("again."))
    scribe.write(written.append, 2)
    scribe.close()
    assert written == [1, 2]
    assert (scribe.error, scribe.fault) == ("its disk is full.", "ImportError")
    logged = capsys.readouterr().err
    assert "ImportError" in logged and "in fail" in logged and "Fay Moss" not in logged


def test_a_write_that_does_not_end_can_be_left(capsys):
    scribe, go_on, written = Scribe("mlflow"), threading.Event(), []
    scribe.write(go_on.wait)
    scribe.write(written.append, 1)
    began = time.monotonic()
    scribe.close(0.05)
    assert scribe.busy and time.monotonic() - began < 5
    go_on.set()
    scribe.close()
    assert not scribe.busy and written == []
