"""The exporter: W&B's own client against the server of wandb_server.py, and rows known by construction."""

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import wandb
from omegaconf import OmegaConf

from capo_exp.runs.files import write_atomic
from capo_exp.runs.identity import run_name
from capo_exp.runs.logger import RunLogger
from capo_exp.runs.metrics import METRICS
from capo_exp.runs.parse import read_yaml
from capo_exp.runs.read import load_run, read_jsonl
from capo_exp.runs.record import RunRecord, read_record, run_status
from capo_exp.training import loop as train
from scripts.fetch_wandb import RENAMED, export, main, split
from tests.wandb_server import serve

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def server(monkeypatch, tmp_path):
    with serve() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        wandb.teardown()
        yield server
        wandb.teardown()


@pytest.fixture
def logged(composed, tmp_path, server):
    """Two rows that were logged online; gives the run's name."""
    (tmp_path / "here").mkdir()
    config = composed("logger=wandb", "logger.tags=[a]", "experiment_name=sweep")
    RunRecord(tmp_path / "here", config)
    with RunLogger(tmp_path / "here", resume_step=0, wandb_mode="online") as logger:
        logger.log_step(row(1, loss__kl=0.5))
        logger.log_step(row(2, loss__kl=0.25))
    return run_name(config)


@pytest.mark.slow
def test_a_fetched_run_is_what_was_trained(composed, tmp_path, server):
    trained = train.run(
        composed(
            "algo=capo", "logger=wandb", "logger.wandb_mode=online", "num_steps=3", "evaluation.every=2",
            "regime.prompts_per_step=2", "regime.group_size=2", "evaluation.num_problems=2",
            "dataset.max_completion_tokens=8", "curvature.calibrate_every=2", "experiment_name=sweep",
            "dataset.source.num_train=20", "dataset.source.num_eval=4", f"output_dir={tmp_path}/here",
        )
    )  # fmt: skip
    assert main(["me/capo_exp", str(tmp_path / "fetched")]) == 0
    there = tmp_path / "fetched" / "sweep" / trained.name
    files = {"config.yaml", "eval.jsonl", "metrics.jsonl", "run.json"}
    assert {path.name for path in there.iterdir()} == files
    for name in ("metrics.jsonl", "eval.jsonl"):
        assert read_jsonl(there / name) == read_jsonl(trained / name)
    assert OmegaConf.load(there / "config.yaml") == OmegaConf.load(trained / "config.yaml")
    ours, theirs = read_record(trained), read_record(there)
    assert ours and theirs
    same = (
        "run_id", "name", "status", "counters", "seeds", "data", "git", "packages", "device", "started_at",
        "tracker",
    )  # fmt: skip
    assert [theirs[key] for key in same] == [ours[key] for key in same]
    assert theirs["fetched"]["dropped"] == {}
    run = load_run(there)
    assert (run_status(there), run.setting("algo.name"), len(run.metrics)) == ("finished", "capo", 3)


@pytest.mark.slow
def test_a_run_that_is_there_is_left_and_one_that_went_on_is_fetched_again(logged, tmp_path, server, capsys):
    [run] = server.runs.values()
    pages: list[str] = []
    genuine = server.HistoryPage
    server.HistoryPage = lambda **given: pages.append(given["run"]) or genuine(**given)
    command = ["me/capo_exp", str(tmp_path / "fetched")]
    run["state"] = "running"
    assert main(command) == main(command) == 0 and len(pages) == 2
    there = tmp_path / "fetched" / "sweep" / logged
    assert run_status(there) == "interrupted"  # nobody here has it in hand
    run["state"] = "finished"
    assert main(command) == 0 and len(pages) == 3 and run_status(there) == "finished"
    assert main(command) == 0 and len(pages) == 3
    assert capsys.readouterr().out.splitlines()[-2:] == [
        f"{there}: there",
        f"1 of 1 runs are in {command[1]}",
    ]
    assert main([*command, "--set", "algo.variant=x"]) == 0 and len(pages) == 4
    assert load_run(there).setting("algo.variant") == "x"
    (there / "run.json").unlink()  # as if killed before the end
    assert main(command) == 0 and len(pages) == 5 and load_run(there).setting("algo.variant") == ""


