"""The jobs of a sweep, each in a process of its own. Hydra's sweeper lists them and its launcher starts them;
here they get the YAML files as they were at the start, a process, a log and a GPU, and are reported.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.checks import check
from capo_exp.config.choices import refuse_sweep, without_hydra
from capo_exp.config.errors import ConfigError, same_command
from capo_exp.config.plan import plan
from capo_exp.config.schema import TrainConfig, to_config
from capo_exp.runs.files import write_atomic
from capo_exp.runs.identity import run_dir
from capo_exp.runs.lock import is_locked
from capo_exp.runs.read import read_jsonl
from capo_exp.runs.record import begins_anew, run_status
from capo_exp.sweep.job import report
from capo_exp.sweep.processes import environment, read_last_line, say, take_device, wait_for_job
from capo_exp.sweep.table import RunSummary, console, runs_table, summarise_run

FOLDER = "CAPO_EXP_SWEEP"
"""Environment variable: what the processes of one sweep share; a launcher hands it on to its workers."""
CHECKED_JOBS, CHECK_SECONDS = 500, 20.0
"""Most jobs that are checked before the first starts, and how long it may take."""


class JobFailed(Exception):
    """A job ended in an error, already reported; the sweep goes on and exits with its status."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


@dataclass(frozen=True)
class EndedJob:
    """How a job ended."""

    number: int
    title: str
    directory: str  # Empty if the configuration gave none
    state: str  # finished | failed | interrupted | planned
    details: str = ""
    """For a failed one, the error or the last line of its log."""
    score: float | None = None
    """What a search maximises, config.sweep.objective at the end; None if it has not finished."""
    objective: str = ""


class Submission(Callback):
    """Hydra tells it that a sweep begins; named in conf/config.yaml."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Keeps the YAML files as they are now, and tells which jobs cannot run before the first does."""
        sweep_dir = Path(config.hydra.sweep.dir)
        try:
            sweep_dir.mkdir(parents=True, exist_ok=True)
        except OSError:
            return  # the sweeper makes it next, and ends with this error
        folder = Path(tempfile.mkdtemp(prefix=".sweep-", dir=sweep_dir)).resolve()
        os.environ[FOLDER] = str(folder)
        loader: Any = GlobalHydra.instance().config_loader()
        read_from_copies(loader, folder)
        jobs: list[list[str]] = []
        wrong: dict[int, str] = {}
        # The sweeper reads and composes all next, and says what is wrong.
        with suppress(HydraException, OmegaConfBaseException, ValueError):
            jobs = list_jobs(config, loader)
            _find_wrong(loader, config, jobs, wrong)
        shared = set.intersection(*map(set, jobs)) if len(jobs) > 1 else set()
        again = same_command(any("overwrite=true" in job for job in jobs))
        about = {"count": len(jobs), "shared": sorted(shared), "wrong": wrong, "again": again}
        write_atomic(folder / "jobs.json", json.dumps(about))


def _find_wrong(loader: Any, config: DictConfig, jobs: Sequence[list[str]], wrong: dict[int, str]) -> None:
    """Checks the jobs before the first starts, for as long as someone would wait, and adds what is wrong."""
    began = time.monotonic()
    for number, overrides in enumerate(jobs):
        try:
            job = loader.load_sweep_config(config, overrides)  # several experiments may each sweep
            refuse_sweep(job.hydra.sweeper.params or {}, overrides)
            check(to_config(without_hydra(job)))
        except ConfigError as error:
            wrong[number] = str(error)
            sys.stderr.write(f"job {number} cannot run: {error}\n")
        if number == 0:
            began = time.monotonic()  # the first waited for torch
        seconds = time.monotonic() - began
        if number + 1 < len(jobs) and (number == CHECKED_JOBS or (number >= 3 and seconds > CHECK_SECONDS)):
            about = timedelta(seconds=round(seconds / number * len(jobs)))
            text = f"the first {number + 1} of {len(jobs):,} jobs are checked; Hydra composes all of them"
            sys.stderr.write(f"{text} before the first starts, in about {about}\n")
            return


def read_from_copies(loader: Any, folder: Path) -> None:
    """Makes Hydra compose from copies of conf/ and a user's own folder, so that edits reach no job."""
    path = loader.get_search_path()
    for number, element in enumerate(path.get_path()):
        original = element.path.removeprefix("file://") if element.path else ""
        if element.provider in ("main", "command-line"):
            element.path = f"file://{shutil.copytree(original, folder / str(number))}"
    loader.repository.initialize_sources(path)


