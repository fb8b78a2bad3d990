"""Sampling speed of the engines, and what a weight transfer costs: taking turns in one run, on any device.

Temperature 2, so that completions rarely end early, the same for both; tokens that were really sampled are
counted. One round for each shape is not counted. After each call the engine rests, as it does in training,
where rollout.engine.sleep_level says how; waking it and sending it weights is counted apart. Transfers are
of new weights to an engine that rests, with waking, cache reset and proof.

    python benchmarks/rollout.py --rounds 3
    python benchmarks/rollout.py --device cuda --batches 96,1152 model=DIR rollout.engine.sleep_level=2
"""

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from capo_exp.cli.words import as_overrides
from capo_exp.config.build import build_part
from capo_exp.config.schema import TrainConfig, conf_dir, register
from capo_exp.core import policy
from capo_exp.core.types import Prompt
from capo_exp.rollout import RolloutEngine, SamplingRequest
from capo_exp.training import loop as train

GROUP = 8
TRANSFERS = 10


def config_of(rollout: str, overrides: list[str], longest: int) -> TrainConfig:
    register()
    own = [x for x in overrides if rollout == "vllm" or not x.startswith("rollout.engine.")]
    fixed = [f"rollout={rollout}", f"dataset.max_completion_tokens={longest}", *own]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", fixed))
    assert isinstance(config, TrainConfig)
    return config


def tokens_per_second(engine: RolloutEngine, prompts: list[Prompt], tokens: int, seed: int) -> float:
    """Samples with an engine that is awake and has the weights; afterwards it rests."""
    ask(engine, prompts[:1], 1, 1, seed=0)
    start = time.perf_counter()
    sampled = ask(engine, prompts, GROUP, tokens, seed)
    seconds = time.perf_counter() - start
    engine.rest()
    return sampled / seconds


def ask(
    engine: RolloutEngine, prompts: list[Prompt], size: int, tokens: int, seed: int, version: int = 0
) -> int:
    """Samples, and returns how many tokens."""
    groups = engine.generate(
        SamplingRequest(prompts, size, tokens, 2.0, 0, 1.0, seed, weight_version=version)
    )
    return sum(len(completion.token_ids) for group in groups for completion in group.completions)


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--batches", type=numbers, default=[96, 1152], help="with commas")
    parser.add_argument("--lengths", type=numbers, default=[16, 64, 256], help="with commas")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides")
    arguments = parser.parse_intermixed_args()
    overrides = as_overrides([*arguments.overrides, f"device={arguments.device}"])
    longest = max(arguments.lengths)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"no GPU: would run hf and vllm, {arguments.batches} completions of {arguments.lengths} tokens")
        return
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engines: dict[str, RolloutEngine] = {}
        configs = {name: config_of(name, overrides, longest) for name in ("hf", "vllm")}
        inputs = train.read_inputs(configs["hf"])
        model = policy.load_model(configs["hf"].model, inputs.device)
        for name, config in configs.items():
            build = build_part(config.rollout.engine, key="rollout.engine")
            engines[name] = build(model, inputs.tokenizer, inputs.compute_dtype)
            stack.callback(engines[name].close)
            engines[name].start(directory, inputs.data.train)
        table = Table("completions", "at most tokens", "hf tokens/s", "vllm tokens/s", "vllm / hf")
        for batch in arguments.batches:
            prompts = [inputs.data.train[i % len(inputs.data.train)] for i in range(batch // GROUP)]
            for length in arguments.lengths:
                speeds: dict[str, list[float]] = {name: [] for name in engines}
                for seed in range(arguments.rounds + 1):
                    for name, engine in engines.items():
                        speeds[name].append(tokens_per_second(engine, prompts, length, seed))
                hf, vllm = (statistics.median(speeds[name][1:]) for name in ("hf", "vllm"))
                table.add_row(f"{batch:,}", str(length), f"{hf:,.0f}", f"{vllm:,.0f}", f"{vllm / hf:.2f}")
        Console(width=100).print(table)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        spent = transfer(engines["vllm"], model, inputs.data.train[:1])
        print(f"transfer of {parameters:,} parameters: {spent}")


def transfer(engine: RolloutEngine, model: torch.nn.Module, prompts: list[Prompt]) -> str:
    """Median seconds of TRANSFERS transfers and rests, with the largest probe difference seen."""
    seconds, rests, differences = [], [], []
    engine.metrics()
    for version in range(1, TRANSFERS + 1):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.0001)
        start = time.perf_counter()
        engine.rest()
        rests.append(time.perf_counter() - start)
        ask(engine, prompts, 1, 1, seed=0, version=version)
        metrics = engine.metrics()
        seconds.append(metrics["time/transfer_seconds"])
        differences.append(metrics["mismatch/probe_difference"])
    return (
        f"median {statistics.median(seconds):.3f} s, and {statistics.median(rests):.3f} s to rest before it; "
        f"probe difference at most {max(differences):.2g} nats"
    )


if __name__ == "__main__":
    main()
