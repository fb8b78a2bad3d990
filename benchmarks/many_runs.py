"""The jobs of a sweep on one GPU, several at a time, within a time limit; all metrics in one table.

Each job is a `python -m capo_exp` of its own; on a GPU they share it through CUDA MPS where that can be
started. Jobs start in the order of the sweep, those that finished before are not repeated, and what the limit
stops goes on by the same command. Weights of runs that have ended are removed.

    python benchmarks/many_runs.py experiment=study/real_rates --parallel 14 --seconds 420
    python benchmarks/many_runs.py algo=grpo,capo num_steps=2 --device cpu --parallel 2
    python benchmarks/many_runs.py algo=grpo seed=0,1 and algo=capo seed=0     # one sweep after the other

Writes under --folder: a run directory a job, runs.parquet (run, overrides, state, then the metric keys; a row
an optimiser step), evaluations.parquet and jobs.json.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from capo_exp.config.schema import conf_dir, register
from capo_exp.runs.processes import end_with_parent
from capo_exp.runs.read import read_jsonl

MPS = "nvidia-cuda-mps-control"
GRACE_SECONDS = {"cuda": 15.0, "cpu": 120.0}
"""What a job that is stopped has to end its step."""
REPORT_SECONDS = 20.0
PROBE = "import torch; assert torch.zeros(8, device='cuda').sum().item() == 0"


@dataclass
class Job:
    """One run of the sweep."""

    number: int
    overrides: list[str]
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0
    seconds: float = 0.0
    state: str = "waiting"
    """waiting | finished | failed | stopped."""

    def directory(self) -> Path | None:
        """Returns the run directory, once there is one."""
        return next((path.parent for path in sorted(self.folder.glob("*/*/run.json"))), None)

    def finished(self) -> bool:
        """Returns whether the run is whole on disk."""
        found = self.directory()
        return found is not None and json.loads((found / "run.json").read_text())["status"] == "finished"


@dataclass(frozen=True)
class Machine:
    """How jobs are started."""

    common: Sequence[str]
    grace: float
    environment: Mapping[str, str] = field(default_factory=dict)


def list_jobs(overrides: Sequence[str], folder: Path) -> list[Job]:
    """Returns the jobs of a sweep in its order; a key given on the command line replaces the sweep's."""
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", [x for x in overrides if _plain(x)], return_hydra_config=True)
    params = config.hydra.sweeper.params or {}
    given = [x.partition("=")[0] for x in overrides]
    lines = [*(f"{key}={values}" for key, values in params.items() if key not in given), *overrides]
    grid = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(lines), None)[0]
    keys = dict.fromkeys(line.partition("=")[0] for line in lines)
    swept = [key for key in keys if len({_value(job, key) for job in grid}) > 1]
    names = ["-".join([*(_value(job, key) for key in swept), _digest(job)]) for job in grid]
    names = [re.sub(r"[^\w.,-]+", "_", name) for name in names]
    return [Job(i, job, folder / name) for i, (job, name) in enumerate(zip(grid, names, strict=True))]


