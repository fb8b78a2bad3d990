"""Two processes and one give the same numbers; see distributed_job.py."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from capo_exp.config.schema import TrainConfig
from capo_exp.core.types import Batch
from tests.conftest import ALGORITHMS
from tests.pieces import SMALL
from tests.test_selection import SELECTIONS, partly

Compose = Callable[..., TrainConfig]
Batches = Callable[..., Batch]

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
RUN = (
    "distributed=fsdp2", "device=cpu", "logger=files", "num_steps=2", "regime.prompts_per_step=4",
    "regime.group_size=4", "model.micro_batch_size=8", "dataset.max_completion_tokens=24", "checkpoint.every=1",
    "evaluation.num_problems=3", "evaluation.every=0", "algo=prorl", "algo.reference_reset_every=1",
)  # fmt: skip


def small(composed: Compose, *overrides: str) -> TrainConfig:
    """Three micro-batches of a batch of 10, and an optimiser that does not blow up what is near 0."""
    rate = ("regime.learning_rate=1e-3", "optimizer.eps=1e-3", "optimizer.max_grad_norm=0.1")
    return composed(*SMALL, *rate, "model.micro_batch_size=4", *overrides)


def learners(composed: Compose) -> dict[str, TrainConfig]:
    rules = ("measured", "predicted", "calibrated")
    chosen = {name: (f"algo={name}",) for name in ALGORITHMS}
    chosen |= {f"selection {name}": ("algo=grpo", *partly(name)) for name in SELECTIONS}
    chosen |= {
        f"step rule {name}": ("algo=capo", f"step_rule={name}", "algo.step_rule.policy_shift_max=1e-5")
        for name in rules
    }
    for name in ("adam_live", "sgd"):
        chosen[name] = ("algo=capo", f"curvature.optimizer_model={name}")
    instruments = ("curvature.calibrate_every=1", "model.gradient_checkpointing=true")
    chosen["untied"] = ("algo=capo", *instruments, "model.logits_chunk_tokens=3", "curvature.hidden_shift=1")
    return {name: small(composed, *overrides) for name, overrides in chosen.items()}


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    composed: Compose, small_model: PreTrainedModel, random_batch: Batches, tmp_path: Path
) -> None:
    """Every algorithm, selection, step rule and optimiser model; a run that is stopped and goes on."""
    untied = type(small_model)(
        type(small_model.config)(**small_model.config.to_dict() | {"tie_word_embeddings": False})
    )
    job = {
        "learners": learners(composed),
        "exact": small(composed, "algo=grpo", "model.micro_batch_size=5", "optimizer.max_grad_norm=inf"),
        "run": composed(*RUN),
        "tied": small_model,
        "untied": untied.eval(),
        "batches": [
            random_batch(rows=10),
            random_batch(rows=10, length=9, seed=1),
            random_batch(rows=2, seed=2),
        ],
    }
    torch.save(job, tmp_path / "job.pt")
    command = [sys.executable, *TORCHRUN, "-m", "tests.distributed_job", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        faults = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert not any(faults.values()), json.dumps(faults, indent=1)[:6000]
