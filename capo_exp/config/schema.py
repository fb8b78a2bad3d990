"""The configuration schema: names, types, meanings and ranges. YAML files under conf/ hold every value.

Imports no torch, so that `--help`, `--cfg` and figures start at once. What two keys forbid each other is in
checks.py; the numbers of a part have their ranges in the annotations of its function.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config import ranges
from capo_exp.config.architecture import (
    ARCHITECTURE,
    Architecture,
    HubSilent,
    fill_architecture,
    read_architecture,
)
from capo_exp.config.choices import list_choices, name_choices
from capo_exp.config.errors import ConfigError, suggest
from capo_exp.config.places import conf_dir as conf_dir
from capo_exp.config.places import slug

Part = dict[str, Any]
"""`{_target_: capo_exp..., _partial_: true, <its numbers>}`; built by build.build_part."""


def setting(
    rule: ranges.Rule | None = None, *, default: Any = MISSING, result: bool = True, like: str = ""
) -> Any:
    """Returns a field with its range beside it.

    Args:
        rule: What the value may be.
        default: The neutral value, with which a key does nothing, or what makes it; without one, a YAML has
            to give the value.
        result: False for a key that changes no number of a run: it is no part of the run's identity.
        like: Of a part: one that fits here; without it, the default.
    """
    metadata: dict[str, Any] = {"result": result} | ({} if rule is None else {"range": rule})
    made: Any = default() if callable(default) else None
    if like or made:
        metadata["like"] = f"capo_exp.{like}" if like else made["_target_"]
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _neutral(function: str, module: str = "algorithms.neutral") -> Callable[[], Part]:
    """Makes a part that does nothing: what a YAML leaves out."""
    return lambda: {"_target_": f"capo_exp.{module}.{function}", "_partial_": True}


@dataclass
class AlgoConfig:
    """What an algorithm is made of, in the order of use; algorithms/protocols.py has each part's signature.

    Defaults here are neutral: they do nothing, so that a YAML shows only what its method has.
    """

    name: str = setting(ranges.NAME)
    variant: str = setting(ranges.NAME_OR_EMPTY, default="")  # what selection=... put on top
    label: str = setting(ranges.ONE_LINE, default="", result=False)  # empty = from name, variant
    colour: str = setting(ranges.COLOUR, default="", result=False)  # in figures, as the label
    marker: str = setting(ranges.MARKER, default="", result=False)  # in figures, as the label
    group_filter: Part = setting(default=_neutral("all_groups"))  # which prompts count as sampled
    max_sampling_rounds: int = setting(ranges.COUNT, default=1)  # until enough groups pass
    # Tokens sampled in a rollout step; what has not ended by then goes on in the next one; null = no limit.
    rollout_tokens: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    max_age: int = setting(ranges.COUNT, default=1)  # rollout steps that what has not ended is kept for
    # Completions of each prompt of the run by the reference, before the first step; 0 = none.
    reference_samples: int = setting(ranges.COUNT_OR_0, default=0)
    # Completions sampled on from each state of a completion, to estimate its value; 0 = none.
    continuations: int = setting(ranges.COUNT_OR_0, default=0)
    states: Part = setting(default=_neutral("prompt_alone"))  # which states continuations value
    # Of what rollout=pairs makes pairs: solution, inference, step; [] = solution.
    pair_levels: list[str] = setting(ranges.PAIR_LEVELS, default=list)
    shaping: Part = setting(default=_neutral("unshaped"))  # of rewards
    advantage: Part = setting(like="algorithms.grpo.group_normalised")  # of rewards
    credit: Part = setting(default=_neutral("every_token"))  # of a token
    completion_filter: Part = setting(default=_neutral("all_completions"))  # which ones the learner sees
    # Which completions a loss averages over after the filter.
    filter_denominator: str = setting(ranges.one_of("all", "kept"), default="all")
    num_iterations: int = setting(ranges.COUNT, default=1)  # passes over the batch of a rollout step
    num_minibatches: int = setting(ranges.COUNT, default=1)  # optimiser steps a pass
    selection: Part = setting(default=_neutral("keep_all"))  # which tokens take part
    token_loss: Part = setting(like="algorithms.grpo.clipped_surrogate")  # loss of a token
    kl_estimator: Part = setting(default=_neutral("kl_k3", "algorithms.kl"))  # in the loss
    kl_coefficient: float = setting(ranges.NON_NEGATIVE, default=0.0)  # of a KL in the loss
    # Rollout steps until the reference becomes the policy, and until Adam's moments start again; 0 = never.
    reference_reset_every: int = setting(ranges.COUNT_OR_0, default=0)
    optimizer_reset_every: int = setting(ranges.COUNT_OR_0, default=0)
    aggregation: Part = setting(like="algorithms.aggregation.token_mean")  # of tokens into the loss
    step_rule_name: str = setting(ranges.NAME_OR_EMPTY, default="")  # what step_rule=... put on top
    step_rule: Part = setting(default=_neutral("full_step"))  # how much of a step to take

    @property
    def full_name(self) -> str:
        """Names the algorithm and what was put on top of it, as in the names of runs."""
        return "-".join(filter(None, (self.name, self.variant, self.step_rule_name)))


@dataclass
class ModelConfig:
    name: str = setting(ranges.NAME)
    path: str = MISSING  # local directory, hub id, or pkg://... for what ships with this package
    revision: str | None = MISSING  # hub commit; null for local paths
    # What its own config.json says and no YAML repeats; null until to_config has read it.
    model_type: str | None = setting(ranges.or_null(ranges.not_empty("such as qwen2 or llama")), default=None)
    vocab_size: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    hidden_size: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    intermediate_size: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    num_hidden_layers: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    num_attention_heads: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    num_key_value_heads: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    tie_word_embeddings: bool | None = setting(default=None)
    head_dim: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    # What the weights are kept in; the optimiser has float32 moments, and the other 16 bits of bfloat16 ones
    load_dtype: str = setting(ranges.one_of("float32", "bfloat16"), default="float32")
    # auto = bfloat16 autocast on a GPU, on a CPU that multiplies it (AMX, AVX-512) from a hidden size of 512
    # on, and wherever the weights are bfloat16; else float32
    compute_dtype: str = setting(ranges.one_of("auto", "float32", "bfloat16"))
    attn_implementation: str = setting(ranges.ATTENTION)  # as transformers names it
    gradient_checkpointing: bool = MISSING  # less memory, a slower pass
    share_prompts: bool = setting(default=False)  # the learner computes a prompt once for its completions
    # The conservative regime's rate for this model; null = not known: regime.learning_rate has to be given
    reference_learning_rate: float | None = setting(ranges.or_null(ranges.POSITIVE))
    pack: bool = setting(default=False)  # rows of a pass behind each other, without padding
    # The decoder's layers, by torch.compile, in the learner's passes
    compile: bool = setting(default=False)
    micro_batch_size: int = setting(ranges.COUNT)  # completions per forward and backward pass
    # Instead: positions per pass, those of padding too; null = micro_batch_size, which in any case says how
    # large the sampler's calls are (rollout.chunking=per_micro_batch).
    max_tokens_per_micro_batch: int | None = setting(ranges.or_null(ranges.COUNT), default=None)
    logits_chunk_tokens: int = setting(ranges.COUNT)  # tokens of the last layer computed at once

    @property
    def cut_key(self) -> str:
        """Names the key that says how large a micro-batch is."""
        known = self.max_tokens_per_micro_batch is None
        return "model.micro_batch_size" if known else "model.max_tokens_per_micro_batch"

    @property
    def architecture(self) -> Architecture:
        """Returns the shape of the model.

        Raises:
            ConfigError: its config.json cannot be read.
        """
        shape: dict[str, Any] = {name: getattr(self, name) for name in ARCHITECTURE}
        if None in [value for name, value in shape.items() if name != "head_dim"]:
            shape = read_architecture(self.path, self.revision)
        return Architecture(**shape)


@dataclass
class DatasetConfig:
    name: str = setting(ranges.NAME)
    # Directory with <name>/<split>.parquet or <split>.parquet; null = CAPO_DATA_DIR, else the hub.
    path: str | None = MISSING
    source: Part = setting(like="data.math_problems.ProblemSet")  # (split) -> list[Problem]
    # null = a set to evaluate on, which nothing trains on
    train_split: str | None = setting(ranges.NAME_OR_NULL)
    eval_split: str = setting(ranges.NAME)  # for evaluations
    # Which are the first num_problems of an evaluation.
    eval_order: str = setting(ranges.one_of("file", "shuffled"), default="file")
    levels: list[str] = setting(default=list)  # difficulties to train on, as in [3,4,5]; [] = all
    types: list[str] = setting(default=list)  # families or subjects to train on; [] = all
    prompt_style: str = setting(default="own", result=False)  # name of the choice prompt=; a label
    system_prompt: str | None = MISSING  # null = none
    apply_chat_template: bool = MISSING  # else plain text
    # User message; {problem} is replaced.
    template: str = setting(ranges.TEMPLATE)
    # Worked examples before the problem, each with `problem` and `solution`; as text or as turns of the chat.
    examples: list[Part] = setting(default=list)
    max_prompt_tokens: int = setting(ranges.COUNT)  # longer prompts are dropped and counted
    max_completion_tokens: int = setting(ranges.COUNT)  # where it is cut off

    @property
    def longest_row(self) -> int:
        """Counts the tokens of the longest prompt and completion."""
        return self.max_prompt_tokens + self.max_completion_tokens


@dataclass
class RegimeConfig:
    name: str = setting(ranges.NAME)
    learning_rate: float = setting(ranges.LEARNING_RATE)  # peak of the schedule
    prompts_per_step: int = setting(ranges.COUNT)  # of a rollout step
    group_size: int = setting(ranges.COUNT)  # completions a prompt


VLLM_ENGINE = "capo_exp.rollout.vllm_settings.VLLMSettings"


@dataclass
class RolloutConfig:
    name: str = setting(ranges.NAME)
    engine: Part = setting(like="rollout.hf.HFRollout")  # samples; also what evaluation uses
    # rollout=vllm: null = an engine of the run's own, start = a server of its own
    server_url: str | None = setting(default=None, result=False)
    # Where training completions come from instead; null = engine.
    train_engine: Part | None = setting(like="rollout.demonstrations.DemonstrationRollout")
    # One call of the engine a rollout step, or one a micro-batch.
    chunking: str = setting(ranges.one_of("per_step", "per_micro_batch"))
    temperature: float = setting(ranges.TEMPERATURE)  # of sampling and of log-probs
    top_k: int = setting(ranges.COUNT_OR_0)  # 0 = off
    top_p: float = setting(ranges.TOP_P)  # nucleus
    # Weights the credit where sampler and learner differ; rollout/correction=
    correction: Part = setting(like="algorithms.correction.uncorrected")

    @property
    def has_pairs(self) -> bool:
        """Is true where training completions are pairs that are built before the first step."""
        return (self.train_engine or {}).get("_target_") == "capo_exp.rollout.pairs.PairRollout"

    @property
    def is_vllm(self) -> bool:
        """Is true where sampling happens in an engine of its own, beside the learner."""
        return self.engine.get("_target_") == VLLM_ENGINE


@dataclass
class RewardConfig:
    """Total reward = verifier + format_weight x format + length_weight x length; see grading/terms.py."""

    name: str = setting(ranges.NAME)
    verifier: Part = setting(like="grading.verifier.ExactVerifier")  # scores completions
    format: Part = setting(default=_neutral("no_format", "grading.terms"))  # (text) -> 0..1
    format_weight: float = setting(ranges.FINITE, default=0.0)  # 0 = the term is only logged
    length: Part = setting(default=_neutral("no_length", "grading.terms"))  # (tokens) -> number
    length_weight: float = setting(ranges.FINITE, default=0.0)  # of brevity


@dataclass
class OptimizerConfig:
    name: str = setting(ranges.NAME)
    betas: list[float] = setting(ranges.BETAS)  # AdamW's
    eps: float = setting(ranges.EPS)  # AdamW's
    weight_decay: float = setting(ranges.WEIGHT_DECAY)  # AdamW's
    max_grad_norm: float = setting(ranges.POSITIVE_OR_INF)  # clips the gradient
    # The schedules of transformers.get_scheduler that need no further numbers.
    schedule: str = setting(ranges.one_of(
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "inverse_sqrt"
    ))  # fmt: skip
    warmup_ratio: float = setting(ranges.Rule(lambda v: 0 <= v < 1, "a number in [0, 1)"))  # share of steps


@dataclass
class CurvatureConfig:
    """The last-layer model that predicts shifts; the same for every algorithm."""

    # adam = moments of its own | adam_live = the optimiser's | sgd
    optimizer_model: str = setting(ranges.one_of("adam", "adam_live", "sgd"))
    top_k: int = setting(ranges.COUNT)  # ids of a token's support
    hidden_shift: int = setting(ranges.HIDDEN_SHIFT)  # 1 = the state one token late
    betas: list[float] = setting(ranges.OPEN_BETAS)  # of the model's moments
    eps: float = setting(ranges.EPS)  # of the model's moments
    # of adam's own table; bfloat16 halves it and rounds
    moments_dtype: str = setting(ranges.one_of("float32", "bfloat16"), default="float32")
    # auto = triton on a GPU, torch elsewhere; they differ by rounding alone
    kernel: str = setting(ranges.one_of("auto", "torch", "triton"), default="auto", result=False)
    calibrate_every: int = setting(ranges.COUNT_OR_0)  # optimiser steps between measurements; 0 = never
    calibrate_completions: int = setting(ranges.COUNT)  # completions of a measurement
    calibrate_tokens: int = setting(ranges.COUNT)  # tokens of a measurement, drawn from them
    # Optimiser steps between comparisons with the unmasked step; 0 = never.
    diagnose_every: int = setting(ranges.COUNT_OR_0, default=0)


@dataclass
class EvaluationConfig:
    every: int = setting(ranges.COUNT_OR_0)  # rollout steps; 0 = only before and after training
    num_problems: int = setting(ranges.COUNT)  # held out
    samples: int = setting(ranges.COUNT)  # completions per problem
    temperature: float = setting(ranges.TEMPERATURE_OR_0)  # 0 = greedy
    top_p: float = setting(ranges.TOP_P, default=1.0)  # nucleus


@dataclass
class CheckpointConfig:
    every: int = setting(ranges.COUNT)  # rollout steps
    keep: int = setting(ranges.COUNT)  # newest checkpoints that stay on disk


@dataclass
class LoggerConfig:
    name: str = setting(ranges.TRACKER)  # tracker beside the files
    # auto = online with a key, offline without
    wandb_mode: str = setting(ranges.one_of("auto", "online", "offline", "disabled"))
    project: str = setting(ranges.PROJECT)  # of the tracker
    tags: list[str] = setting(ranges.TAGS)  # of W&B's run
    completions_every: int = setting(ranges.COUNT_OR_0)  # rollout steps between samples; 0 = never
    completions_groups: int = setting(ranges.COUNT)  # prompts per sample
    # Rollout steps between histograms of the samples' m_F, m_H and advantages in a tracker; 0 = never.
    histograms_every: int = setting(ranges.COUNT_OR_0, default=0)


@dataclass
class SweepConfig:
    """How a sweep runs its jobs."""

    devices: list[str] = setting(ranges.GPUS)  # GPUs that jobs share, one job each; [] = every job sees all
    objective: str = MISSING  # metric whose last value a search maximises


@dataclass
class DistributedConfig:
    """Over how many processes a run is spread; only `gather` changes its numbers."""

    name: str = setting(ranges.one_of("single", "fsdp2"), default="single", result=False)
    processes: int = setting(ranges.COUNT, default=1, result=False)  # of a node, a GPU each
    nodes: int = setting(ranges.COUNT, default=1, result=False)  # machines
    # What layers are gathered and computed in; bfloat16 takes a third less traffic.
    gather: str = setting(ranges.one_of("float32", "bfloat16"), default="float32")
    timeout_seconds: float = setting(ranges.POSITIVE, default=1800.0, result=False)  # for the others

    @property
    def world_size(self) -> int:
        """Counts the processes of all nodes."""
        return self.processes * self.nodes


@dataclass
class TrainConfig:
    algo: AlgoConfig = MISSING
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    regime: RegimeConfig = MISSING
    rollout: RolloutConfig = MISSING
    reward: RewardConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    logger: LoggerConfig = setting(result=False)
    curvature: CurvatureConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    checkpoint: CheckpointConfig = setting(result=False)
    sweep: SweepConfig = setting(result=False)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    num_steps: int = setting(ranges.COUNT)  # rollout steps
    # Rollout steps in a row without a reward that end a run; 0 = none do.
    stop_after_unrewarded: int = setting(ranges.COUNT_OR_0, result=False)
    seed: int = setting(ranges.Rule(lambda v: 0 <= v < 2**32, "an integer in [0, 2**32)"))
    device: str = setting(ranges.DEVICE)  # of the learner
    experiment_name: str = setting(ranges.FOLDER, result=False)  # folder under output_dir
    output_dir: str = setting(ranges.not_empty("a directory"), result=False)  # root of the run directories
    overwrite: bool = setting(result=False)  # start again although a run with this identity exists
    plan_only: bool = setting(result=False)  # print the plan and stop
    # Packages of a user's own that `_target_` may name; only the command line can allow them.
    plugins: list[str] = setting(default=list, result=False)
    allow_overcommit: bool = setting(default=False, result=False)  # start although memory seems too small


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; call once before composing."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    for name, function in _RESOLVERS.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


_RESOLVERS: dict[str, Callable[..., Any]] = {
    "mul": lambda a, b: float(a) * float(b),  # as in ${mul:5,${model.reference_learning_rate}}
    "add": lambda a, b: int(a) + int(b),
    "div": lambda a, b: max(1, int(a) // int(b)),  # rounded down to at least 1
    "last_name": lambda path: slug(str(path).rstrip("/").rpartition("/")[2], 40),
    "name_choices": lambda _root_: name_choices(_root_),
    "list_choices": lambda _root_: list_choices(_root_),
}


def to_config(cfg: DictConfig) -> TrainConfig:
    """Returns composed YAML as typed values, with what the model's own config.json says of its shape.

    Raises:
        ConfigError: for a key that the schema does not know (`+key=value` gets past Hydra), a missing value,
            or an interpolation that does not resolve.
    """
    try:
        _check_keys(cfg)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        if OmegaConf.is_missing(cfg.model, "path"):
            raise ConfigError(
                "model.path: no value; expected a directory or a hub id, as model=DIR"
            ) from error
        if error.full_key == "regime.learning_rate" and cfg.model.reference_learning_rate is None:
            raise _no_rate(cfg.model) from error
        kind = expected_type(str(error.full_key))
        reason = str(error).splitlines()[0] + (f"; expected {kind}" if kind else "")
        raise ConfigError(f"{error.full_key}: {reason}") from error
    if not isinstance(config, TrainConfig):
        raise ConfigError("a file of yours hides this package's schema; expected no schema.yaml of your own")
    fill_architecture(config.model)
    return config


def _no_rate(model: Any) -> ConfigError:
    """Returns what a model lacks whose regime has no rate to scale."""
    with suppress(HubSilent):
        read_architecture(model.path, model.revision)  # there may be no such model
    known = f"no model.reference_learning_rate is known of {model.path} that a regime could scale"
    return ConfigError(f"regime.learning_rate: no value; expected a number, since {known}")


def _check_keys(node: DictConfig, prefix: str = "") -> None:
    schema = OmegaConf.get_type(node)
    if not (isinstance(schema, type) and is_dataclass(schema)):
        return  # a Part: build.py compares it with the function's signature
    known = [field.name for field in fields(schema)]
    for name in map(str, node):
        if name not in known:
            raise ConfigError(f"{prefix}{name}={str(node[name])[:80]}: unknown key; {suggest(name, known)}")
    for name in known:
        if name not in node:  # also true of a value that is still "???"
            raise ConfigError(f"{prefix}{name}: no value; expected {expected_type(prefix + name)}")
        child = node[name]
        if isinstance(child, DictConfig):
            _check_keys(child, f"{prefix}{name}.")


def expected_type(key: str, kind: Any = TrainConfig) -> str:
    """Returns in words what the schema wants at a dotted key; empty for a key outside the schema."""
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return _WORDS.get(kind, "a group with its keys" if is_dataclass(kind) else "")


_WORDS: dict[Any, str] = {
    int: "an integer",
    int | None: "an integer or null",
    float: "a number",
    bool: "true or false",
    bool | None: "true, false or null",
    str: "text",
    str | None: "text or null",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    list[Part]: "a list of examples, each with problem and solution",
    Part: "a part with its _target_",
    Part | None: "a part with its _target_, or null",
}
