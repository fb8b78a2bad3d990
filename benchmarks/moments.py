"""Moments in bfloat16 against float32, on a real run: how a token's rank and its being kept change.

A run in float32 goes on beside two tables that take the same steps: in bfloat16 as
`curvature.moments_dtype=bfloat16` has it, rounded at random, and in bfloat16 rounded to the nearest. At every
step the tokens' shifts are predicted with each. The masks are CAPO's rule with bounds at the largest 5 % of
the step's m_F and |m_H| in float32, where ties with a bound are as close as they get.

    python benchmarks/moments.py --steps 150
"""

import argparse
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from torch import Tensor

from capo_exp.config.schema import conf_dir, register, to_config
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import AdamState, Gradient
from capo_exp.curvature import table as moments_table
from capo_exp.curvature.calibration import spearman
from capo_exp.curvature.model import (
    RowGradients,
    apply_row_gradients,
    init_adam_state,
    mean_row_gradients,
    pack_batch,
    predict_shifts,
)
from capo_exp.training import loop
from capo_exp.training.learner import Learner

FIXED = [
    "device=cpu", "logger=files", "algo=capo", "regime.prompts_per_step=4", "evaluation.num_problems=1",
    "evaluation.every=0", "checkpoint.every=100000",
]  # fmt: skip
AT_RANDOM, NEAREST = "bfloat16", "bfloat16, to the nearest"
REJECTED = 0.05


class Shadows:
    """The tables beside the run, and what was found at each step."""

    def __init__(self) -> None:
        self.tables: dict[str, AdamState] = {}
        self.found: dict[str, list[tuple[float, ...]]] = defaultdict(list)

    def look(self, learner: Learner, gradient: Gradient) -> None:
        """Predicts with each table, then gives each its step."""
        record, own = gradient.record, learner.optimizer_model
        assert own is not None
        if not self.tables:
            vocab, width = learner.config.model.vocab_size, own.first.shape[1]
            for name in (AT_RANDOM, NEAREST):
                self.tables[name] = init_adam_state(vocab, width, own.betas, own.eps, dtype=torch.bfloat16)
        batch, keep = record.batch, record.selection.keep_mask
        tokens = pack_batch(record.output, batch, batch.advantages, batch.completion_mask)
        expected = predict_shifts(tokens, learning_rate=learner.learning_rate, state=own)
        rows = mean_row_gradients(pack_batch(record.output, batch, batch.advantages, keep))
        for name, state in self.tables.items():
            got = predict_shifts(tokens, learning_rate=learner.learning_rate, state=state)
            if state.step:  # the first step follows the raw gradient
                self.found[name].append(compare(got, expected))
            self.tables[name] = step(state, rows, nearest=name == NEAREST)


def step(state: AdamState, rows: RowGradients, *, nearest: bool) -> AdamState:
    at_random = moments_table._round
    if nearest:
        moments_table._round = lambda values, generator: values.bfloat16()
    after = apply_row_gradients(state, rows)
    moments_table._round = at_random
    return after


def compare(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Returns both rank correlations, the median ratio of m_F, tokens of another fate, rejected, all."""
    bounds = [shift.abs().quantile(1 - REJECTED) for shift in expected]
    kept, reference = (
        (policy < bounds[0]) & (objective.abs() < bounds[1]) for policy, objective in (got, expected)
    )
    ranks = (spearman(one, other) for one, other in zip(got, expected, strict=True))
    ratio = (got[0] / expected[0]).nanmedian().item()
    return (*ranks, ratio, int((kept != reference).sum()), int((~reference).sum()), len(kept))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("overrides", nargs="*")
    arguments, shadows, genuine = parser.parse_args(), Shadows(), Learner.apply

    def apply(learner: Learner, gradient: Gradient, watch: Stopwatch) -> dict[str, float]:
        shadows.look(learner, gradient)
        return genuine(learner, gradient, watch)

    Learner.apply = apply
    register()
    with tempfile.TemporaryDirectory() as folder, initialize_config_dir(str(conf_dir()), version_base="1.3"):
        given = [*FIXED, f"num_steps={arguments.steps}", f"output_dir={Path(folder)}", *arguments.overrides]
        loop.run(to_config(compose("config", given)))
    table = Table("moments", "rank of m_F", "lowest", "of m_H", "median m_F / float32, last 10 steps",
                  "tokens of another fate", "rejected", "tokens")  # fmt: skip
    for name, rows in shadows.found.items():
        policy, objective, ratios, *counts = zip(*rows, strict=True)
        ranks = (statistics.median(policy), min(policy), statistics.median(objective))
        table.add_row(
            name, *(f"{rank:.6f}" for rank in ranks), f"{statistics.mean(ratios[-10:]):.4f}",
            *(f"{sum(each):,}" for each in counts),
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