def list_jobs(config: DictConfig, loader: Any) -> list[list[str]]:
    """Returns the overrides of each job; none where a search proposes them as it goes."""
    if not config.hydra.sweeper._target_.endswith(".BasicSweeper"):
        return []
    swept = [f"{key}={values}" for key, values in (config.hydra.sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=loader)
    choices: dict[str, list[str]] = {}  # of two overrides of a key the later one holds, as in Hydra's sweeper
    for override in parser.parse_overrides([*swept, *config.hydra.overrides.task]):
        several = override.is_discrete_sweep()
        values = override.sweep_string_iterator() if several else [override.get_value_element_as_str()]
        choices[override.get_key_element()] = [f"{override.get_key_element()}={value}" for value in values]
    return list(map(list, product(*choices.values())))


def run_job(cfg: DictConfig) -> float | None:
    """One job, from the launcher's process; returns what a search optimises.

    Raises:
        JobFailed: once it is reported.
        KeyboardInterrupt: after a signal, once the job has saved and ended.
    """
    hydra = HydraConfig.get()
    about = _jobs()
    shown = [o for o in hydra.overrides.task if o not in about["shared"]] or hydra.overrides.task
    title = " ".join(shown)
    of = f"/{about['count']}" if about["count"] else ""
    say(f"job {hydra.job.num}{of}: {title}")
    directory = ""
    try:
        if error := about["wrong"].get(str(hydra.job.num)):
            raise ConfigError(error)
        config = to_config(cfg)
        directory = str(run_dir(config))
        state = _run(config, hydra.job.num, parallel=int(hydra.launcher.get("n_jobs") or 1))
        failed = state not in ("finished", "planned", "running")
        score = objective(config) if state == "finished" else None if state == "running" else 0.0
    except Exception as error:
        _record(EndedJob(hydra.job.num, title, "", "failed", str(error)))
        raise JobFailed(report(error)) from None
    except KeyboardInterrupt as stop:
        state = "finished" if stop.args == (0,) else "interrupted"  # 0: told to stop in its last step
        _record(EndedJob(hydra.job.num, title, directory, state))
        raise
    details = read_last_line(Path(directory) / "log.txt") if failed else ""
    ended = EndedJob(hydra.job.num, title, directory, "failed" if failed else state, details)
    _record(replace(ended, score=None if failed else score, objective=config.sweep.objective))
    if failed:
        raise JobFailed(2 if state == "refused" else 1)
    return score


def _run(config: TrainConfig, number: int, *, parallel: int) -> str:
    """Returns finished | planned | running (in another sweep) | refused (a wrong configuration) | failed."""
    if config.plan_only:
        say("\n".join(plan(config)))
        return "planned"
    directory = run_dir(config)
    if run_status(directory) == "finished" and not begins_anew(config):
        say("this run is finished; overwrite=true repeats it")
        return "finished"
    if is_locked(directory):
        return _leave(directory)
    with ExitStack() as stack:
        env = environment(take_device(config.sweep.devices, stack), parallel)
        code = wait_for_job(config, env, echo=parallel == 1)
    if code == 0:
        say(f"job {number} finished: {directory}")
    elif code == 2 and is_locked(directory):  # another began it in this moment
        return _leave(directory)
    else:
        said = "" if parallel == 1 else f": {read_last_line(directory / 'log.txt')}"
        say(f"job {number} failed with exit status {code}: {directory}/log.txt{said}")
    return {0: "finished", 2: "refused"}.get(code, "failed")


def _leave(directory: Path) -> str:
    say(f"another process is at this run, which is left to it: {directory}")
    return "running"


def objective(config: TrainConfig) -> float | None:
    """Returns the last value of config.sweep.objective in the run's files; None if it has logged none."""
    for name in ("eval.jsonl", "metrics.jsonl"):
        values = [row.get(config.sweep.objective) for row in read_jsonl(run_dir(config) / name)]
        if known := [float(value) for value in values if value is not None]:
            return known[-1]
    return None


def conclude() -> bool:
    """Shows what came of the jobs and removes what they shared; returns False for a sweep without a job."""
    folder, results = Path(os.environ.pop(FOLDER, "")), []
    if folder.name:
        about = _jobs(folder)
        count = about["count"]
        results = [EndedJob(**json.loads(path.read_text())) for path in sorted(folder.glob("result_*.json"))]
        shutil.rmtree(folder, ignore_errors=True)
        if shown := [result for result in results if result.state != "planned"]:
            console().print(runs_table(list(map(_line, shown))))
            if not count and (best := find_best(shown)):  # a search, of which Hydra says no number of jobs
                say(f"best {best.objective}: {best.score:.4g}, job {best.number}: {best.title}")
                say(f"its directory: {best.directory}")
        if 0 < len(results) < count:
            say(f"{count - len(results)} of {count} jobs have not run; {about['again']} goes on")
    return not folder.name or bool(results)


def find_best(results: Sequence[EndedJob]) -> EndedJob | None:
    """Returns the job with the largest score; of equal ones the first, None if no job has one."""
    scored = [result for result in results if result.score is not None]
    return max(scored, key=lambda result: (result.score, -result.number), default=None)


def _line(result: EndedJob) -> RunSummary:
    directory = Path(result.directory)
    known = RunSummary("", "", 0, None, None, None, None, None, None)
    if result.directory and (directory / "run.json").exists():
        known = summarise_run(directory)
    log_file = [str(directory / "log.txt")] if result.directory and result.details else []
    error = "\n".join([*log_file, result.details]) or None
    return replace(known, name=f"{result.number}: {result.title}", state=result.state, error=error)


def _jobs(folder: Path | None = None) -> dict[str, Any]:
    known = {"count": 0, "shared": [], "wrong": {}}
    with suppress(OSError):
        known = json.loads(((folder or Path(os.environ.get(FOLDER, ""))) / "jobs.json").read_text())
    return known


def _record(result: EndedJob) -> None:
    folder = Path(os.environ.get(FOLDER, "?"))
    if folder.is_dir():  # a job that Slurm started again outlives its sweep
        write_atomic(folder / f"result_{result.number:05d}.json", json.dumps(asdict(result)))
