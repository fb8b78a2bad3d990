"""run.png: what is drawn of one run."""

import itertools
import json

import matplotlib.image
import pytest
import yaml
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from capo_exp.figures import plots, style
from capo_exp.figures.plots import outcome, plot_run, run_title
from capo_exp.runs.read import load_run
from tests.figure_pieces import NO_WARNINGS, write_jsonl

BOUNDS = {"policy_shift_max": 1e-4, "objective_shift_min": -1e-2, "objective_shift_max": 1e-2}
CONFIG = {
    "algo": {"name": "capo", "selection": BOUNDS},
    "model": {"name": "tiny"},
    "dataset": {"name": "arithmetic"},
    "regime": {"name": "aggressive", "learning_rate": 1e-4, "prompts_per_step": 12, "group_size": 8},
    "seed": 3,
}
METRICS = {
    "reward/accuracy": 0.3,
    "curvature/token/policy_shift/mean": 1e-6,
    "curvature/token/policy_shift/p99": 1e-5,
    "curvature/token/policy_shift/max": 1e-3,
    "curvature/token/objective_shift/p99": 0.0,
    "curvature/token/objective_shift/max": -1e-3,
    "selection/rejection_rate": 0.03,
    "selection/rejection_rate_policy": 0.02,
    "selection/rejection_rate_objective": None,
}


def write_run(path, steps, config=CONFIG, **more):
    counters = [{"counter/rollout_step": s, "counter/completions": 96 * s} for s in range(steps + 1)]
    write_jsonl(path / "metrics.jsonl", [row | METRICS | more for row in counters[1:]])
    write_jsonl(path / "eval.jsonl", [counters[0] | {"eval/accuracy": 0.25}])
    (path / "config.yaml").write_text(yaml.dump(config))
    return load_run(path)


@pytest.mark.slow
@NO_WARNINGS
def test_a_picture_of_a_run_without_steps_of_one_and_of_an_old_one_without_most_of_it(tmp_path):
    short = {"counter/completions": 96, "reward/accuracy": 0.5}
    for rows in ([], [METRICS | short], [short, {"counter/rollout_step": 2}]):
        write_jsonl(tmp_path / "metrics.jsonl", rows)
        assert plot_run(tmp_path) == tmp_path / "run.png"
        height, width, _ = matplotlib.image.imread(tmp_path / "run.png").shape
        assert (width, height) == (1280, 1376)


def test_what_is_drawn(tmp_path):
    run = write_run(tmp_path, 40)
    with rc_context(style.SETTINGS):
        figure = Figure(figsize=(8.0, 8.6), layout="constrained")
        FigureCanvasAgg(figure)
        accuracy, shifts, rejection = figure.subplots(3, 1)
        plots.draw_accuracy(accuracy, run)
        plots.draw_shifts(shifts, run)
        plots.draw_rejection(rejection, run)
        figure.draw_without_rendering()
    assert accuracy.get_legend_handles_labels()[1] == ["training, EMA 0.1", "held-out problems"]
    assert accuracy.lines[0].get_xdata()[-1] == 40 * 96
    labels = shifts.get_legend_handles_labels()[1]
    assert labels == ["policy max", "policy p99", "policy mean", "|objective| max"]
    assert shifts.lines[3].get_ydata()[0] == 1e-3
    assert shifts.get_yscale() == "log"
    assert [text.get_text() for text in shifts.texts] == ["bound 1e-4", "bound 0.01"]
    assert rejection.get_legend_handles_labels()[1] == ["total", "by policy shift"]
    for axes in (accuracy, shifts, rejection):
        legend, box = axes.get_legend(), axes.get_window_extent()
        assert legend is not None
        texts = [axes.title, axes._left_title, *legend.get_texts(), *axes.texts]
        boxes = [text.get_window_extent() for text in texts if text.get_text()]
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert not any(text.get_window_extent().overlaps(box) for text in axes.texts)  # beside, on no curve


def test_the_title_says_what_ran_and_how_it_ended(tmp_path):
    said = (
        "capo · tiny · arithmetic\n"
        "aggressive · learning rate 1e-4 · 12 prompts x 8 completions a step · seed 3"
    )
    assert run_title(write_run(tmp_path, 3)) == said
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished"}))
    planned = CONFIG | {"num_steps": 200}
    assert run_title(write_run(tmp_path, 200, planned)) == said
    early = write_run(tmp_path, 31, planned, **{"counter/unrewarded_steps": 20})
    assert run_title(early) == f"{said}\nstopped, no reward after 31 of 200 steps"
    (tmp_path / "run.json").write_text(json.dumps({"status": "failed"}))
    assert outcome(load_run(tmp_path)) == "failed"


def test_a_few_steps_are_not_smoothed_and_a_title_is_no_formula(tmp_path):
    run = write_run(tmp_path, 9, CONFIG | {"algo": {"name": r"a$\foo$"}})
    axes = Figure().subplots()
    plots.draw_accuracy(axes, run)
    assert axes.get_legend_handles_labels()[1][0] == "training, each step"
    assert plot_run(tmp_path).is_file()
