"""What an option costs or saves: rollout steps of several configurations, taking turns in one process.

Each configuration starts from the same weights and samples from its own; the first is the reference of the
ratios. The first two rounds are not counted.

    python benchmarks/step_variants.py --steps 12
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from capo_exp.config.schema import TrainConfig, conf_dir, register
from capo_exp.runs.identity import run_dir
from capo_exp.training import loop as train

VARIANTS = [
    "algo=grpo",
    "algo=grpo rollout.chunking=per_micro_batch",  # DASH: sampling for each micro-batch on its own
    "algo=grpo algo.completion_filter._target_=capo_exp.algorithms.dash.advantage_above "
    "+algo.completion_filter.threshold=0.1",  # DASH: gradient filtering
    "algo=capo",
    "algo=grpo selection=random_matched",  # a scoring pass
    "algo=grpo selection=completion",
    "algo=capo curvature.optimizer_model=adam_live",
    "algo=capo curvature.optimizer_model=sgd",
    "algo=capo curvature.calibrate_every=1",
    "algo=grpo algo.kl_coefficient=0.01",
]


def config_of(overrides: str, output_dir: str, steps: int) -> TrainConfig:
    register()
    fixed = ["logger=files", "logger.completions_every=0", "checkpoint.every=1000", f"num_steps={steps}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", [*fixed, f"output_dir={output_dir}", *overrides.split()])
    config = OmegaConf.to_object(cfg)
    assert isinstance(config, TrainConfig)
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "variants", nargs="*", default=VARIANTS, help="override lists; the first is the reference"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    arguments = parser.parse_intermixed_args()
    with ExitStack() as stack:
        output_dir = stack.enter_context(tempfile.TemporaryDirectory())
        sessions = []
        for number, variant in enumerate(arguments.variants):
            own = f"device={arguments.device} {variant}"
            config = config_of(own, f"{output_dir}/{number}", arguments.steps)
            directory = run_dir(config)
            Path(directory).mkdir(parents=True)
            sessions.append(train.open_session(config, train.read_inputs(config), directory, stack))
        seconds: list[list[float]] = [[] for _ in sessions]
        for _ in range(arguments.steps):
            for session, times in zip(sessions, seconds, strict=True):
                began = time.perf_counter()
                train.take_step(session)
                times.append(time.perf_counter() - began)
    medians = [statistics.median(times[2:]) for times in seconds]
    table = Table("variant", "median seconds a step", "ratio")
    for variant, median in zip(arguments.variants, medians, strict=True):
        table.add_row(variant, f"{median:.3f}", f"{median / medians[0]:.3f}")
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
