"""The optimiser, its schedule, and the optimiser model: own moments, or a view of the real ones."""

from math import ceil
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from capo_exp.algorithms.protocols import Algorithm
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.types import AdamState
from capo_exp.curvature import model as curvature
from capo_exp.distributed.sharding import full
from capo_exp.training.adamw_bfloat16 import AdamWBfloat16


def make_optimizer_model(model: PreTrainedModel, config: TrainConfig) -> AdamState | None:
    """Makes the optimiser model's own moments; None where it has none."""
    if config.curvature.optimizer_model != "adam":
        return None
    beta1, beta2 = config.curvature.betas
    head = policy.last_layer(model)
    return curvature.init_adam_state(
        head.out_features,
        head.in_features,
        (beta1, beta2),
        config.curvature.eps,
        dtype=getattr(torch, config.curvature.moments_dtype),
        device=model.device,
    )


def make_optimizer(model: PreTrainedModel, config: TrainConfig) -> torch.optim.Optimizer:
    """Makes AdamW over all parameters; its moments are float32 whatever the weights are."""
    numbers = config.optimizer
    beta1, beta2 = numbers.betas
    adamw = AdamWBfloat16 if config.model.load_dtype == "bfloat16" else torch.optim.AdamW
    return adamw(
        model.parameters(),
        lr=config.regime.learning_rate,
        betas=(beta1, beta2),
        eps=numbers.eps,
        weight_decay=numbers.weight_decay,
    )


def reset_moments(optimizer: torch.optim.Optimizer) -> None:
    """Lets the moments start again."""
    if isinstance(optimizer, AdamWBfloat16):
        optimizer.reset()
    else:
        optimizer.state.clear()


def make_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, algorithm: Algorithm
) -> torch.optim.lr_scheduler.LRScheduler:
    """Makes the learning rate over the optimiser steps of the run."""
    total = config.num_steps * algorithm.num_iterations * algorithm.num_minibatches
    warmup = ceil(config.optimizer.warmup_ratio * total)  # as transformers
    return get_scheduler(
        config.optimizer.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=total
    )


def live_adam_state(optimizer: torch.optim.Optimizer, weight: Tensor, tokens: int) -> AdamState:
    """Returns the real optimiser's moments of the last layer as an optimiser model: views, no copies. Before
    its first step they are zero. With tied weights they hold the input embedding's gradients too. Of sharded
    ones the whole is gathered; every process has to ask.

    They are of the loss's gradient, in which a token of a step of `tokens` weighs 1 / tokens: exactly so
    under token_mean and without clipping.
    """
    group = next(g for g in optimizer.param_groups if any(p is weight for p in g["params"]))
    moments: dict[str, Any] = optimizer.state.get(weight, {})
    zero = torch.zeros(1, weight.shape[1], dtype=torch.float32, device=weight.device)
    ids = torch.arange(len(weight), device=weight.device)
    return AdamState(
        slot_of_id=ids if moments else torch.zeros_like(ids),
        first=full(moments.get("exp_avg", zero)),
        second=full(moments.get("exp_avg_sq", zero)),
        step=int(moments.get("step", 0)),
        betas=group["betas"],
        eps=group["eps"],
        sign=-1.0,
        raw_steps=0,
        token_weight=1 / max(1, tokens),
    )
