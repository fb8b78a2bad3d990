import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from omegaconf import OmegaConf

from capo_exp.figures import plots
from capo_exp.figures.plots import plot_run, run_title, smoothing_window, trailing_mean
from capo_exp.runs.read import LoggedRun, load_run
from tests.figure_pieces import NO_WARNINGS

CONFIG = {
    "algo": {
        "name": "capo",
        "selection": {"policy_shift_max": 1e-4, "objective_shift_min": -1e-2, "objective_shift_max": 1e-2},
    },
    "model": {"name": "tiny"},
    "dataset": {"name": "arithmetic"},
    "regime": {"name": "aggressive", "learning_rate": 1e-4, "prompts_per_step": 12, "group_size": 8},
    "seed": 3,
}


def row(step: int) -> dict[str, Any]:
    return {
        "counter/rollout_step": step,
        "counter/completions": 96 * step,
        "reward/accuracy": 0.3 + 0.001 * step,
        "curvature/token/policy_shift/mean": 1e-6 * step,
        "curvature/token/policy_shift/p99": 1e-5,
        "curvature/token/policy_shift/max": 1e-3,
        "curvature/token/objective_shift/p99": 0.0,
        "curvature/token/objective_shift/max": -1e-3,
        "selection/rejection_rate": 0.03,
        "selection/rejection_rate_policy": 0.02,
        "selection/rejection_rate_objective": None,
    }


def write_run(path: Path, rows: list[dict[str, Any]], config: dict[str, Any] | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rows))
    if config is not None:
        OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
        score = {"counter/rollout_step": 0, "counter/completions": 0, "eval/accuracy": 0.25}
        (path / "eval.jsonl").write_text(json.dumps(score) + "\n")
    return path


@NO_WARNINGS
@pytest.mark.parametrize("steps", [0, 1, 2, 100])
def test_a_picture_of_any_length(tmp_path: Path, steps: int) -> None:
    path = plot_run(write_run(tmp_path, [row(step) for step in range(1, steps + 1)], CONFIG))
    assert path == tmp_path / "run.png"
    height, width, _ = matplotlib.image.imread(path).shape
    assert (width, height) == (1280, 1376)


@NO_WARNINGS
def test_a_picture_of_an_old_run_without_most_of_it(tmp_path: Path) -> None:
    short = {"counter/completions": 96, "reward/accuracy": 0.5}
    assert plot_run(write_run(tmp_path, [short, {"counter/rollout_step": 2}])).exists()


def test_what_is_drawn(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path, [row(step) for step in range(1, 41)], CONFIG))
    accuracy, shifts, rejection = Figure().subplots(3, 1)
    plots.draw_accuracy(accuracy, run)
    plots.draw_shifts(shifts, run)
    plots.draw_rejection(rejection, run)
    assert accuracy.get_legend_handles_labels()[1] == ["training, mean of 2 steps", "held-out problems"]
    assert accuracy.lines[1].get_color() == "#0072B2"
    assert accuracy.lines[0].get_xdata()[-1] == 40 * 96
    labels = shifts.get_legend_handles_labels()[1]
    assert labels == ["policy max", "policy p99", "policy mean", "|objective| max"]
    assert shifts.lines[3].get_ydata()[0] == 1e-3
    assert shifts.get_yscale() == "log"
    assert [text.get_text() for text in shifts.texts] == ["policy bound 1e-4", "|objective| bound 0.01"]
    assert rejection.get_legend_handles_labels()[1] == ["total", "by policy shift"]


def test_bounds_that_do_not_bind_are_not_drawn(tmp_path: Path) -> None:
    loose = {"policy_shift_max": float("inf"), "objective_shift_min": 0, "objective_shift_max": None}
    config = {**CONFIG, "algo": {"name": "mine", "selection": loose}}
    run = load_run(write_run(tmp_path, [row(1)], config))
    axes = Figure().subplots()
    plots.draw_shifts(axes, run)
    assert len(axes.texts) == 0


def test_the_title_says_what_ran(tmp_path: Path) -> None:
    assert run_title(load_run(write_run(tmp_path, [], CONFIG))) == (
        "capo · tiny · arithmetic\n"
        "aggressive · learning rate 1e-4 · 12 prompts x 8 completions a step · seed 3"
    )
    assert "?" in run_title(LoggedRun(tmp_path, {}, {}, [], []))


def test_smoothing_by_hand() -> None:
    values = np.array([1.0, 2.0, np.nan, 6.0])
    np.testing.assert_allclose(trailing_mean(values, 2), [1.0, 1.5, 2.0, 6.0])
    np.testing.assert_allclose(trailing_mean(np.array([np.nan]), 1), [np.nan])
    assert [smoothing_window(n) for n in (0, 1, 39, 100, 5000)] == [1, 1, 1, 5, 20]


def test_no_torch_and_no_display(tmp_path: Path) -> None:
    write_run(tmp_path, [row(1)], CONFIG)
    code = """
import sys
from capo_exp.figures.plots import plot_run
plot_run(sys.argv[1])
assert not {"torch", "wandb", "transformers", "matplotlib.pyplot"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
