"""Grading against known answers and labels, and a verifier that survives whatever an answer does to it."""

import collections
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capo_exp.config.errors import RunFailed
from capo_exp.grading.compare import Grade, exact_match
from capo_exp.grading.extract import find_last_box
from capo_exp.grading.pool import GradingFailed, Workers
from capo_exp.grading.verifier import ExactVerifier, join_results
from tests.grading_pieces import math_verifier
from tests.process_pieces import alive, wait_for

ROOT = Path(__file__).resolve().parent.parent
FACTORIAL = r"\boxed{((20!)!)!}"
DIGITS = r"\boxed{" + "7" * 100_000 + "}"
RIGHT = r"so \boxed{\frac{1}{2}}"


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1} and \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed {7}", "7"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."), (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{3} then \boxed{4", "3"), (r"\boxed{}", None),
        (r"\boxed{3}. Put it within \boxed{}.", "3"), ("no box", None),
        (r"\boxed{never closed", None),
    ],
)  # fmt: skip
def test_last_boxed(text, content):
    assert find_last_box(text) == content


@given(
    st.recursive(
        st.text("ab \\frac12^_", max_size=6), lambda inner: inner.map(lambda s: f"x{{{s}}}y"), max_leaves=4
    )
)
def test_last_boxed_finds_balanced_content(content):
    content = content.replace("\\", "")
    expected = content if content.strip() else "7"
    assert find_last_box(rf"\boxed{{7}} so \boxed{{{content}}} }} {{") == expected


def test_exact_match():
    assert exact_match(r"\boxed{ 12 }", "12\n") == Grade(True, "12", "correct")
    assert exact_match(r"\boxed{12.0}", "12") == Grade(False, "12.0", "wrong")
    assert exact_match("12", "12").reason == "no_answer"
    assert exact_match(r"\boxed{}", " ").reason == "gold_unparsable"


def test_exact_verifier_scores_and_counts():
    with ExactVerifier() as verifier:
        result = verifier.score([[r"\boxed{1}", r"\boxed{2}"], ["3", r"\boxed{4}"]], [("1",), ("4",)])
    assert result.rewards == [[1.0, 0.0], [0.0, 1.0]]
    none = dict.fromkeys(("reward/timeouts", "reward/crashes", "reward/gold_unparsable"), 0.0)
    assert result.metrics == none | {"reward/no_answer_fraction": 0.25}
    assert ExactVerifier().score([], []).rewards == []
    with pytest.raises(ValueError, match="zip"):
        ExactVerifier().score([["1"], ["2"]], [("1",)])


def test_a_step_in_parts_has_the_result_of_the_whole():
    texts = [["none", "1"], [r"\boxed{2}", "x"], [r"\boxed{3}", r"\boxed{4}"]]
    golds, score = [("1",), ("2",), ("3",)], ExactVerifier().score
    whole = score(texts, golds)
    assert join_results([score(texts[:1], golds[:1]), score(texts[1:], golds[1:])]) == whole
    assert whole.metrics["reward/no_answer_fraction"] == 1 / 2


def misbehave(completion, golds):
    """A grader that does what the completion says; runs in the worker."""
    if completion == "hang in C":
        collections.deque(itertools.repeat(0), maxlen=0)
    elif completion == "exit":
        os._exit(3)
    elif completion == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif completion == "memory":
        bytearray(3 * 2**30)
    elif completion == "raise":
        raise RuntimeError("grader")
    elif completion.startswith("log "):
        with Path(completion.removeprefix("log ")).open("a") as file:
            file.write(f"{os.getpid()}\n")
    elif completion == "wait":
        time.sleep(1.5)
    elif completion == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif "once " in completion:
        number, _, path = completion.partition(" once ")
        if not Path(path).exists():
            Path(path).touch()
            os.kill(os.getpid(), int(number))
    return Grade(True, golds[0], "correct")


@pytest.fixture(scope="module")
def verifier():
    with math_verifier(timeout_seconds=1.0, workers=2) as shared:
        yield shared


@pytest.fixture(scope="module")
def rough():
    with math_verifier(timeout_seconds=1.0, workers=2, memory_limit_gib=1.0) as own:
        own.grader = misbehave
        yield own


def workers():
    return [child.pid for child in multiprocessing.active_children() if child.pid]


def test_rewards_keep_their_places(verifier):
    result = verifier.score(
        [[RIGHT, r"\boxed{1}", "none"], [r"\boxed{7}"], [r"\boxed{1}", RIGHT]], [("0.5",), ("7",), (" ",)]
    )
    assert result.rewards == [[1.0, 0.0, 0.0], [1.0], [0.0, 0.0]]
    assert result.metrics["reward/no_answer_fraction"] == pytest.approx(1 / 6)
    assert result.metrics["reward/gold_unparsable"] == 2
    assert verifier.score([], []).rewards == []


@pytest.mark.slow
def test_hung_answers_end_and_the_others_go_on(verifier):
    """A factorial tower and 100,000 digits between right answers; a gold that hangs; in two threads."""
    texts = [RIGHT, FACTORIAL, RIGHT, DIGITS, RIGHT]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(verifier.score, [texts, [RIGHT]], [("0.5",), ("1/2",)])
        other = threads.submit(verifier.score, [[RIGHT]], [("2",)])
    first, other = first.result(), other.result()
    assert first.rewards == [[1.0, 0.0, 1.0, 0.0, 1.0], [1.0]] and other.rewards == [[0.0]]
    assert first.metrics["reward/timeouts"] >= 1
    assert verifier.score([[RIGHT]], [("9^{9^{9^{9}}}",)]).metrics["reward/timeouts"] == 1


