"""What a run needs before its directory exists: read, checked, and built where that writes nothing."""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from capo_exp.algorithms.protocols import Algorithm, build_algorithm
from capo_exp.config.build import build_part
from capo_exp.config.schema import TrainConfig
from capo_exp.core import policy
from capo_exp.core.model_files import check_logits
from capo_exp.curvature.backend import choose_kernel
from capo_exp.data.prepare import Data, prepare
from capo_exp.data.prompts import fingerprint
from capo_exp.distributed.sharding import copy_weights, shard
from capo_exp.distributed.world import SINGLE, World
from capo_exp.grading.verifier import Verifier
from capo_exp.rollout import RolloutEngine
from capo_exp.rollout.dealt import ReplicaRollout


@dataclass(frozen=True)
class Inputs:
    """What can be checked and read before a run directory exists."""

    tokenizer: PreTrainedTokenizerBase
    data: Data
    verifier: Verifier  # Has graded nothing but golds; whoever reads inputs closes it
    fingerprint: str  # Of the problems, so that a run cannot go on with others
    algorithm: Algorithm
    device: torch.device
    compute_dtype: torch.dtype

    @property
    def pad_token_id(self) -> int:
        """What fills the padding; the tokenizer always has one."""
        pad = self.tokenizer.pad_token_id
        assert isinstance(pad, int)
        return pad


def read_inputs(config: TrainConfig, world: World = SINGLE, device: torch.device | None = None) -> Inputs:
    """Reads model facts, tokenizer and data; the first process reads the data for all.

    Raises:
        ConfigError: if an input is missing or wrong.
    """
    algorithm = build_algorithm(config.algo)
    device = device or policy.choose_device(config.device)
    check_logits(config.model)
    choose_kernel(config.curvature.kernel, device)
    policy.check_length(config.model, config.dataset.longest_row)
    tokenizer = policy.load_tokenizer(config.model)
    verifier = build_part(config.reward.verifier, key="reward.verifier")()
    try:
        data = world.first(lambda: prepare(config, tokenizer, verifier.gradable))
    except BaseException:  # a signal, too: its workers must not stay
        verifier.close()
        raise
    problems = fingerprint([*data.train, *data.held_out])
    dtype = policy.choose_dtype(config.model, device)
    return Inputs(tokenizer, data, verifier, problems, algorithm, device, dtype)


def share_out(config: TrainConfig, world: World, model: PreTrainedModel | None) -> None:
    """Shards a model, if there is one and the run is spread over processes."""
    if model is not None and config.distributed.name != "single":
        shard(model, world, gather=config.distributed.gather, body=policy.score_tokens)


def load_reference(config: TrainConfig, inputs: Inputs, weights: Path | None) -> PreTrainedModel | None:
    """Loads the frozen reference where the algorithm needs one; `weights` are a checkpoint of it."""
    if not inputs.algorithm.needs_reference:
        return None
    return policy.load_model(config.model, inputs.device, weights=weights).requires_grad_(False)


def build_engine(
    config: TrainConfig, inputs: Inputs, model: PreTrainedModel, world: World = SINGLE
) -> RolloutEngine:
    """Builds the engine that samples; it is not started. Where a model will be sharded, an engine that
    forwards the learner's own modules gets a whole copy."""
    build = build_part(config.rollout.engine, key="rollout.engine")
    if config.rollout.is_vllm:
        return build(model, inputs.tokenizer, inputs.compute_dtype, world)
    if config.distributed.name == "single":
        return build(model, inputs.tokenizer, inputs.compute_dtype)
    replica = copy.deepcopy(model).requires_grad_(False)
    engine = build(replica, inputs.tokenizer, inputs.compute_dtype)
    return ReplicaRollout(engine, lambda: copy_weights(model, replica))


def choose_train_engine(config: TrainConfig, inputs: Inputs, engine: RolloutEngine) -> RolloutEngine:
    """Returns where training completions come from: the given engine, or one that samples nothing."""
    if config.rollout.train_engine is None:
        return engine
    return build_part(config.rollout.train_engine, key="rollout.train_engine")(inputs.tokenizer)
