"""Sweeps: a job is a process with its configuration, log and GPU; a bad one leaves the others going."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from joblib.externals.loky import get_reusable_executor

from capo_exp.cli import front
from capo_exp.config.schema import conf_dir
from capo_exp.runs.identity import run_dir
from capo_exp.runs.lock import locked
from capo_exp.runs.record import run_status
from capo_exp.sweep import job, processes, sweep
from capo_exp.training import loop as train
from tests.pieces import logged, run_training
from tests.process_pieces import wait_for

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import json, os, pathlib, signal, sys, time, yaml
c = yaml.safe_load(sys.stdin)
print("seed", c["seed"], "rate", c["regime"]["learning_rate"], flush=True)
folder = pathlib.Path(os.readlink("/proc/self/fd/1")).parent
def record(status):
    (folder / "run.json").write_text(json.dumps({"status": status, "error": None}))
pathlib.Path("jobs.txt").open("a").write(f"{os.getpid()} {c['seed']} {c['regime']['learning_rate']}\\n")
"""
"""A job that stands in for training: says its seed, does what the test adds; its log lies in its folder."""
ENDS = "record('finished')\n"


@pytest.fixture
def work_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


@pytest.fixture
def run(work_dir, monkeypatch):
    """Runs a sweep whose jobs are CHILD and some more lines; returns the exit status."""

    def run_here(lines, *arguments):
        monkeypatch.setattr(processes, "COMMAND", (sys.executable, "-c", CHILD + lines))
        return run_training("-m", *arguments)

    return run_here


def jobs():
    return [line.split() for line in Path("jobs.txt").read_text().splitlines()]


@pytest.mark.slow
def test_jobs_that_die_leave_the_others_going_and_the_same_command_repeats_them_alone(run, capfd):
    dies = "if c['seed'] in (0, 1):\n    print('out of luck', flush=True)\n"
    dies += "    raise SystemExit(1) if c['seed'] else os.kill(os.getpid(), signal.SIGKILL)\n"
    assert run(dies + ENDS, "seed=0,1,2", "num_steps=7") == 1
    assert [seed for _, seed, _ in jobs()] == ["0", "1", "2"]
    assert len({pid for pid, *_ in jobs()} | {str(os.getpid())}) == 4  # each has a process and a log
    logs = [path.read_text() for path in Path("outputs/default").glob("*/log.txt")]
    assert len(logs) == 3 and all("seed" in log for log in logs)
    assert not list(Path("outputs/default").glob(".*")) and sweep.FOLDER not in os.environ
    out = capfd.readouterr().out
    assert "job 2/3: seed=2\n" in out  # num_steps is the same in all
    assert "seed 2 rate 0.0001\n" in out  # what the job says is shown
    told, table = out.index("job 1 failed with exit status"), out.index("1: seed=1")
    assert told < out.index("job 2/3") < table  # at once, and at the end
    assert "log.txt" in out[table:] and "out of luck" in out[table:]
    assert out[table:].count("finished") == 1 and out[:table].count("0: seed=0") == 1
    assert run(ENDS, "seed=0,1,2", "num_steps=7") == 0
    assert run(ENDS, "seed=2", "num_steps=7", "overwrite=true") == 0
    assert [seed for _, seed, _ in jobs()][3:] == ["0", "1", "2"]


def test_wrong_jobs_are_told_before_the_first_starts(run, capfd):
    assert run(ENDS, "seed=0", "regime.group_size=8,1") == 2
    assert [seed for _, seed, _ in jobs()] == ["0"]
    captured = capfd.readouterr()
    wrong = [line for line in captured.err.splitlines() if "cannot run" in line]
    assert [line[:5] for line in wrong] == ["job 1"]
    assert "regime.group_size=1: expected at least 2" in captured.out.partition("run  ")[2]


@pytest.mark.slow
def test_edits_made_while_the_sweep_runs_do_not_reach_its_jobs(run, work_dir, monkeypatch):
    """Neither those of conf/ nor those of a user's own folder; the next sweep sees them."""
    conf = Path(shutil.copytree(conf_dir(), work_dir / "conf"))
    monkeypatch.setattr(front, "conf_dir", lambda: conf)
    own = work_dir / "own" / "regime" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text((conf / "regime" / "aggressive.yaml").read_text().replace("mul:5", "mul:10"))
    arguments = ["--config-dir", "own", "regime=aggressive,mine"]
    edited = ["conf/config.yaml", "own/regime/mine.yaml"]
    edits = f"for path in {edited}:\n    pathlib.Path(path).write_text('broken: [')\n"
    assert run(edits + ENDS, *arguments) == 0
    assert [rate for *_, rate in jobs()] == ["0.0001", "0.0002"]
    assert run(ENDS, *arguments) == 2


