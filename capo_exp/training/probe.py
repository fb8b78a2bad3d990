"""What the doctor asks: whether an engine samples with the learner's weights, whether the processes of a run
find each other, and whether a sharded model says what a whole one does."""

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from capo_exp.config.errors import RunFailed
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.batch import collate
from capo_exp.core.types import Batch, RolloutGroup
from capo_exp.distributed.sharding import local, shard
from capo_exp.distributed.world import World, open_world, own_device
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.training.inputs import Inputs, build_engine, read_inputs

PROMPTS, GROUP_SIZE, MAX_TOKENS = 2, 2, 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.3}
"""Nats by which a sharded model's log-probs may differ from the whole one's, at most."""
MOVED = 1.1
"""Factor on the weights before engines are asked, which then have to have got the new ones."""
EXACT, ROUNDED = 1e-4, 0.15
"""Largest difference of a token's log-prob [nats] of sampler and learner if all is float32; else the mean."""


def sample_few(
    config: TrainConfig, engine: RolloutEngine, inputs: Inputs, *, version: int
) -> list[RolloutGroup]:
    """Samples a few short completions of the first training prompts."""
    request = SamplingRequest(
        inputs.data.train[:PROMPTS],
        group_size=GROUP_SIZE,
        max_tokens=min(MAX_TOKENS, config.dataset.max_completion_tokens),
        temperature=config.rollout.temperature,
        top_k=config.rollout.top_k,
        top_p=config.rollout.top_p,
        seed=config.seed,
        weight_version=version,
    )
    return engine.generate(request)


def sampler_differences(
    config: TrainConfig, model: PreTrainedModel, inputs: Inputs, groups: Sequence[RolloutGroup]
) -> Tensor:
    """Returns [N] nats by which the learner's log-probs differ from the sampler's, completion tokens only."""
    batch = collate(groups, pad_token_id=0, device=model.device)
    own = policy.log_probs(model, batch, policy.ForwardSettings.of(config, inputs.compute_dtype))
    return (own - batch.sampler_log_probs).abs()[batch.completion_mask]


def judge_differences(config: TrainConfig, inputs: Inputs, differences: Tensor) -> tuple[str, bool]:
    """Returns what is to be said of sampler_differences, and whether they are small enough."""
    engine = config.rollout.engine.get("dtype", "auto")
    exact = inputs.compute_dtype == torch.float32 and engine in ("auto", "float32")
    name, limit = ("largest", EXACT) if exact else ("mean", ROUNDED)
    value = (differences.max() if exact else differences.mean()).item()
    seen = f"{name} difference {value:.2g} nats over {len(differences)} tokens; expected at most {limit:g}"
    return seen, value <= limit


def probe_processes(config: TrainConfig) -> str:
    """Joins the processes that torchrun started, and returns what `probe` does."""
    disable_progress_bar()
    device = own_device(config.distributed, policy.choose_device(config.device))
    with open_world(config, device) as world:
        return probe(config, world, device)


def probe(config: TrainConfig, world: World, device: torch.device) -> str:
    """Says in every process what was seen: how many there are, on what, the largest difference [nats] of the
    sharded model, and that each one's engine takes new weights.

    Raises:
        RunFailed: a process's sharded model differs from its whole one, or its engine from both.
    """
    with ExitStack() as stack:
        inputs = read_inputs(config, world, device)
        stack.callback(inputs.verifier.close)
        model = policy.load_model(config.model, device)
        batch, whole = _make_batch(config.model.architecture.vocab_size, device), copy.deepcopy(model)
        engine = build_engine(config, inputs, model, world)
        stack.callback(engine.close)
        shard(model, world, gather=config.distributed.gather, body=policy.score_tokens)
        settings = policy.ForwardSettings.of(config, inputs.compute_dtype)
        pair = [policy.log_probs(each, batch, settings) for each in (whole, model)]
        difference = (pair[0] - pair[1]).abs().max().item()
        del whole
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="capo_probe_")))
        world.together(lambda: engine.start(folder, inputs.data.train))
        with torch.no_grad():
            for weight in model.parameters():
                local(weight).mul_(MOVED)
        sampled = world.together(lambda: sample_few(config, engine, inputs, version=1))
        groups = sampled[world.rank - world.rank % world.block]
        judged = judge_differences(config, inputs, sampler_differences(config, model, inputs, groups))
        seen = world.together(lambda: (policy.device_name(device), difference, judged))
    largest = max(each for _, each, _ in seen)
    text = f"{len(seen)} processes on {', '.join(sorted({name for name, _, _ in seen}))}"
    text += f"; a sharded model's log-probs differ by {largest:.2g} nats at most"
    half = torch.bfloat16 in (inputs.compute_dtype, getattr(torch, config.distributed.gather))
    if not largest <= TOLERANCE[torch.bfloat16 if half else torch.float32]:
        raise RunFailed(text)
    for rank, (_, _, (said, close)) in enumerate(seen):
        if not close:
            raise RunFailed(f"{text}; the engine of process {rank} samples with other weights: {said}")
    whose = "each one's engine" if world.block == 1 else f"the engine of every {world.block}"
    return f"{text}; {whose} takes new weights"


def _make_batch(vocabulary: int, device: torch.device) -> Batch:
    """Makes one row of 8 prompt tokens and 8 completion tokens."""
    ids = torch.randint(0, vocabulary, (1, 16), generator=torch.Generator().manual_seed(0))
    mask, zero = torch.ones(1, 8, dtype=torch.bool), torch.zeros(1, 8)
    one = torch.zeros(1, dtype=torch.int64)
    made = Batch(ids, torch.ones_like(ids), mask, zero, zero, one, one.bool(), zero[:, 0])
    return Batch(*(tensor.to(device) for tensor in vars(made).values()))