def test_filters_choose_runs(logged, tmp_path, server):
    [wandb_id] = server.runs
    for number, (filters, found) in enumerate(
        {
            "--group other sweep": True, "--group other": False, "--tag a": True, "--tag b": False,
            f"--run {wandb_id}": True, "--run none --tag a": False,
        }.items()
    ):  # fmt: skip
        folder = tmp_path / str(number)
        assert main(["me/capo_exp", str(folder), *filters.split()]) == (0 if found else 2)
        assert folder.exists() == found


@pytest.mark.usefixtures("logged")
def test_what_is_wrong_is_one_line(tmp_path, capsys, monkeypatch):
    for command, said in (
        (["capo_exp"], "capo_exp: expected ENTITY/PROJECT, as in the project's URL"),
        (["me/nowhere"], "Could not find project nowhere"),
        (["me/capo_exp", "--group", "none"], "me/capo_exp: no run; expected"),
        (["me/capo_exp"], "expected WANDB_API_KEY"),
    ):
        if "WANDB" in said:
            wandb.teardown()
            monkeypatch.delenv("WANDB_API_KEY")
            monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        capsys.readouterr()
        assert main([command[0], str(tmp_path / "fetched"), *command[1:]]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("wandb: ")]
        assert said in line
    assert not (tmp_path / "fetched").exists()


