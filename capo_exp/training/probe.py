"""Whether the processes of a run find each other and a sharded model says what a whole one does."""

import copy

import torch
from transformers.utils.logging import disable_progress_bar

from capo_exp.config.errors import RunFailed
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.types import Batch
from capo_exp.distributed.sharding import shard
from capo_exp.distributed.world import open_world, own_device

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Nats by which a sharded model's log-probs may differ from the whole one's, at most."""


def probe_processes(config: TrainConfig) -> str:
    """Says in every process what was seen: how many there are, on what, and the largest difference [nats].

    Raises:
        RunFailed: a process's sharded model differs from its whole one.
    """
    disable_progress_bar()
    device = own_device(config.distributed, policy.choose_device(config.device))
    dtype = policy.choose_dtype(config.model, device)
    settings = policy.ForwardSettings.of(config, dtype)
    half = config.distributed.gather == "bfloat16" or dtype == torch.bfloat16
    with open_world(config.distributed, device) as world:
        model = policy.load_model(config.model, device)
        batch, whole = _make_batch(config.model.architecture.vocab_size, device), copy.deepcopy(model)
        shard(model, world, gather=config.distributed.gather, body=policy.score_tokens)
        pair = [policy.log_probs(each, batch, settings) for each in (whole, model)]
        difference = (pair[0] - pair[1]).abs().max().item()
        seen = world.together(lambda: (policy.device_name(device), difference))
    largest = max(each for _, each in seen)
    text = f"{len(seen)} processes on {', '.join(sorted({name for name, _ in seen}))}"
    text += f"; a sharded model's log-probs differ by {largest:.2g} nats at most"
    if not largest <= TOLERANCE[torch.bfloat16 if half else torch.float32]:
        raise RunFailed(text)
    return text


def _make_batch(vocabulary: int, device: torch.device) -> Batch:
    """Makes one row of 8 prompt tokens and 8 completion tokens."""
    ids = torch.randint(0, vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    mask, zero = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8)
    one = torch.zeros(1, dtype=torch.int64)
    made = Batch(ids, torch.ones_like(ids), mask, zero, zero, one, one.bool())
    return Batch(*(tensor.to(device) for tensor in vars(made).values()))
