"""One job: check it, show the plan, train, show what came out; whatever goes wrong is an exit status.

`python -m capo_exp.sweep.job < outputs/.../config.yaml` runs a recorded configuration; config/record.py says
what its reader has to name. A sweep starts its jobs so.
"""

import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.checks import check, check_trains
from capo_exp.config.errors import ConfigError, RunFailed
from capo_exp.config.memory import check_memory, find_device
from capo_exp.config.places import typed
from capo_exp.config.plan import plan
from capo_exp.config.record import read_config
from capo_exp.config.schema import TrainConfig
from capo_exp.distributed.world import is_worker, torchrun_size
from capo_exp.runs.files import list_checkpoints
from capo_exp.runs.identity import run_dir
from capo_exp.runs.logger import Draw, try_to_draw
from capo_exp.runs.record import begins_anew, find_shorter, run_status
from capo_exp.sweep.launch import launch, node_number

SHORT_ERRORS = "CAPO_EXP_SHORT_ERRORS"
"""Environment variable. The command line sets HYDRA_FULL_ERROR for Hydra's sake, and this one with it where
the user had not set the first; a sweep's processes inherit both."""


def execute(config: TrainConfig, draw: Draw) -> None:
    """Checks, shows the plan, trains; `draw` makes the pictures of a run directory.

    Raises:
        ConfigError: The configuration is wrong; nothing was written.
    """
    given = is_worker()  # of a torchrun that somebody else started
    if given:
        config = replace(config, distributed=torchrun_size(config.distributed))
    check(config)
    check_trains(config)
    if given:
        _train_as_worker(config, draw)
        return
    sys.stdout.write("".join(f"{line}\n" for line in plan(config)))
    sys.stdout.flush()
    if config.plan_only:
        return
    if run_status(run_dir(config)) == "finished" and not begins_anew(config):
        sys.stdout.write("this run is finished; overwrite=true repeats it\n")
        show(run_dir(config), draw)
        return
    _ = config.model.architecture  # refuses a model that cannot be read
    if not config.allow_overcommit:
        check_memory(config, find_device(config.device))
    if run_status(run_dir(config)) == "absent":
        sys.stdout.writelines(f"{line}\n" for line in compare_with_shorter(config))
    if config.distributed.name != "single":
        launch(config, "train")
        if node_number() in (None, 0) or config.distributed.nodes == 1:
            show(run_dir(config), draw)
        return
    from capo_exp.training.loop import run  # torch, so only now

    show(run(config, draw), draw)


def _train_as_worker(config: TrainConfig, draw: Draw) -> None:
    from capo_exp.training.loop import run

    directory = run(config, draw)
    if os.environ["RANK"] == "0":
        show(directory, draw)


def compare_with_shorter(config: TrainConfig) -> list[str]:
    """Says that a shorter run of this configuration is finished, and why this one begins anew."""
    shorter = find_shorter(config)
    if not shorter:
        return []
    steps, directory = max(shorter.items())
    schedule = config.optimizer.schedule
    why = f"the {schedule} schedule of its rate spans num_steps"
    if schedule == "constant":
        why = f"it takes the same {steps} steps again, since a run has one length"
    lines = [f"{steps} steps of this are finished: {directory}", f"this run begins at step 0: {why}"]
    checkpoints = list(list_checkpoints(directory).values())
    going_on = "to train on from its weights, with a schedule of their own:"
    return [*lines, *(f"{going_on} {typed('model.path', checkpoint)}" for checkpoint in checkpoints[-1:])]


def show(directory: Path, draw: Draw) -> None:
    """Says what came out of a run and where it is; draws it if that is lacking."""
    from capo_exp.runs.console import summary_lines

    if not (directory / "run.png").exists():
        try_to_draw(draw, directory)
    sys.stdout.write("".join(f"{line}\n" for line in summary_lines(directory)))


def full_error() -> bool:
    """Returns whether the user wants the traceback of every error."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1" and not os.environ.get(SHORT_ERRORS)


def report(error: Exception) -> int:
    """Writes an error to stderr, and returns the exit status."""
    text, status = describe(error)
    sys.stderr.write(text)
    return status


def describe(error: Exception) -> tuple[str, int]:
    """Returns the text of an error, of one that was foreseen without its traceback, and the exit status."""
    wrong_config = isinstance(error, ConfigError)
    foreseen = (wrong_config or isinstance(error, RunFailed)) and not full_error()
    text = f"{error}\n" if foreseen else "".join(traceback.format_exception(error))
    return text, 2 if wrong_config or isinstance(error, HydraException | OmegaConfBaseException) else 1


def main() -> int:
    """Runs the configuration on standard input."""
    from capo_exp.cli.front import draw_run, exit_status

    return exit_status(lambda: execute(read_config(sys.stdin.read(), sys.argv[1:]), draw_run))


if __name__ == "__main__":
    raise SystemExit(main())
