"""The configuration schema. YAML files under conf/ hold every value; here are names, types and meanings.

Imports no torch, so that `--help`, `--cfg` and figures start at once. Cross-field checks are in checks.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from capo_exp.config.errors import ConfigError, suggest

Part = dict[str, Any]
"""`{_target_: capo_exp..., _partial_: true, <its numbers>}`; built by parts.build."""


def _neutral(function: str, module: str = "algorithms.neutral") -> Callable[[], Part]:
    """Makes a part that does nothing: what a YAML leaves out."""
    return lambda: {"_target_": f"capo_exp.{module}.{function}", "_partial_": True}


@dataclass
class AlgoConfig:
    """What an algorithm is made of, in the order of use; see algorithm.py for the signature of each part.

    Defaults here are neutral: they do nothing, so that a YAML shows only what its method has.
    """

    name: str = MISSING
    label: str = ""  # name for people; empty = that of conf/algo/NAME.yaml, else the name
    colour: str = ""  # of its curves; empty likewise, else by the name
    marker: str = ""  # of its curves, as matplotlib has them; likewise
    variant: str = ""  # what was put on top: selection=..., or an experiment that changes parts
    group_filter: Part = field(default_factory=_neutral("all_groups"))
    max_sampling_rounds: int = 1  # how often to sample until prompts_per_step groups pass the filter
    shaping: Part = field(default_factory=_neutral("unshaped"))
    advantage: Part = MISSING
    credit: Part = field(default_factory=_neutral("every_token"))
    completion_filter: Part = field(default_factory=_neutral("all_completions"))
    filter_denominator: str = "all"  # all | kept: which completions a loss averages over after the filter
    num_iterations: int = 1  # passes over the batch of a rollout step
    num_minibatches: int = 1  # optimiser steps a pass
    selection: Part = field(default_factory=_neutral("keep_all"))
    scoring_pass: bool = False  # one more forward pass, for a selection that needs the whole optimiser step
    token_loss: Part = MISSING
    kl_estimator: Part = field(default_factory=_neutral("kl_k3", "algorithms.kl"))
    kl_coefficient: float = 0.0  # weight of the KL to the reference in the loss
    reference_reset_every: int = 0  # rollout steps until the reference becomes the policy; 0 = never
    optimizer_reset_every: int = 0  # rollout steps until the optimiser's moments start again; 0 = never
    aggregation: Part = MISSING
    step_rule_name: str = ""  # what step_rule=... put on top
    step_rule: Part = field(default_factory=_neutral("full_step"))

    @property
    def full_name(self) -> str:
        """Name for people and folders: the algorithm, and what was put on top of it."""
        return "-".join(filter(None, (self.name, self.variant, self.step_rule_name)))

    @property
    def kl_in_reward(self) -> bool:
        """Whether rewards need the KL to the reference."""
        return any(part.get("kl_coefficient", 0) > 0 for part in (self.shaping, self.credit))

    @property
    def needs_reference(self) -> bool:
        return self.kl_coefficient > 0 or self.kl_in_reward


@dataclass
class ModelConfig:
    name: str = MISSING
    path: str = MISSING  # local directory, hub id, or pkg://... for what ships with this package
    revision: str | None = MISSING  # hub commit; null for local paths
    model_type: str = MISSING  # from here the ARCHITECTURE, named as in the model's own config.json
    vocab_size: int = MISSING
    hidden_size: int = MISSING
    intermediate_size: int = MISSING
    num_hidden_layers: int = MISSING
    num_attention_heads: int = MISSING
    num_key_value_heads: int = MISSING
    tie_word_embeddings: bool = MISSING
    compute_dtype: str = MISSING  # auto = float32 on CPU, bfloat16 autocast on GPU (weights stay float32)
    attn_implementation: str = MISSING
    gradient_checkpointing: bool = MISSING
    reference_learning_rate: float = MISSING  # the conservative regime's rate for this model
    micro_batch_size: int = MISSING  # completions per forward and backward pass
    logits_chunk_tokens: int = MISSING  # tokens of the last layer computed at once


ARCHITECTURE = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip
"""Keys of ModelConfig that are compared with the model's own config.json when it is loaded; the memory
estimate, which reads no model, counts with them."""


@dataclass
class DatasetConfig:
    name: str = MISSING
    # Directory with <name>/<split>.parquet or <split>.parquet; null = CAPO_DATA_DIR, else the hub.
    path: str | None = MISSING
    source: Part = MISSING  # (split) -> list[Problem]
    train_split: str | None = MISSING  # null = a set to evaluate on, which nothing trains on
    eval_split: str = MISSING
    eval_order: str = "file"  # file | shuffled: which are the first num_problems of an evaluation
    levels: list[str] = field(default_factory=list[str])  # difficulties to train on, as in [3,4,5]; [] = all
    types: list[str] = field(default_factory=list[str])  # families or subjects to train on; [] = all
    prompt_style: str = "own"  # name of the choice prompt=; a label
    system_prompt: str | None = MISSING
    apply_chat_template: bool = MISSING
    template: str = MISSING  # user message; {problem} is replaced
    # Worked examples before the problem, each with `problem` and `solution`; as text or as turns of the chat.
    examples: list[Part] = field(default_factory=list[Part])
    max_prompt_tokens: int = MISSING  # longer prompts are dropped and counted
    max_completion_tokens: int = MISSING


@dataclass
class RegimeConfig:
    name: str = MISSING
    learning_rate: float = MISSING  # peak of the schedule
    prompts_per_step: int = MISSING
    group_size: int = MISSING


@dataclass
class RolloutConfig:
    name: str = MISSING
    engine: Part = MISSING  # samples; also what evaluation uses
    server_url: str | None = (
        None  # rollout=vllm: null = an engine of the run's own, start = a server of its own
    )
    train_engine: Part | None = MISSING  # where training completions come from instead; null = engine
    chunking: str = MISSING  # per_step = one call a rollout step | per_micro_batch = one call a micro-batch
    temperature: float = MISSING
    top_k: int = MISSING  # 0 = off
    top_p: float = MISSING  # 1 = off
    correction: Part = MISSING  # weights the credit where sampler and learner differ; rollout/correction=

    @property
    def is_vllm(self) -> bool:
        """Whether sampling happens in an engine of its own, beside the learner."""
        return str(self.engine.get("_target_")).startswith("capo_exp.rollout.vllm.")


@dataclass
class RewardConfig:
    """Total reward = verifier + format_weight x format + length_weight x length; see reward_terms.py."""

    name: str = MISSING
    verifier: Part = MISSING
    format: Part = field(default_factory=_neutral("no_format", "grading.terms"))  # (text) -> 0..1
    format_weight: float = 0.0  # 0 = the term is only logged
    length: Part = field(default_factory=_neutral("no_length", "grading.terms"))  # (tokens) -> number
    length_weight: float = 0.0


@dataclass
class OptimizerConfig:
    name: str = MISSING
    betas: list[float] = MISSING
    eps: float = MISSING
    weight_decay: float = MISSING
    max_grad_norm: float = MISSING
    schedule: str = MISSING  # a schedule name of transformers.get_scheduler
    warmup_ratio: float = MISSING


@dataclass
class CurvatureConfig:
    """The last-layer model that predicts shifts; the same for every algorithm."""

    optimizer_model: str = MISSING  # adam = moments of its own | adam_live = the optimiser's | sgd
    top_k: int = MISSING
    hidden_shift: int = MISSING  # 0; 1 = the state one token late, as in the authors' program
    betas: list[float] = MISSING
    eps: float = MISSING
    calibrate_every: int = MISSING  # optimiser steps between measurements of the real shifts; 0 = never
    calibrate_completions: int = MISSING  # completions of a measurement
    calibrate_tokens: int = MISSING  # tokens of a measurement, drawn from them
    diagnose_every: int = 0  # optimiser steps between comparisons with the unmasked step; 0 = never


@dataclass
class EvaluationConfig:
    every: int = MISSING  # rollout steps; 0 = only before the first and after the last step
    num_problems: int = MISSING
    samples: int = MISSING  # completions per problem
    temperature: float = MISSING  # 0 = greedy
    top_p: float = MISSING  # 1 = off


@dataclass
class CheckpointConfig:
    every: int = MISSING  # rollout steps
    keep: int = MISSING  # newest checkpoints that stay on disk


@dataclass
class LoggerConfig:
    name: str = MISSING
    wandb_mode: str = MISSING  # auto = online with a key, offline without; online | offline | disabled
    project: str = MISSING
    tags: list[str] = MISSING
    completions_every: int = MISSING  # rollout steps between samples of completions; 0 = never
    completions_groups: int = MISSING  # prompts per sample


@dataclass
class SweepConfig:
    """How a sweep runs its jobs; changes no result."""

    devices: list[str] = MISSING  # GPUs that jobs share, one job each; [] = every job sees all
    objective: str = MISSING  # metric whose last value a search maximises; in eval.jsonl for a pruner
    pruner: str = MISSING  # none | median: end a job whose evaluations are behind the median of earlier runs
    pruner_startup_runs: int = MISSING  # runs that have to end before one can be pruned
    pruner_warmup_steps: int = MISSING  # rollout steps that each run has at least


@dataclass
class TrainConfig:
    algo: AlgoConfig = MISSING
    model: ModelConfig = MISSING
    dataset: DatasetConfig = MISSING
    regime: RegimeConfig = MISSING
    rollout: RolloutConfig = MISSING
    reward: RewardConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    logger: LoggerConfig = MISSING
    curvature: CurvatureConfig = MISSING
    evaluation: EvaluationConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    sweep: SweepConfig = MISSING
    num_steps: int = MISSING  # rollout steps
    stop_after_unrewarded: int = (
        MISSING  # rollout steps in a row without a reward that end a run; 0 = none do
    )
    seed: int = MISSING
    device: str = MISSING  # auto | cpu | cuda | cuda:1 ...
    experiment_name: str = MISSING  # folder under output_dir
    output_dir: str = MISSING
    overwrite: bool = MISSING  # start again although a run with this identity exists
    plan_only: bool = MISSING  # print the batch arithmetic and stop


def conf_dir() -> Path:
    """The YAML files: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def register() -> None:
    """Makes the schema and the resolvers known to Hydra; call once before composing."""
    ConfigStore.instance().store(name="schema", node=TrainConfig)
    OmegaConf.register_new_resolver("mul", lambda a, b: float(a) * float(b), replace=True)
    OmegaConf.register_new_resolver("add", lambda a, b: int(a) + int(b), replace=True)
    OmegaConf.register_new_resolver("div", lambda a, b: max(1, int(a) // int(b)), replace=True)


def to_config(cfg: DictConfig) -> TrainConfig:
    """Composed YAML -> typed values.

    Raises:
        ConfigError: for a key that the schema does not know (`+key=value` gets past Hydra), a missing value,
            or an interpolation that does not resolve.
    """
    try:
        _check_keys(cfg)
        config = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, TrainConfig)
    return config


def _check_keys(node: DictConfig, prefix: str = "") -> None:
    schema = OmegaConf.get_type(node)
    if not (isinstance(schema, type) and is_dataclass(schema)):
        return  # a Part: parts.py compares it with the function's signature
    known = [field.name for field in fields(schema)]
    for name in map(str, node):
        if name not in known:
            raise ConfigError(f"{prefix}{name}={node[name]}: unknown key; {suggest(name, known)}")
    for name in known:
        if name not in node:  # also true of a value that is still "???"
            raise ConfigError(f"{prefix}{name}: no value; expected {expected_type(prefix + name)}")
        child = node[name]
        if isinstance(child, DictConfig):
            _check_keys(child, f"{prefix}{name}.")


def expected_type(key: str) -> str:
    """What kind of value the schema wants at a dotted key, in words; empty for a key outside the schema."""
    kind: Any = TrainConfig
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return _WORDS.get(kind, "a group with its keys" if is_dataclass(kind) else "")


_WORDS: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    str | None: "text or null",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    list[Part]: "a list of examples, each with problem and solution",
    Part: "a part with its _target_",
    Part | None: "a part with its _target_, or null",
}
