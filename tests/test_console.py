import io
import json
import math
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console

from capo_exp.runs.console import Progress, summary_lines
from capo_exp.runs.live import sparkline


def console(*, terminal):
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=100, highlight=False), text


def row(step):
    return {
        "counter/rollout_step": step,
        "counter/completions": 96 * step,
        "counter/generated_tokens": 1000 * step,
        "reward/accuracy": 0.1 * step,
        "selection/rejection_rate": 0.01 * step,
        "curvature/token/policy_shift/p99": 1.25e-6,
        "time/tokens_per_second": 1234.5,
    }


def test_a_log_gets_plain_lines_is_not_flooded_and_has_the_last_step():
    out, text = console(terminal=False)
    with Progress(total_steps=500, first_step=100, every_seconds=3600, console=out) as progress:
        progress.evaluation({"counter/rollout_step": 100, "eval/accuracy": 0.25})
        for step in range(101, 501):
            progress.update(row(step))
        progress.message("[not markup] done")
    evaluation, first, last, message = text.getvalue().splitlines()
    assert evaluation == "evaluation after step 100: 25.0%" and message == "[not markup] done"
    assert (
        first.startswith("step 101/500  acc ") and "1,234 tok/s" in first and last.startswith("step 500/500")
    )
    assert "\x1b" not in text.getvalue() and "\r" not in text.getvalue()


def test_a_terminal_gets_a_live_table_and_messages_above():
    """The last picture is what stays; a resumed run has its past in it."""
    out, text = console(terminal=True)
    past = [row(1), {"counter/rollout_step": 1, "eval/accuracy": 0.5}]
    with Progress(total_steps=4, first_step=1, past=past, console=out) as progress:
        progress.update({**row(2), "optim/step_scale": 1.0})
        progress.message("saved")
        progress.evaluation({"counter/rollout_step": 2, "eval/accuracy": 0.75})
        progress.update({**row(4), "policy/entropy": math.nan})
    *_, saved, last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).rpartition("saved")
    assert saved == "saved"
    assert re.search(r"step 4/4 +━+ +1,234 tok/s +left 0:00:00", last)
    assert re.search(r"accuracy +40\.0% +▁▃█ +10\.0% to 40\.0%", last)
    assert re.search(r"held-out +75\.0% +▁█ +50\.0% to 75\.0%", last)
    assert "evaluation after" not in text.getvalue()
    assert "entropy" not in last and "step scale" not in last
    assert max(map(len, last.splitlines())) < 80


def test_a_sparkline_runs_from_the_lowest_to_the_highest():
    assert sparkline([0.0, 0.5, 1.0, -0.5]) == "▃▆█▁" and sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([1e-9, 2e-9], plain=True).isascii()


def test_the_summary_says_what_came_out_and_where_it_is(tmp_path):
    steps = [json.dumps(row(step)) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(steps) + "\n")
    scores = [json.dumps({"counter/rollout_step": step, "eval/accuracy": 0.2 + step / 15}) for step in (0, 3)]
    (tmp_path / "eval.jsonl").write_text("\n".join(scores) + "\n")
    (tmp_path / "run.json").write_text(
        json.dumps({"name": "grpo-tiny", "wall_seconds": 61.0, "tracker": "wandb sync here\x1b"})
    )
    (tmp_path / "wandb" / "offline-run-1").mkdir(parents=True)
    words = "\n".join(summary_lines(tmp_path))
    for expected in (
        "grpo-tiny", "20.0% -> 40.0%, best 40.0%", "20.0%, mean of the last 3 steps", "288", "3,000",
        "0:01:01", "mean 2.00%, max 3.00%", "metrics.jsonl", "run.json", "wandb sync here",
    ):  # fmt: skip
        assert expected in words
    assert "checkpoints" not in words and "\x1b" not in words
    (tmp_path / "metrics.jsonl").write_text("")
    assert any("best 40.0%" in line for line in summary_lines(tmp_path))  # without steps
    (tmp_path / "wandb" / "offline-run-1").rmdir()  # as a kill at the end leaves it
    assert any(f"python scripts/write_wandb.py {tmp_path}" in line for line in summary_lines(tmp_path))


def test_a_terminal_that_was_closed_ends_nothing():
    """The signal that says so comes a moment after the first write has failed."""
    master, slave = pty.openpty()
    gone = os.fdopen(slave, "w")
    with Progress(total_steps=9, console=Console(file=gone, force_terminal=True)) as progress:
        os.close(master)
        progress.update(row(1))
        progress.evaluation({"counter/rollout_step": 1, "eval/accuracy": 0.5})
        progress.message("more")
    with pytest.raises(OSError):  # it was gone indeed
        gone.close()


def test_a_reader_that_is_gone_ends_no_run():
    """As a `tee` is that the same Ctrl-C has ended."""
    code = (
        "import sys; from capo_exp.runs.console import Progress; shown = Progress(total_steps=2)\n"
        "sys.stdin.read(); [shown.message('one') for _ in range(3)]; print('on', file=sys.stderr)"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **pipes)
    assert process.stdout is not None and process.stderr is not None and process.stdin is not None
    process.stdout.close()
    process.stdin.close()
    assert (process.stderr.read(), process.wait()) == ("on\n", 0)