@pytest.mark.slow
@pytest.mark.parametrize(("state", "status"), [("interrupted", 130), ("finished", 0)])
def test_an_interrupt_lets_the_job_end_and_starts_no_other(work_dir, state, status):
    """Also if it comes in the job's last step."""
    waits = f"signal.signal(signal.SIGINT, lambda *_: (record('{state}'), os._exit({status})))\n"
    waits += "pathlib.Path('ready').touch(); time.sleep(60)\n"
    command = f"processes.COMMAND = ({sys.executable!r}, '-c', {CHILD + waits!r})"
    start = f"from capo_exp.sweep import processes; {command}\n"
    start += "from capo_exp.cli.front import run_training; raise SystemExit(run_training())"
    command = [sys.executable, "-c", start, "-m", "seed=0,1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(Path("ready").exists)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert len(jobs()) == 1
    (directory,) = Path("outputs/default").glob("capo-*")
    assert run_status(directory) == state
    assert "0: seed=0" in out and state in out[out.index("0: seed=0") :]
    assert "1 of 2 jobs have not run; the same command goes on" in out


@pytest.mark.slow
def test_two_sweeps_over_one_grid_share_the_work(run, composed, capfd):
    """What another is at, also if it began in the same moment, is left to it and is no failure."""
    with locked(run_dir(composed("seed=0"))):
        assert run(ENDS, "seed=0,1") == 0
    assert [seed for _, seed, _ in jobs()] == ["1"]
    assert capfd.readouterr().out.count("another process is at this run, which is left to it") == 1
    late = "from capo_exp.runs.lock import locked\n"
    late += "if c['seed'] == 3:\n    os.system(f'flock -x {folder}/.lock sleep 3 &')\n"
    late += "    time.sleep(1)\n    sys.exit(2)\n"
    assert run(late + ENDS, "seed=2,3") == 0
    assert capfd.readouterr().out.count("is left to it") == 1


@pytest.mark.slow
def test_a_failed_job_is_one_line(run, capfd):
    """Hydra's variable, set for its own sake, does not make the jobs print tracebacks."""
    fails = "from capo_exp.config.errors import RunFailed\nfrom capo_exp.sweep.job import report\n"
    fails += "print('said before', flush=True)\n"
    assert run(fails + "raise SystemExit(report(RunFailed('no luck')))\n", "seed=0,1") == 1
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    assert captured.out.count("no luck") == 4  # of each as it ends, and in the table
    assert captured.out.count("said before") == 2  # as it ends alone
    assert captured.err == ""  # of Hydra's, too


@pytest.mark.slow
def test_with_joblib_jobs_run_at_a_time(work_dir, monkeypatch, capfd):
    """In two processes of joblib's, of which each says its job."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    arguments = ["seed=0,1", "plan_only=true", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert run_training("-m", *arguments) == 0
    get_reusable_executor().shutdown()
    out = capfd.readouterr().out
    assert out.count("completions a step") == 2
    assert {"job 0/2: seed=0", "job 1/2: seed=1"} <= set(out.splitlines())


def test_a_gpu_has_one_job_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.tempfile, "gettempdir", lambda: str(tmp_path))
    late: list[str | None] = []
    with ExitStack() as all_of_them:
        first = ExitStack()
        taken = [processes.take_device(["3", "5", "5"], stack) for stack in (first, all_of_them, all_of_them)]
        assert taken == ["3", "5", "5"]
        waiter = threading.Thread(
            target=lambda: late.append(processes.take_device(["3", "5", "5"], all_of_them))
        )
        waiter.start()
        time.sleep(0.5)
        assert not late
        first.close()
        waiter.join(timeout=30)
        assert late == ["3"]
        assert processes.take_device([], all_of_them) is None


def test_jobs_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    threads = [processes.environment(None, n).get("OMP_NUM_THREADS") for n in (1, 2, 3, 16, -1)]
    assert threads == [None, "4", "2", "1", "1"]
    assert processes.environment("2,3", 1)["CUDA_VISIBLE_DEVICES"] == "2,3"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert processes.environment(None, 2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.slow
def test_training_in_a_sweep_is_the_same_as_alone(
    work_dir, composed, monkeypatch,
    capfd,
):  # fmt: skip
    small = [
        "num_steps=2", "regime.prompts_per_step=2", "regime.group_size=2", "model.micro_batch_size=4",
        "evaluation.num_problems=4", "dataset.max_completion_tokens=16", "logger=files",
    ]  # fmt: skip
    assert run_training(*small, "-m", "seed=3", "experiment_name=sweep") == 0
    alone = train.run(composed(*small, "seed=3", "experiment_name=alone"))
    swept = Path("outputs/sweep") / alone.name
    assert logged(alone / "metrics.jsonl") == logged(swept / "metrics.jsonl")
    assert "evaluation after step 2" in (swept / "log.txt").read_text()
    monkeypatch.setattr(sys, "argv", ["job", "own=true"])
    monkeypatch.setattr(sys, "stdin", io.StringIO((swept / "config.yaml").read_text()))
    assert job.main() == 0  # a recorded configuration runs again, by itself
    assert "this run is finished" in capfd.readouterr().out


def test_a_search_gets_the_last_evaluation(composed, tmp_path):
    config = composed(f"output_dir={tmp_path}")
    run_dir(config).mkdir(parents=True)
    assert sweep.objective(config) is None
    (run_dir(config) / "eval.jsonl").write_text('{"eval/accuracy": 0.25}\n{"eval/accuracy": 0.75}\n{"eval/')
    assert sweep.objective(config) == 0.75
    (run_dir(config) / "metrics.jsonl").write_text('{"reward/accuracy": 0.5}\n')
    assert sweep.objective(composed(f"output_dir={tmp_path}", "sweep.objective=reward/accuracy")) == 0.5


def test_a_run_that_another_process_is_at_has_no_score_yet(run, composed, monkeypatch):
    directory, ended = run_dir(composed("seed=0")), []
    directory.mkdir(parents=True)
    (directory / "eval.jsonl").write_text('{"eval/accuracy": 0.25}\n')
    monkeypatch.setattr(sweep, "_record", ended.append)
    with locked(directory):
        run(ENDS, "seed=0")
    assert [(job.state, job.score) for job in ended] == [("running", None)]


def test_the_best_of_a_search_is_the_first_with_the_largest_score():
    scores = (0.5, None, 0.7, 0.7)
    jobs = [sweep.EndedJob(i, "", "", "finished", score=score) for i, score in enumerate(scores)]
    best = sweep.find_best(jobs)
    assert best is not None and best.number == 2 and sweep.find_best(jobs[1:2]) is None


@pytest.mark.slow
def test_optuna_proposes_the_same_jobs_again(run, capfd):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    lines = """
score = -abs(c["regime"]["learning_rate"] - 2e-4)
(folder / "eval.jsonl").write_text(json.dumps({"counter/rollout_step": 0, "eval/accuracy": score}) + "\\n")
if len(pathlib.Path("jobs.txt").read_text().splitlines()) == 2:
    raise SystemExit(1)
record('finished')
"""
    search = ["experiment=paper/capo", "scale=tiny", "hparams_search=bounds", "hydra.sweeper.n_trials=3"]
    assert run(lines, *search) == 0  # a failed trial does not end the search
    first = [rate for *_, rate in jobs()]
    assert len(set(first)) == 3
    shown = capfd.readouterr().out
    assert "failed with exit status 1" in shown
    nearest = min((rate for rate in first if rate != first[1]), key=lambda rate: abs(float(rate) - 2e-4))
    assert re.search(rf"best eval/accuracy: .*, job \d: .*regime\.learning_rate={re.escape(nearest)}", shown)
    assert run(lines, *search) == 0  # goes on: those that ended are not repeated
    assert [rate for *_, rate in jobs()][3:] == [first[1]]
    best = Path("outputs/paper_capo-tiny-bounds/optimization_results.yaml").read_text()
    nearest = min(first, key=lambda rate: abs(float(rate) - 2e-4))
    assert f"regime.learning_rate: {nearest}" in best
