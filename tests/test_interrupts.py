"""Signals: noted first and obeyed at the second, heard by every wait, and one way out for all."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from vgid import cli, interrupts
from vgid.command_line import exit_code
from vgid.errors import InputError
from vgid.interrupts import Background, Interrupt, StudyInterruptedError, made

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def send(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


@pytest.fixture
def hanging():
    """Work that does not end before the test does."""
    over = threading.Event()
    yield Background("hanging").submit(over.wait, 60)
    over.set()


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_the_second_does_what_it_did_before(number):
    heard = []
    before = signal.signal(number, lambda *_: heard.append(number))
    try:
        with Interrupt() as interrupt:
            interrupt.check()
            send(number)
            assert interrupt.came
            with pytest.raises(StudyInterruptedError):
                interrupt.check()
            assert heard == []
            send(number)
            assert heard == [number]
        send(number)
        assert heard == [number] * 2
    finally:
        signal.signal(number, before)


def test_a_wait_ends_with_the_work_or_with_a_signal(hanging):
    with Interrupt() as interrupt:
        assert interrupt.result(Background("quick").submit(max, 1, 2)) == 2
        with pytest.raises(ZeroDivisionError):
            interrupt.result(Background("broken").submit(lambda: 1 / 0))
        began = time.monotonic()
        threading.Timer(0.3, send).start()
        with pytest.raises(StudyInterruptedError):
            interrupt.result(hanging)
        assert time.monotonic() - began < 3


def test_what_is_under_way_gets_some_seconds_after_a_signal(hanging, monkeypatch):
    monkeypatch.setattr(interrupts, "GRACE_S", 0.5)
    with Interrupt() as interrupt:
        assert interrupt.allows(Background("slow").submit(time.sleep, 0.3))
        threading.Timer(0.2, send).start()
        assert interrupt.allows(Background("slow").submit(time.sleep, 0.4))
        assert not interrupt.allows(hanging)
        with pytest.raises(ZeroDivisionError):
            interrupt.allows(Background("broken").submit(lambda: 1 / 0))


def test_a_thread_works_in_order_and_lets_the_process_end():
    code = (
        "import time; from vgid.interrupts import Background\n"
        "side = Background('side'); side.submit(print, 'first')\n"
        "side.submit(lambda: print('second', flush=True)).result()\n"
        "waiting = side.submit(time.sleep, 60); late = side.submit(print, 'never')\n"
        "late.cancel()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=50)
    assert done.stdout.split() == ["first", "second"]
    side = Background("side")
    cancelled = side.submit(time.sleep, 0.2), side.submit(pytest.fail, "it was cancelled")
    assert cancelled[1].cancel()
    assert side.submit(lambda: 7).result(10) == 7


def fail(error):
    raise error


def test_writes_that_fail_are_noted_by_kind_and_keep_no_later_one(capsys):
    side, written = Background("tables"), []
    side.write(fail, ImportError("Fay Moss"))
    side.write(written.append, 1)
    side.write(fail, InputError("its disk is full."))
    side.write(written.append, 2)
    side.submit(int).result(10)
    assert (written, side.fault) == ([1, 2], "ImportError")
    logged = capsys.readouterr().err
    assert "ImportError" in logged and "in fail" in logged and "Fay Moss" not in logged


def test_a_write_that_does_not_end_can_be_left():
    side, go_on, written = Background("mlflow"), threading.Event(), []
    side.write(go_on.wait, 60)
    side.write(written.append, 1)
    last = side.submit(written.append, 2)
    side.give_up()
    assert side.busy and made(last) is None
    go_on.set()
    deadline = time.monotonic() + 10
    while side.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not side.busy and last.cancelled() and made(last) is None and written == []


@pytest.fixture
def interruptible():
    """SIGINT as in the foreground: a shell has what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", SIGNALS)
def test_commands_leave_their_blocks_and_exit_with_130(number, monkeypatch, tmp_path, capsys):
    left = []

    def work(*arguments, **options):
        try:
            send(number)
            time.sleep(10)
        finally:
            left.append(number)

    before = [signal.getsignal(one) for one in SIGNALS]
    assert exit_code(work, "Interrupted; go on.") == 130
    assert capsys.readouterr().err == "Interrupted; go on.\n"
    monkeypatch.setattr("vgid.data.synthetic.write_benchmark", work)
    monkeypatch.setattr(sys, "argv", ["vgid", "data", "make", str(tmp_path / "data")])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 130
    assert left == [number] * 2
    assert [signal.getsignal(one) for one in SIGNALS] == before