def test_one_run_that_fails_does_not_stop_the_others(logged, tmp_path, server, capsys):
    [(name, run)] = server.runs.items()
    server.runs = {"broken": {**run, "displayName": "broken"}, name: run}
    genuine = server.RunParquetHistory
    server.RunParquetHistory = lambda **given: {} if given["runName"] == "broken" else genuine(**given)
    assert main(["me/capo_exp", str(tmp_path / "fetched")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("broken (broken): ")
    assert [path.name for path in (tmp_path / "fetched" / "sweep").iterdir()] == [logged]


@dataclass
class Run:
    """What `export` asks of a run."""

    rows: list[dict[str, Any]]
    id: str = "x1"
    name: str = "a/../run 1"
    group: str | None = None
    state: str = "finished"
    config: dict[str, Any] = field(default_factory=lambda: {"seed": 3})
    summary_metrics: dict[str, Any] = field(default_factory=dict)
    created_at: str = "2026-11-21T00:00:00"
    heartbeat_at: str = "2026-11-21T00:00:00"
    url: str = "https://wandb.example/e/p/runs/x1"

    @property
    def path(self):
        return ["e", "p", self.id]

    def scan_history(self):
        return self.rows


def row(step, update=None, **more):
    """`loss__kl` stands for loss/kl."""
    named = {key.replace("__", "/"): value for key, value in more.items()}
    counters = {"counter/rollout_step": step, "counter/completions": 96 * step}
    return {**counters, "counter/optimizer_step": step if update is None else update, **named}


def test_of_steps_that_were_logged_twice_the_last_counts():
    """W&B keeps what a run logged beyond the checkpoint that it went on from."""
    first = [row(step, loss__total=step / 7) for step in (1, 2, 3)]
    again = [row(step, loss__total=step / 9) for step in (2, 3, 4)]
    assert split([*first, *again]).metrics == [first[0], *again]
    assert split([*again, first[0]]).metrics == [first[0], *again]
    inner = [row(1, update, loss__total=update) for update in (1, 2)]
    assert split(inner).metrics == inner


def test_other_numbers_than_ours_are_left_out_and_counted():
    own = {"_step": 4, "_runtime": 2.5, "loss/kl": None}
    logged = {**row(1, loss__total="NaN"), **own, "profiling/x": 1.0, "chart": {"_type": "histogram"}}
    found = split([logged, {**logged, **row(2)}, {"gpu/x": 1, "loss/total": 2.0}])
    assert found.metrics == [row(1, loss__total=None), row(2, loss__total=None)]
    assert found.dropped == {"profiling/x": 2, "chart": 2, "gpu/x": 1, "loss/total": 1}
    [counted] = split([row(2.0, loss__kl=1)]).metrics
    assert {type(value) for value in counted.values()} == {int}


def theirs(step, **more):
    named = {f"train/{key.replace('__', '/')}": value for key, value in more.items()}
    return {"train/global_step": step, "train/num_completions/total": 96.0 * step, **named}


def test_runs_of_the_authors_program_are_translated():
    token, batch = "token_fisher_kl_divergence", "global_fisher_kl_divergence"
    found = split(
        [
            theirs(1, accuracy_reward=0.6, learning_rate=0.0, all_logprobs__p1=-9.0, **{batch: 1e-7}),
            theirs(1, **{token: 1e-5, f"masked_{token}": 1e-9}),
            theirs(2, rewards__accuracy_reward=0.7, curvature_clip_ratio_total_full=0.07),
            theirs(2, token_full_update_term__p99=0.01, **{batch: 9e-7, f"masked_{batch}": 2e-7}),
            {"train/global_step": 2, "test/all/extractive_match": 0.33, "test/custom|gsm8k|0/maj@1": 0.5},
            {"train/global_step": 0, "test/all/extractive_match": 0.32},
            {"train/global_step": 3, "train/learning_rate": 1e-6},
            theirs(4),
        ]
    )
    before, one, two = ({"counter/rollout_step": n, "counter/completions": 96 * n} for n in range(3))
    assert found.metrics == [
        {**one, "reward/accuracy": 0.6, "optim/learning_rate": 0.0, "curvature/batch/policy_shift": 1e-7,
         "curvature/token/policy_shift/mean": 1e-5},
        {**two, "reward/accuracy": 0.7, "selection/rejection_rate": 0.07,
         "curvature/token/objective_shift/p99": 0.01, "curvature/batch/policy_shift": 2e-7},
    ]  # fmt: skip
    assert found.evaluations == [{**before, "eval/accuracy": 0.32}, {**two, "eval/accuracy": 0.33}]
    assert found.dropped == {"train/all_logprobs/p1": 1, "test/custom|gsm8k|0/maj@1": 1}
    assert METRICS.keys() >= RENAMED.keys() and len(RENAMED) > 20


def test_folders_of_runs_with_one_name_and_of_runs_trained_here(tmp_path):
    first, second = Run([row(1, loss__kl=1.0)]), Run([row(1, loss__kl=2.0)], id="x2")
    for run in (first, second, first, second):
        export(run, tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("run.json")) == [
        "p/a_.._run_1-x2/run.json",
        "p/a_.._run_1/run.json",
    ]
    assert read_jsonl(tmp_path / "p" / "a_.._run_1-x2" / "metrics.jsonl")[0]["loss/kl"] == 2.0
    record = read_record(tmp_path / "p" / "a_.._run_1")
    assert record and (record["run_id"], record["seeds"]) == ("x1", {"seed": 3})
    own = tmp_path / "p" / "own"
    own.mkdir()
    write_atomic(own / "run.json", json.dumps({"status": "finished"}))
    with pytest.raises(ValueError, match=f"{own} was trained here; expected another folder"):
        export(Run([], name="own"), tmp_path)
    export(Run([], name="../../x", group="..", config={"template": "${}^2"}), tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"p", "out"}
    fetched = tmp_path / "out" / "unnamed" / "x"
    assert (fetched / "run.json").exists() and read_yaml(fetched / "config.yaml") == {"template": "${}^2"}
