"""Ends a job of a sweep early when its evaluations fall behind those of the sweep's other runs."""

import logging
import signal
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

from capo_exp.config.schema import SweepConfig, TrainConfig
from capo_exp.runs import metrics as names
from capo_exp.runs.identity import run_dir
from capo_exp.runs.read import read_jsonl
from capo_exp.runs.record import run_status

Values = Mapping[int, float]
"""Rollout step -> value of the objective."""


class Watch:
    """Follows one job's eval.jsonl; does nothing with sweep.pruner=none."""

    def __init__(self, config: TrainConfig) -> None:
        self.pruned = False
        self._config = config.sweep
        self._directory = run_dir(config)
        self._seen = 0

    def look(self, child: subprocess.Popen[bytes]) -> None:
        """Tells the job to stop if a new evaluation shows it behind; what it has learned is saved."""
        if self._config.pruner == "none" or self.pruned:
            return
        values = evaluations(self._directory, self._config.objective)
        if len(values) > self._seen and behind(values, self._others(), self._config):
            self.pruned = True
            child.send_signal(signal.SIGTERM)
        self._seen = len(values)

    def _others(self) -> list[Values]:
        runs = [path for path in self._directory.parent.iterdir() if (path / "run.json").exists()]
        ended = [path for path in runs if run_status(path) in ("finished", "pruned")]
        return [evaluations(path, self._config.objective) for path in ended if path != self._directory]


def evaluations(directory: Path, objective: str) -> Values:
    """What a run's eval.jsonl has of the objective."""
    rows = read_jsonl(directory / "eval.jsonl")
    return {int(row[names.STEP]): float(row[objective]) for row in rows if row.get(objective) is not None}


def behind(values: Values, others: Sequence[Values], config: SweepConfig) -> bool:
    """Whether Optuna's median rule would end the run: its best value so far is below the median of what the
    others had at the same step."""
    import optuna  # a search's dependency

    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # add_trial, since 2021
    optuna.logging.set_verbosity(logging.WARNING)
    pruner = optuna.pruners.MedianPruner(config.pruner_startup_runs, config.pruner_warmup_steps)
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for other in filter(None, others):
        last = other[max(other)]
        study.add_trial(optuna.trial.create_trial(value=last, intermediate_values=dict(other)))
    trial = study.ask()
    for step, value in values.items():
        trial.report(value, step)
    return bool(trial.should_prune())
