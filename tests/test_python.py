"""The harness from Python."""

import os
import subprocess
import sys

import pytest

import capo_exp

SHORT = (
    "num_steps=2", "regime.prompts_per_step=2", "regime.group_size=2", "dataset.max_completion_tokens=4",
    "evaluation.num_problems=1", "logger=files", "logger.completions_every=1", "device=cpu",
    "dataset.source.num_train=64", "dataset.source.num_eval=8",
)  # fmt: skip


def test_importing_is_light_and_every_name_is_there():
    code = "import capo_exp, sys; print({'torch', 'hydra', 'numpy'} & set(sys.modules), capo_exp.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"set() {capo_exp.__version__}\n" and capo_exp.__version__[0].isdecimal()
    for name in capo_exp.__all__:
        assert getattr(capo_exp, name) is not None
    assert set(dir(capo_exp)) == set(capo_exp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'tran'"):
        capo_exp.tran  # noqa: B018


LOGGING = """
import sys
from pathlib import Path
import capo_exp.runs.checkpoint, capo_exp.runs.console, capo_exp.runs.record
from capo_exp.figures import curves, stats
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.read import find_runs, load_run
with RunLogger(Path(sys.argv[1]), resume_step=0, wandb_mode="disabled") as logger:
    logger.log_step({"counter/rollout_step": 1, "counter/completions": 96})
curves.curves([load_run(path) for path in find_runs(sys.argv[1:])], mix=False)"""
LIGHT = {
    "from capo_exp.grading import Grade, grade, verifier": {"torch", "math_verify", "sympy"},
    "import capo_exp.rollout.vllm_settings": {"torch"},  # a wrong one ends in under a second
    LOGGING: {"torch", "wandb", "transformers", "datasets", "pandas", "matplotlib.pyplot"},
}


@pytest.mark.parametrize("code", LIGHT, ids=["grading", "settings", "logging"])
def test_what_needs_no_torch_loads_none(code, tmp_path):
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)", str(tmp_path)]
    environment = os.environ | {"MPLBACKEND": ""}  # nor a display
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert not LIGHT[code] & set(done.stdout.split())


@pytest.mark.slow
def test_a_run_and_its_tables(tmp_path):
    first = capo_exp.train("algo=grpo", *SHORT, f"output_dir={tmp_path}")
    again = capo_exp.train("algo=grpo", *SHORT, f"output_dir={tmp_path}")
    assert again.path == first.path and first.state == "finished" and len(first.metrics) == 2
    capo_exp.train("algo=capo", "seed=1", *SHORT, f"output_dir={tmp_path}")
    runs = capo_exp.load_runs(tmp_path, settings=["algo.name", "seed"])
    assert [run.name for run in runs.runs] == sorted(run.name for run in runs.runs) and len(runs.runs) == 2
    metrics = runs.metrics.to_pydict()
    assert sorted(zip(metrics["algo.name"], metrics["seed"], strict=True)) == [
        ("capo", 1), ("capo", 1), ("grpo", 0), ("grpo", 0),
    ]  # fmt: skip
    place = metrics["algo.name"].index("grpo")
    assert metrics["loss/total"][place : place + 2] == [row["loss/total"] for row in first.metrics]
    assert runs.evaluations.num_rows == 4 and "eval/accuracy" in runs.evaluations.column_names
    completions = runs.completions(step=2)
    assert set(completions["step"].to_pylist()) == {2} and completions.num_rows == 8
    assert {"run", "seed", "completion", "policy_shift"} <= set(completions.column_names)
    assert runs.completions().num_rows == 16
    scores = capo_exp.evaluate(f"run={first.path}", "num_problems=3", "checkpoint=all", "device=cpu")
    assert [score.step for score in scores] == [2, 0] and scores[0].benchmark == "arithmetic"
    assert scores[0].scores["problems"] == 3 and len(scores[0].accuracies) == 3
    assert (
        capo_exp.evaluate(f"run={first.path}", "num_problems=3", "device=cpu") == scores
    )  # read, not sampled


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=capoo"], "algo=capoo: unknown choice"),
        (["seed=0,1"], "seed"),
        (["experiment=study/criterion"], "expected one of them, since this is one run"),
        (["algo.token_loss._target_=os.system"], "algo.token_loss._target_=os.system: expected a function"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(overrides, message, tmp_path):
    with pytest.raises(capo_exp.ConfigError, match=message) as raised:
        capo_exp.train(*overrides, f"output_dir={tmp_path}")
    assert "\n" not in str(raised.value) and not any(tmp_path.iterdir())


def test_a_folder_of_ones_own_is_one_that_is_there(tmp_path):
    for folder in (tmp_path / "no", f"{tmp_path}/no"):
        with pytest.raises(capo_exp.ConfigError, match="no such folder"):
            capo_exp.train("algo=grpo", config_dir=folder)


def test_an_evaluation_that_is_wrong_is_one_line(tmp_path):
    for overrides, message in (
        (["run=nowhere"], "nowhere: no such file"),
        (["completions=x.parquet"], "completions=x.parquet: expected run= or model="),
        (["model=tiny", "benchmarks=arithmetic", "samples=0"], "samples=0: expected"),
    ):
        with pytest.raises(capo_exp.ConfigError, match=message):
            capo_exp.evaluate(*overrides, f"output={tmp_path}")
