"""Ctrl-C: at once where nothing is lost by it, after the step while the student trains."""

import os
import signal
import time

import pytest

from lcmdistill.training.signals import catch_signals, exit_on_sigterm, ignore_sigterm
from lcmdistill.utils.errors import Interrupted


def interrupt() -> None:
    """Send Ctrl-C, and go on for longer than an answer may take."""
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def test_a_signal_stops_at_once_where_nothing_is_lost() -> None:
    began = time.monotonic()
    with (
        catch_signals() as stop,
        pytest.raises(Interrupted, match="stopped while preparing") as error,
        stop.at_once("stopped while preparing"),
    ):
        interrupt()
    assert time.monotonic() - began < 2
    assert error.value.exit_code == 130
    assert not stop.is_immediate


def test_while_the_student_trains_a_signal_waits_for_the_step(capfd: pytest.CaptureFixture[str]) -> None:
    with catch_signals() as stop:
        with stop.at_once("before"):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        assert "stopping at the next safe point" in capfd.readouterr().err
        with pytest.raises(Interrupted, match="after"), stop.at_once("after"):  # asked for before the block
            pytest.fail("it went on")
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_a_signal_does_not_take_the_last_sentence_away() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with exit_on_sigterm():
        with pytest.raises(SystemExit):
            os.kill(os.getpid(), signal.SIGTERM)
        ignore_sigterm()
        os.kill(os.getpid(), signal.SIGTERM)  # by a launcher, while the sentence is written
    assert signal.getsignal(signal.SIGTERM) == before
