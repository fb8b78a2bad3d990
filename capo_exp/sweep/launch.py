"""Starts a run's processes with torchrun's own launcher, which ends all of them where one fails.

`python -m capo_exp.sweep.launch` is such a process: it trains by the configuration in the folder that it
shares with the launcher, which can ask it there to stop, and to which it leaves word of what went wrong.
"""

import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any

from capo_exp.config.errors import ConfigError, RunFailed, same_command
from capo_exp.config.plugins import allowed_plugins
from capo_exp.config.record import read_config, to_yaml
from capo_exp.config.schema import DistributedConfig, TrainConfig
from capo_exp.distributed.world import FOLDER, STOP
from capo_exp.runs.processes import end_with_parent, stop_signal
from capo_exp.sweep.processes import share_cores

ARGUMENTS = ("-m", "capo_exp.sweep.launch")
CONFIG, FAILURE, SEEN, ENDED = "config.yaml", "failure", "seen", "ended"
"""Files in the folder: what to train, what the process says that failed first, what a probe saw, and that the
first process has closed all it had opened."""
LOST = ("gloo/transport", "NCCL", "Connection closed by peer")
"""In what torch says when another process is gone or silent."""
INTERRUPTED = 130
PATIENCE = 5
"""Seconds that torchrun gives the others to end, once one has failed."""
CLOSING = 60
"""Seconds that the others give the first one to close what it has opened: a tracker above all."""


def launch(config: TrainConfig, task: str) -> str:
    """Starts config.distributed.processes processes on this machine, and waits for their end.

    Args:
        config: what they do it with.
        task: train | probe, in which they compare a sharded model with a whole one.

    Returns:
        What the first process says at the end; empty after training.

    Raises:
        ConfigError: that of the first process that failed, or several nodes know no place to meet.
        RunFailed: likewise; or a process was killed. The message says which.
        KeyboardInterrupt: after a signal, once the step is done and saved.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in ("multiprocessing.api", "agent.server.api"):  # what they tell of failures is said below
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    folder = Path(tempfile.mkdtemp(prefix="capo_exp-world-"))

    def stop(message: str) -> None:
        (folder / STOP).touch()
        sys.stderr.write(f"{message}\n")

    try:
        (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
        os.environ[FOLDER] = str(folder)
        os.environ.setdefault("OMP_NUM_THREADS", share_cores(config.distributed.processes))
        with stop_signal(stop):
            elastic_launch(_meeting(config.distributed), sys.executable)(*ARGUMENTS, task)
        said = folder / SEEN
        return said.read_text(encoding="utf-8") if said.exists() else ""
    except ChildFailedError as failure:
        raise _explain(failure.failures, folder, same_command(config.overwrite)) from None
    finally:
        os.environ.pop(FOLDER, None)
        shutil.rmtree(folder, ignore_errors=True)


def _meeting(config: DistributedConfig) -> Any:
    """Returns torchrun's settings: where the processes of all nodes meet, and that none starts again."""
    from torch.distributed.launcher.api import LaunchConfig

    shared: dict[str, Any] = {
        "nproc_per_node": config.processes,
        "min_nodes": config.nodes,
        "max_nodes": config.nodes,
        "max_restarts": 0,
        "monitor_interval": 0.1,
        "signals_to_handle": "SIGQUIT",  # the others let the step end
    }
    if "shutdown_timeout" in signature(LaunchConfig).parameters:  # not yet in torch 2.11
        shared["shutdown_timeout"] = PATIENCE
    if config.nodes == 1:
        local: dict[str, Any] = {
            "rdzv_backend": "c10d",
            "rdzv_endpoint": "localhost:0",
            "run_id": str(os.getpid()),
        }
        return LaunchConfig(**shared, **local, local_addr="localhost")
    address, number = os.environ.get("MASTER_ADDR") or _first_host(), node_number()
    if address is None or number is None:
        raise ConfigError(
            f"distributed.nodes={config.nodes}: expected MASTER_ADDR, the name of the first node, and "
            "NODE_RANK or SLURM_NODEID in the environment of each node's command, or "
            "hydra/launcher=submitit_slurm (docs/DISTRIBUTED.md)"
        )
    endpoint = f"{address}:{os.environ.get('MASTER_PORT', '29500')}"
    ranks = {"rank": number, "timeout": config.timeout_seconds}
    return LaunchConfig(
        **shared, rdzv_backend="static", rdzv_endpoint=endpoint, rdzv_configs=ranks, run_id="capo_exp"
    )


def node_number() -> int | None:
    """Returns which of several nodes this is, if the environment says so; submitit's local executor, whose
    tasks are on one machine, says which task."""
    known = [os.environ.get(name) for name in ("NODE_RANK", "SLURM_NODEID", "SUBMITIT_LOCAL_GLOBALID")]
    return next((int(number) for number in known if number is not None), None)


def _first_host() -> str | None:
    """Returns the name of the first node of a submitit job."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return None
    from submitit import JobEnvironment

    return JobEnvironment().hostnames[0]


def _explain(failures: Mapping[int, Any], folder: Path, again: str) -> Exception:
    """Returns the error of a run whose processes failed: what one of them says, or a kill, which is silent;
    torchrun kills those, too, that do not end when another has failed."""
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    said = folder / FAILURE
    if said.exists():
        text = said.read_text(encoding="utf-8").strip()
        return ConfigError(text) if 2 in codes.values() else RunFailed(text)
    if INTERRUPTED in codes.values():
        return KeyboardInterrupt()  # pyright: ignore[reportReturnType]
    killed = {rank: -code for rank, code in codes.items() if code < 0}
    for rank, number in killed.items():
        name = signal.Signals(number).name
        return RunFailed(f"process {rank} was ended by {name}; {again} goes on from the last checkpoint")
    return RunFailed(
        f"processes {sorted(codes)} lost the others, or waited longer than distributed.timeout_seconds; "
        f"{again} goes on from the last checkpoint"
    )


def main() -> int:
    """Trains or probes as one of the processes, and returns the exit status."""
    from capo_exp.sweep.job import describe
    from capo_exp.training.loop import run
    from capo_exp.training.probe import probe_processes

    folder = Path(os.environ[FOLDER])
    end_with_parent()
    plugins = f"plugins=[{','.join(allowed_plugins())}]"
    try:
        config = read_config((folder / CONFIG).read_text(encoding="utf-8"), ["own=true", plugins])
        if sys.argv[1] == "probe":
            (folder / f".{os.environ['RANK']}").write_text(probe_processes(config), encoding="utf-8")
            (folder / f".{os.environ['RANK']}").rename(folder / SEEN)
        else:
            run(config)
    except KeyboardInterrupt:
        _wait_for_first(folder)
        return INTERRUPTED
    except Exception as error:
        text, status = describe(error)
        foreseen = isinstance(error, ConfigError | RunFailed)
        if not foreseen and any(each in str(error) for each in LOST):
            return status  # another process has failed, or hangs
        with suppress(FileExistsError), (folder / FAILURE).open("x", encoding="utf-8") as file:
            file.write(text)  # unless another process failed first
        if foreseen:
            _wait_for_first(folder)
        return status
    return 0


def _wait_for_first(folder: Path) -> None:
    """Lets the first process of a node end first, since torchrun ends all others at once when one has."""
    ended, until = folder / ENDED, time.monotonic() + CLOSING
    if os.environ["LOCAL_RANK"] == "0":
        ended.touch()
    while not ended.exists() and time.monotonic() < until:
        time.sleep(0.05)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a process group that others have left can hang at the end
