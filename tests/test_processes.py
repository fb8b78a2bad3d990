"""Signals that end a run: the first one lets the step end, a later one does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from capo_exp.runs import processes
from capo_exp.runs.processes import ended_by_signals, forwarded_to, stop_signal
from tests.process_pieces import alive, wait_for


def test_signals_at_once_count_as_one_and_a_later_one_interrupts(monkeypatch):
    messages: list[str] = []
    monkeypatch.setattr(processes, "ONE_PRESS", 0.2)
    with pytest.raises(KeyboardInterrupt), stop_signal(messages.append) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.is_set() and len(messages) == 1
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_before_the_first_step_a_signal_ends_as_ctrl_c_does(number):
    """What was started by then, such as an engine, is closed on the way out."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), ended_by_signals():
            os.kill(os.getpid(), number)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_goes_on_to_the_child_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with forwarded_to(child) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.wait(timeout=30) == -signal.SIGTERM
    assert stopped.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


DEAF = "import os, signal, time; signal.signal(15, 1); print(os.getpid(), flush=True); time.sleep(60)"
GUARD = [sys.executable, "-m", "capo_exp.rollout.guard", sys.executable, "-c"]
CHILDREN = {"plain": ["sh", "-c", "echo $$; exec sleep 60"], "guarded, ignores the signal": [*GUARD, DEAF]}


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
@pytest.mark.slow
@pytest.mark.parametrize("child", CHILDREN)
def test_a_child_ends_with_its_killed_parent(child):
    code = (
        "import subprocess; from capo_exp.runs.processes import end_with_parent as e;"
        f"subprocess.Popen({CHILDREN[child]!r}, preexec_fn=e, start_new_session=True).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(pid))


def test_a_guarded_command_ends_as_it_would_alone():
    for command, status in (("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)):
        assert subprocess.run([*GUARD, command]).returncode == status