def _sweeps(words: Sequence[str]) -> list[list[str]]:
    """Splits the words at every `and`."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == "and":
            found.append([])
        else:
            found[-1].append(word)
    return found


def _digest(job: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(sorted(job)).encode()).hexdigest()[:6]


def _plain(override: str) -> bool:
    return "," not in override and "range(" not in override


def _value(job: Sequence[str], key: str) -> str:
    return next((x.partition("=")[2] for x in job if x.partition("=")[0] == key), "")


def start(job: Job, machine: Machine) -> None:
    """Starts a job in a process group of its own, its output in log.txt."""
    job.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "capo_exp", *machine.common, f"output_dir={job.folder}", *job.overrides]
    with (job.folder / "log.txt").open("ab") as log:
        job.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **machine.environment},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    job.began = time.monotonic()


def close(job: Job, state: str) -> None:
    """Notes how a job ended, and frees the disk of weights that nothing goes on from: of one that has failed
    the same command goes on."""
    job.state, job.seconds = state, time.monotonic() - job.began
    for weights in job.folder.glob("*/*/checkpoints") if state == "finished" else ():
        shutil.rmtree(weights, ignore_errors=True)
    if state == "failed":
        lines = (job.folder / "log.txt").read_text(errors="replace").splitlines()[-3:]
        say(f"job {job.number} failed: {' '.join(job.overrides)}: {' | '.join(lines)}")


def stop(jobs: Sequence[Job], grace: float) -> None:
    """Asks running jobs to end, then ends them and what they started."""
    for number, wait in ((signal.SIGTERM, grace), (signal.SIGKILL, 5.0)):
        for job in jobs:
            assert job.process is not None
            if number == signal.SIGKILL or job.process.poll() is None:
                with suppress(ProcessLookupError):
                    (os.kill if number == signal.SIGTERM else os.killpg)(job.process.pid, number)
        until = time.monotonic() + wait
        while time.monotonic() < until and any(job.process and job.process.poll() is None for job in jobs):
            time.sleep(0.1)
    for job in jobs:
        close(job, "finished" if job.finished() else "stopped")


def run_all(jobs: Sequence[Job], machine: Machine, *, parallel: int, seconds: float) -> None:
    """Runs what is not finished, `parallel` at a time; nothing is left running after the limit."""
    began = reported = time.monotonic()
    waiting = [job for job in jobs if not job.finished()]
    for job in jobs:
        job.state = "waiting" if job in waiting else "finished"
    running: list[Job] = []
    try:
        while (waiting or running) and (spent := time.monotonic() - began) < seconds:
            for job in [job for job in running if job.process and job.process.poll() is not None]:
                running.remove(job)
                close(job, "finished" if job.finished() else "failed")
            shortest = min(
                (job.seconds for job in jobs if job.state == "finished" and job.seconds), default=0.0
            )
            while waiting and len(running) < parallel and shortest < seconds - spent:
                start(waiting[0], machine)
                running.append(waiting.pop(0))
            if not running:
                break
            if time.monotonic() - reported > REPORT_SECONDS:
                reported = time.monotonic()
                done = sum(job.state == "finished" for job in jobs)
                steps = sum(len(_rows(job, "metrics.jsonl")) for job in jobs)
                say(f"{spent:5.0f} s: {done} finished, {len(running)} run, {steps} steps; {_gpu()}")
            time.sleep(0.2)
    finally:
        stop(running, machine.grace)


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=memory.used,utilization.gpu", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return "no GPU"


@contextmanager
def shared_gpu() -> Iterator[dict[str, str]]:
    """Gives the environment in which processes share a GPU through MPS; empty where MPS does not work."""
    with tempfile.TemporaryDirectory(prefix="mps") as place:
        own = {"CUDA_MPS_PIPE_DIRECTORY": f"{place}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{place}/log"}
        for folder in own.values():
            Path(folder).mkdir()
        environment = {**os.environ, **own}
        try:
            subprocess.run([MPS, "-d"], env=environment, check=True, capture_output=True, timeout=20)
            subprocess.run(
                [sys.executable, "-c", PROBE], env=environment, check=True, capture_output=True, timeout=60
            )
        except (OSError, subprocess.SubprocessError) as error:
            say(f"no MPS ({error}): jobs take turns on the GPU")
            _quit_mps(environment)
            yield {}
            return
        say("MPS: jobs share the GPU")
        try:
            yield own
        finally:
            _quit_mps(environment)


def _quit_mps(environment: Mapping[str, str]) -> None:
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run([MPS], input=b"quit\n", env=environment, capture_output=True, timeout=20)


def collect(jobs: Sequence[Job], folder: Path) -> None:
    """Writes runs.parquet, evaluations.parquet and jobs.json of all jobs that have begun."""
    for name, source in (("runs", "metrics.jsonl"), ("evaluations", "eval.jsonl")):
        rows = [
            {"run": job.number, "overrides": " ".join(job.overrides), "state": job.state} | row
            for job in jobs
            for row in _rows(job, source)
        ]
        if rows:
            pq.write_table(_table(rows), folder / f"{name}.parquet", compression="zstd")
    about = [
        {"run": job.number, "overrides": job.overrides, "state": job.state, "seconds": round(job.seconds, 1)}
        for job in jobs
    ]
    (folder / "jobs.json").write_text(json.dumps(about, indent=1) + "\n")


def _rows(job: Job, name: str) -> list[dict[str, Any]]:
    found = job.directory()
    return read_jsonl(found / name) if found else []


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Numbers as float32, counters as they are: half the size."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    columns = {key: pa.array([row.get(key) for row in rows]) for key in keys}
    small = {k: c.cast(pa.float32()) if pa.types.is_floating(c.type) else c for k, c in columns.items()}
    return pa.table(small)


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parallel", type=int, default=12, help="jobs at a time")
    parser.add_argument("--seconds", type=float, default=420.0, help="hard limit; 0 = only collect")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--folder", type=Path, default=Path("outputs/many_runs"))
    parser.add_argument("--list", action="store_true", help="show the jobs in order and stop")
    arguments, overrides = parser.parse_known_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell started it in the background
        signal.signal(number, signal.default_int_handler)
    began = time.monotonic()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [job for sweep in _sweeps(overrides) for job in list_jobs(sweep, folder)]
    for number, job in enumerate(jobs):
        job.number = number
    if arguments.list:
        say("\n".join(f"{job.number} {' '.join(job.overrides)}" for job in jobs))
        return 0
    common = ["hydra.mode=RUN", "logger=files", f"device={arguments.device}"]
    cores = len(os.sched_getaffinity(0)) // arguments.parallel
    threads = {"OMP_NUM_THREADS": str(max(1, cores) if arguments.device == "cpu" else 1)}
    machine = Machine(common, GRACE_SECONDS[arguments.device], threads)
    with suppress(KeyboardInterrupt), ExitStack() as stack:
        if arguments.device == "cuda" and arguments.seconds:
            machine = replace(machine, environment=threads | stack.enter_context(shared_gpu()))
        left = arguments.seconds - (time.monotonic() - began)
        run_all(jobs, machine, parallel=arguments.parallel, seconds=left)
    collect(jobs, folder)
    states = [job.state for job in jobs]
    say(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    return int("failed" in states)


if __name__ == "__main__":
    sys.exit(main())
