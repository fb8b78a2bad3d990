"""Run directories whose curves are known by construction, with the configs of the real experiments."""

import json
from dataclasses import asdict, replace
from functools import cache

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from capo_exp.figures.curves import curves
from capo_exp.figures.study import Study
from capo_exp.runs import metrics as names
from capo_exp.runs.identity import run_id, run_name
from capo_exp.runs.read import load_run
from tests.conftest import compose_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"
"""Training completions and seed -> accuracy."""

FIGURE_1 = ("grpo_conservative", "grpo_aggressive", "capo", "zero_learning_rate")
# Garbage of earlier tests may be collected in these: W&B never waits for its process where it was killed.
NO_WARNINGS = pytest.mark.filterwarnings("error", "ignore:subprocess [0-9]+ is still running:ResourceWarning")
PAPER = (
    *FIGURE_1, "dr_grpo_aggressive", "reinforce_aggressive", "dr_capo", "rein_capo",
    "capo_sgd", "dr_capo_sgd", "rein_capo_sgd", "capo_policy_bound", "capo_objective_bound",
    *(f"figure_7 algo.num_iterations=2 algo.token_loss.clip_eps_low={clip}" for clip in (0.2, 0.02)),
    "figure_7 algo.num_iterations=5", "figure_8 algo=grpo algo.kl_coefficient=0.1",
    "figure_8 algo=dr_grpo algo.kl_coefficient=0.1",
)  # fmt: skip
"""Jobs that every figure finds something in: an experiment of the tiny model and its overrides."""


@cache
def config_of(job):
    experiment, *overrides = job.split()
    return compose_config(f"experiment=paper/{experiment}", "scale=tiny", *overrides)


def steady(x, seed):
    """0.4 at the start, 0.1 more every 10,000 completions; odd seeds 0.02 above even ones."""
    return 0.4 + 1e-5 * x + 0.02 * (seed % 2)


def write_run(
    root, job, seed = 0, *, accuracy = steady, steps = None,
    without = (),
):  # fmt: skip
    """The record of one run; `without` some metrics."""
    config = replace(config_of(job), seed=seed)
    folder = root / run_name(config)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.dump(asdict(config)))
    git = {"commit": COMMIT, "dirty": False}
    record = {"run_id": run_id(config), "status": "finished", "git": git, "data": "d0"}
    (folder / "run.json").write_text(json.dumps(record))
    count = config.num_steps if steps is None else min(steps, config.num_steps)
    rows = [metrics(step, config, seed, accuracy) for step in range(1, count + 1)]
    kept = [{key: value for key, value in row.items() if key not in without} for row in rows]
    write_jsonl(folder / "metrics.jsonl", kept)
    marks = [0, *range(10, count + 1, 10)]
    write_jsonl(folder / "eval.jsonl", [evaluation(step, config, seed, accuracy) for step in marks])
    (folder / "evaluations").mkdir()
    write_jsonl(
        folder / "evaluations" / "test.jsonl",
        [evaluation(step, config, seed, accuracy, key="test/accuracy") for step in marks[::5]],
    )
    if config.algo.selection["_target_"].endswith("shift_bounds"):
        write_completions(folder / "completions" / "step_000010.parquet")
    return folder


def write_study(root, jobs, seeds=2, **more):
    """Runs of several jobs, each with several seeds."""
    for job in jobs:
        for seed in range(seeds):
            write_run(root, job, seed, **more)
    return root


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def metrics(step, config, seed, accuracy):
    """A row of metrics.jsonl with every key that is documented."""
    x = step * config.regime.prompts_per_step * config.regime.group_size
    logged = [key for key in names.METRICS if not key.startswith(("eval/", "test/", "time/"))]
    return dict.fromkeys(logged, 0.1) | {
        "counter/rollout_step": step, "counter/optimizer_step": step * config.algo.num_iterations,
        "counter/completions": x, "counter/generated_tokens": 30 * x, "counter/unrewarded_steps": 0,
        "rollout/sampling_rounds": 1,
        "reward/accuracy": accuracy(x, seed), "policy/grad_norm": step * (1.0 + seed),
        "curvature/batch/policy_shift": 1e-7 * step, "time/total_seconds": 2.0,
        "time/rollout_seconds": 1.0, "time/curvature_seconds": 0.25,
    }  # fmt: skip


def evaluation(step, config, seed, accuracy, *, key="eval/accuracy"):
    x = step * config.regime.prompts_per_step * config.regime.group_size
    counters = {names.STEP: step, names.COMPLETIONS: x, "counter/optimizer_step": step}
    return {**counters, key: accuracy(x, seed)}


def write_completions(path):
    """Two completions: `a` five times, rejected twice; ` $b_` once, rejected; `c` once, kept."""
    path.parent.mkdir()
    columns = {
        "token_ids": [[1, 1, 1, 2], [1, 1, 3]],
        "tokens": [["a", "a", "a", " $b_"], ["a", "a", "c"]],
        "keep": [[True, False, True, False], [True, False, True]],
    }
    pq.write_table(pa.table(columns), path)


def study_in(root, **more):
    """The runs below a folder, not smoothed."""
    runs = tuple(load_run(path.parent) for path in sorted(root.rglob("run.json")))
    asked = {"statistic": "mean", "interval": "bootstrap", "smoothing": 1.0, "x": None, **more}
    return Study(runs=runs, curves=tuple(curves(runs, mix=True)), **asked)