@pytest.mark.slow
def test_whatever_kills_a_worker_costs_one_answer(rough):
    answers = ["ok", "hang in C", "ok 2", "exit", "ok 3", "segfault", "ok 4", "memory", "raise", "ok 5"]
    result = rough.score([answers], [("1",)])
    assert result.rewards == [[float(text.startswith("ok")) for text in answers]]
    assert (result.metrics["reward/timeouts"], result.metrics["reward/crashes"]) == (1, 4)


def test_equal_pairs_are_graded_once(rough, tmp_path):
    text = f"log {tmp_path / 'calls'}"
    result = rough.score([[text, text], [text], [text]], [("1",), ("2",), ("1",)])
    assert result.rewards == [[1.0, 1.0], [1.0], [1.0]]
    assert len((tmp_path / "calls").read_text().split()) == 2


@pytest.mark.slow
def test_an_end_from_outside_is_not_the_answers_fault(rough, tmp_path):
    """A scheduler's, or the kernel's when the machine has no memory left; again and again it is a crash. The
    limit counts a worker's CPU seconds: an answer that waits is still right."""
    ends = [f"{int(end)} once {tmp_path / end.name}" for end in (signal.SIGTERM, signal.SIGKILL)]
    result = rough.score([["on", *ends, "wait", "killed", "on 2"]], [("1",)])
    assert [grade.reason for grade in result.grades[0]] == [*["correct"] * 4, "crash", "correct"]
    assert result.metrics["reward/crashes"] == 1


@pytest.mark.slow
def test_idle_worker_that_was_killed_is_replaced(rough):
    rough.score([["here"]], [("1",)])  # texts of its own: what is remembered needs no worker
    for pid in workers():
        os.kill(pid, signal.SIGKILL)
    assert rough.score([["here 1", "here 2", "here 3"]], [("1",)]).rewards == [[1.0, 1.0, 1.0]]


@pytest.mark.slow
def test_interrupted_score_leaves_nothing_behind():
    """Also with more tasks waiting than the pipe to the workers holds."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    before = set(workers())
    with math_verifier(timeout_seconds=60.0) as own:
        own.grader = misbehave
        own.score([["ok"]], [("1",)])
        started = set(workers()) - before
        timer = threading.Timer(
            0.5, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        )
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            own.score([["hang in C", *(f"{i}" * 10_000 for i in range(60))]], [("1",)])
        assert not any(map(alive, started))
        assert own.score([["ok again"]], [("1",)]).rewards == [[1.0]]


@pytest.mark.slow
def test_close_leaves_no_process_and_score_starts_again():
    """Also where the thread that scored first has ended."""
    before = set(workers())
    own = math_verifier()
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(own.score, [[RIGHT]], [("0.5",)]).result().rewards == [[1.0]]
        started = set(workers()) - before
        assert started and own.score([[RIGHT]], [("0.5",)]).rewards == [[1.0]]
        own.close()
        own.close()
        assert not any(map(alive, started))


@pytest.mark.slow
def test_a_thread_that_grades_ends_when_another_closes():
    """Else a run whose engine failed meanwhile would never end."""
    own = Workers(count=1, cpu_seconds=60.0, memory_limit_gib=4.0, warm_up=nothing)
    with ThreadPoolExecutor(1) as thread:
        grading = thread.submit(own.run, time.sleep, [(0.01,), (30.01,), (30.02,)])
        wait_for(lambda: any(worker.items for worker in own._workers))
        own.close()
        with pytest.raises(GradingFailed, match="closed while it graded"):
            grading.result(timeout=20)
    assert not own._workers


def nothing():
    """Runs in the worker."""


def no_start():
    """Runs in the worker."""
    os._exit(7)


@pytest.mark.slow
def test_workers_that_cannot_start_are_an_error_not_a_reward():
    """The key is named only where it may be the cause; either way at once."""
    with (
        math_verifier(memory_limit_gib=0.001) as own,
        pytest.raises(GradingFailed, match=r"memory_limit_gib=0\.001, expected 1 or more") as refused,
    ):
        own.score([[RIGHT]], [("0.5",)])
    assert isinstance(refused.value, RunFailed) and "\n" not in str(refused.value)
    own = Workers(count=1, cpu_seconds=1.0, memory_limit_gib=4.0, warm_up=no_start)
    with pytest.raises(GradingFailed, match=r"ready: exit status 7, 3 times$"):
        own.run(str, [("1",)])


PROGRAM = """
import multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from tests.grading_pieces import math_verifier
from tests.test_rewards import misbehave
def main():
    verifier = math_verifier(timeout_seconds=1.0, workers=1)
    verifier.grader = misbehave
    print(verifier.score([["ok"]], [("1",)]).rewards)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    if sys.argv[1] == "kill":
        texts = [["log " + sys.argv[2], "wait"]]
        threading.Thread(target=verifier.score, args=(texts, [("1",)])).start()
        while not Path(sys.argv[2]).exists():
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "kill"])
def test_no_worker_outlives_its_parent(end, tmp_path):
    """Run with -m, as `python -m capo_exp` is: each worker imports the main module again."""
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-m", "program", end, str(tmp_path / "log")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if end == "exit" else -signal.SIGKILL)
    rewards, pids = done.stdout.splitlines()
    assert rewards == "[[1.0]]"
    wait_for(lambda: not any(alive(int(pid)) for pid in pids.split()))
