"""The process of a job: where it runs, what it inherits, and where its output goes."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from capo_exp.config.plugins import allowed_plugins
from capo_exp.config.record import to_yaml
from capo_exp.config.schema import TrainConfig
from capo_exp.runs.identity import run_dir
from capo_exp.runs.lock import InProgress, locked
from capo_exp.runs.processes import end_with_parent, forwarded_to
from capo_exp.runs.record import begins_anew

COMMAND = (sys.executable, "-m", "capo_exp.sweep.job")
POLL_SECONDS = 0.2


def wait_for_job(config: TrainConfig, env: Mapping[str, str], *, echo: bool) -> int:
    """Runs the job to its end, its output in the log and on the console if nothing else writes there.

    Raises:
        KeyboardInterrupt: if this process was told to stop; the job was, too, and has ended with this code.
    """
    log_file = run_dir(config) / "log.txt"
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb" if begins_anew(config) else "ab") as log:
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')}\n".encode())
        log.flush()
        end = log.tell()
        child = subprocess.Popen(
            [*COMMAND, "own=true", f"plugins=[{','.join(allowed_plugins())}]"],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=env,
            start_new_session=True,  # Ctrl-C reaches it from here only
            preexec_fn=end_with_parent,
        )
    with forwarded_to(child) as stopped, log_file.open("rb") as output:
        assert child.stdin is not None
        with suppress(BrokenPipeError), child.stdin as stdin:
            stdin.write(to_yaml(config).encode())
        output.seek(end)
        while (code := child.poll()) is None:
            _copy(output, echo)
            time.sleep(POLL_SECONDS)
        _copy(output, echo)
    if stopped.is_set():
        raise KeyboardInterrupt(code)
    return code


def _copy(output: Any, echo: bool) -> None:
    if echo and (text := output.read()):
        sys.stdout.write(text.decode(errors="replace"))
        sys.stdout.flush()


def take_device(devices: Sequence[str], stack: ExitStack) -> str | None:
    """Waits for the first free one of the GPUs and keeps it for the stack's time; None if none is named.

    A GPU named twice takes two jobs. Other sweeps of this user on this machine wait for the same GPUs.
    """
    root = Path(tempfile.gettempdir()) / f"capo_exp-{os.getuid()}"
    while devices:
        for number, device in enumerate(devices):
            place = root / f"device-{device}-{list(devices[:number]).count(device)}"
            with suppress(InProgress):
                stack.enter_context(locked(place))
                return device
        time.sleep(POLL_SECONDS)
    return None


def environment(device: str | None, parallel: int) -> dict[str, str]:
    """Returns this process's environment with the job's GPU, and its share of the cores where several run."""
    env = dict(os.environ)
    if device is not None:
        env["CUDA_VISIBLE_DEVICES"] = device
    if parallel != 1:
        env.setdefault("OMP_NUM_THREADS", share_cores(parallel))
    return env


def share_cores(processes: int) -> str:
    """Returns the threads of each of so many processes at a time; one where their number is not known, -1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return str(max(1, cores // processes))


def read_last_line(log_file: Path) -> str:
    """Returns the last line of a log that is not blank, where an error stands; empty if there is no log."""
    with suppress(OSError):
        return next((x for x in reversed(log_file.read_text(errors="replace").splitlines()) if x.strip()), "")
    return ""


def say(text: str) -> None:
    """Writes a line on the console, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
