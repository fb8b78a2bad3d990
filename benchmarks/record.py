"""What logging takes of a step of the tiny model: nothing logged, files, files and W&B offline, in turns.

The share is the time inside the logger's calls (medians: a row, and a tenth of a sample of completions with
the making of its rows) over the median step of that variant; the ratio of whole steps is beside it, with its
noise. An offline W&B run is written at the end of a run: that time is no part of a step.

    python benchmarks/record.py --steps 42
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from capo_exp.config.schema import TrainConfig, conf_dir, register
from capo_exp.runs.identity import run_dir
from capo_exp.runs.logger import RunLogger
from capo_exp.training import loop as train
from capo_exp.training import session as opening

VARIANTS = {
    "nothing": ["logger=files", "logger.completions_every=0"],
    "files": ["logger=files"],
    "files, W&B offline": ["logger=wandb", "logger.wandb_mode=offline"],
}
WARM_UP = 2
"""Rounds that are not counted."""


class NoLogger(RunLogger):
    """Logs nothing: what the others are compared with."""

    def log_step(self, metrics: Any) -> None: ...


@dataclass
class Variant:
    """A session and what its steps took, in seconds."""

    session: train.Session
    steps: list[float] = field(default_factory=list)
    calls: dict[str, list[float]] = field(default_factory=lambda: {"row": [], "sample": [], "write": []})


def timed(seconds: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    return call


def begin(name: str, output_dir: Path, overrides: Sequence[str], stack: ExitStack) -> Variant:
    fixed = ["algo=capo", "checkpoint.every=100000", "num_steps=100000", f"output_dir={output_dir}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", [*fixed, *VARIANTS[name], *overrides]))
    assert isinstance(config, TrainConfig)
    directory = run_dir(config)
    directory.mkdir(parents=True)
    inputs = train.read_inputs(config)
    if name == "nothing":
        opening.RunLogger, genuine = NoLogger, opening.RunLogger
        session = train.open_session(config, inputs, directory, stack)
        opening.RunLogger = genuine
    else:
        session = train.open_session(config, inputs, directory, stack)
    variant = Variant(session)
    session.logger.log_step = timed(variant.calls["row"], session.logger.log_step)
    session.logger.log_completions = timed(variant.calls["write"], session.logger.log_completions)
    session.progress.update = lambda metrics: None  # the console is no record
    return variant


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=42)
    parser.add_argument("overrides", nargs="*", help="for all variants")
    arguments = parser.parse_args()
    register()
    rows = train.tabulate_completions
    with ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        variants = {
            name: begin(name, root / str(i), arguments.overrides, stack) for i, name in enumerate(VARIANTS)
        }
        for _ in range(arguments.steps):
            for variant in variants.values():
                train.tabulate_completions = timed(variant.calls["sample"], rows)
                began = time.perf_counter()
                train.take_step(variant.session)
                variant.steps.append(time.perf_counter() - began)
        logger = variants["files, W&B offline"].session.logger
        began = time.perf_counter()
        logger.finish(0)
        end = time.perf_counter() - began
    Console(width=150).print(table(variants))
    Console(width=150).print(f"W&B: {end:.2f} s at the end, once a run")


def table(variants: dict[str, Variant]) -> Table:
    result = Table(
        "logged",
        "median step s",
        "ratio",
        "a row ms",
        "a sample ms",
        "share of a step",
    )
    reference = statistics.median(variants["nothing"].steps[WARM_UP:])
    for name, variant in variants.items():
        median = statistics.median(variant.steps[WARM_UP:])
        row = statistics.median(variant.calls["row"][WARM_UP:])
        sample = sum(statistics.median(variant.calls[part] or [0.0]) for part in ("sample", "write"))
        share = (row + sample / variant.session.config.logger.completions_every) / median if sample else 0.0
        result.add_row(
            name, f"{median:.3f}", f"{median / reference:.3f}", f"{1000 * row:.2f}", f"{1000 * sample:.1f}",
            f"{share:.2%}",
        )  # fmt: skip
    return result


if __name__ == "__main__":
    main()
