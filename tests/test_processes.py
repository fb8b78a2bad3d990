"""Signals that end a run: the first one lets the step end, a later one does not."""

import os
import signal
import subprocess
import sys
import time

import pytest

from capo_exp.runs import processes
from capo_exp.runs.processes import forwarded_to, stop_signal


def test_signals_at_once_count_as_one_and_a_later_one_interrupts(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(processes, "ONE_PRESS", 0.2)
    with pytest.raises(KeyboardInterrupt), stop_signal(messages.append) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.is_set() and len(messages) == 1
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_goes_on_to_the_child_and_the_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    with forwarded_to(child) as stopped:
        os.kill(os.getpid(), signal.SIGTERM)
        assert child.wait(timeout=30) == -signal.SIGTERM
    assert stopped.is_set()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_with_its_killed_parent() -> None:
    code = (
        "import subprocess, sys, time; from capo_exp.runs.processes import end_with_parent as e;"
        "c = subprocess.Popen(['sleep', '60'], preexec_fn=e, start_new_session=True);"
        "print(c.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not _alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its parent")


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_guarded_command_that_ignores_the_signal_ends_with_its_killed_parent() -> None:
    deaf = "import os, signal, time; signal.signal(15, 1); print(os.getpid(), flush=True); time.sleep(60)"
    code = (
        "import subprocess, sys; from capo_exp.runs.processes import end_with_parent as e;"
        f"c = [sys.executable, '-m', 'capo_exp.rollout.guard', sys.executable, '-c', {deaf!r}];"
        "subprocess.Popen(c, preexec_fn=e, start_new_session=True).wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(150):
        if not _alive(pid):
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} outlived its guard")


ENDS = [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)]


@pytest.mark.parametrize(("command", "status"), ENDS)
def test_a_guarded_command_ends_as_it_would_alone(command: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-m", "capo_exp.rollout.guard", sys.executable, "-c", command])
    assert done.returncode == status
