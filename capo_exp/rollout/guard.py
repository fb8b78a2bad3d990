"""`python -m capo_exp.rollout.guard COMMAND ...`: a command that ends when whoever started this is killed.

Started as the leader of a session, with signals.end_with_parent. vLLM's server can overlook a signal that
reaches it while it starts; so this one asks it to end, waits, and then kills the whole session. Imports
nothing slow.
"""

import os
import signal
import subprocess
import sys
import time

PATIENCE = 5.0
POLL_SECONDS = 0.1


def main() -> int:
    """Runs the command and ends as it does."""
    child = subprocess.Popen(sys.argv[1:])
    asked: list[float] = []

    def end(*_: object) -> None:
        asked.append(time.monotonic())
        child.terminate()

    signal.signal(signal.SIGTERM, end)
    while child.poll() is None:
        if asked and time.monotonic() - asked[0] > PATIENCE:
            os.killpg(0, signal.SIGKILL)
        time.sleep(POLL_SECONDS)
    if child.returncode < 0:  # by a signal: the same one ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), -child.returncode)
    return child.returncode


if __name__ == "__main__":
    raise SystemExit(main())
