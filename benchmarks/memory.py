"""Peak memory of real rollout steps against the estimate that `plan_only=true` prints, on a CPU.

Each case is a fresh process. It takes two small steps first, so that what libraries load late is there, and
notes its resident memory. Then it takes two steps of the case (in the second the optimiser has its moments),
with a randomly initialised model, and prompts and completions of full length: such a model ends a completion
by chance once in vocab_size tokens. Measured is the peak above the note.

glibc's malloc keeps freed blocks below a threshold that it raises as it goes: `measured` returns large blocks
at once (MALLOC_MMAP_THRESHOLD_), so that it is the memory of tensors alone; `malloc default` is what the
process holds without that setting.

    python -m benchmarks.memory

`--padding` compares what micro-batches hold: CPU seconds and peak memory of a gradient, and the padding it
computes, at the lengths of real completions. The variants take turns in one process, on one batch of random
tokens: 2 problems x 8 completions of MATH (../shared/data/outputs_qwen25math, in tokens of SmolLM2), and 12
prompts x 8 of SmolLM2 on sums, of which rl_smollm2 holds the mean: lengths are drawn around it.

    MALLOC_MMAP_THRESHOLD_=1048576 MALLOC_TRIM_THRESHOLD_=1048576 python -m benchmarks.memory --padding
"""

import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.config.memory import estimate_memory
from capo_exp.config.places import resolve_model_path
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.core import policy
from capo_exp.core.batch import CutSize, collate, padding_share, split, totals
from capo_exp.core.timing import Stopwatch
from capo_exp.core.types import Batch, Completion, Problem, Prompt, RolloutGroup, StepInput
from capo_exp.runs.identity import run_dir
from capo_exp.training import loop as train
from capo_exp.training.learner import Learner

ROOT = Path(__file__).parents[1]
FIXED = [
    "device=cpu", "logger=files", "logger.completions_every=0", "evaluation.num_problems=1",
    "dataset.source.num_train=256", "dataset.source.num_eval=8",
]  # fmt: skip
WARM_UP = [
    "regime.prompts_per_step=1",
    "regime.group_size=2",
    "dataset.max_prompt_tokens=40",
    "dataset.max_completion_tokens=4",
]
LARGE_SHAPE = {  # 82 M parameters
    "vocab_size": 16384, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8,
    "num_attention_heads": 12, "num_key_value_heads": 4, "tie_word_embeddings": True,
}  # fmt: skip
# Micro-batches whose activations weigh as much as the weights and gradients.
LARGE = ["model.micro_batch_size=8", "regime.prompts_per_step=2"]
CHECKPOINTING = "model.gradient_checkpointing=true"
BFLOAT16 = "model.compute_dtype=bfloat16"
BFLOAT16_WEIGHTS = ["model.load_dtype=bfloat16"]
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "tiny": ({}, []),
    "tiny, checkpointing": ({}, [CHECKPOINTING]),
    "tiny, reference model": ({}, ["algo.kl_coefficient=0.1"]),
    "tiny, 1,152 completions": ({}, ["regime=conservative"]),
    "tiny, scoring pass": (
        {},
        [
            "algo.aggregation._target_=capo_exp.algorithms.aggregation.token_mean_over_kept",
            CHECKPOINTING,
            "model.micro_batch_size=4",
        ],
    ),
    "tiny, long rollout": ({}, ["regime.prompts_per_step=32", "curvature.top_k=1", CHECKPOINTING]),
    "82 M": (LARGE_SHAPE, LARGE),
    "82 M, checkpointing": (LARGE_SHAPE, [*LARGE, CHECKPOINTING]),
    "82 M, logits by 256 tokens": (LARGE_SHAPE, [*LARGE, "model.logits_chunk_tokens=256"]),
    "82 M, untied": (LARGE_SHAPE | {"tie_word_embeddings": False}, LARGE),
    "82 M, eager attention": (LARGE_SHAPE, [*LARGE, "model.attn_implementation=eager"]),
    "82 M, bfloat16": (LARGE_SHAPE, [*LARGE, BFLOAT16]),
    "82 M, bfloat16, checkpointing": (LARGE_SHAPE, [*LARGE, BFLOAT16, CHECKPOINTING]),
    "82 M, bfloat16 weights": (LARGE_SHAPE, [*LARGE, *BFLOAT16_WEIGHTS]),
    "82 M, bfloat16 weights, checkpointing": (LARGE_SHAPE, [*LARGE, *BFLOAT16_WEIGHTS, CHECKPOINTING]),
}


def measure(overrides: list[str], shape: dict[str, Any], *, default_malloc: bool = False) -> tuple[int, int]:
    """Peak of two steps of a model of this shape, measured and estimated [bytes]; {} = the tiny one's."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if not default_malloc:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory() as folder:
        write_model(shape or vars(compose_config([]).model.architecture), folder)
        command = [sys.executable, "-m", "benchmarks.memory", "--steps", folder, *overrides]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    measured, estimated = json.loads(done.stdout.splitlines()[-1])
    return measured, estimated


def compose_config(overrides: list[str]) -> TrainConfig:
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return to_config(compose("config", [*FIXED, *overrides]))


def write_model(shape: dict[str, Any], folder: str) -> None:
    """A Qwen2 model of this shape with random weights, and the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("pkg://capo_exp/assets/tiny"))
    numbers = {name: value for name, value in shape.items() if name not in ("model_type", "head_dim")}
    torch.manual_seed(0)
    # The wide initialisation gives each token a top-K of its own, as training does.
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen2ForCausalLM(Qwen2Config(**numbers, **ends, initializer_range=0.1))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def take_steps(config: TrainConfig) -> None:
    """Two rollout steps on prompts of nearly the allowed length; as in real batches every micro-batch has
    padding, without which the attention mask and repeated keys would not exist."""
    inputs, longest = train.read_inputs(config), config.dataset.max_prompt_tokens
    prompts = [
        replace(prompt, token_ids=(prompt.token_ids * longest)[: longest - i % 16])
        for i, prompt in enumerate(inputs.data.train)
    ]
    directory = run_dir(config)
    directory.mkdir(parents=True)
    with ExitStack() as stack:
        data = replace(inputs.data, train=prompts)
        session = train.open_session(config, replace(inputs, data=data), directory, stack)
        train.take_step(session)
        train.take_step(session)


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most so far) of this process [bytes]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def child(folder: str, overrides: list[str]) -> None:
    torch.set_num_threads(1)
    take_steps(compose_config([*WARM_UP, f"output_dir={folder}/warm_up"]))
    gc.collect()
    before = resident("VmRSS")
    config = compose_config([*overrides, f"model.path={folder}", f"output_dir={folder}/outputs"])
    take_steps(config)
    peak = resident("VmHWM") - before
    estimated = estimate_memory(config, gpu=False).total
    sys.stdout.write(f"\n{json.dumps([peak, estimated])}\n")


def math_lengths() -> list[list[tuple[int, int]]]:
    """Tokens of prompt and completion, by problem, at most 1,024 each."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("cache://smollm2_135m"))
    rows = pd.read_parquet(ROOT.parent / "shared/data/outputs_qwen25math/all.parquet")
    count = lambda texts: [min(1024, len(ids)) for ids in tokenizer(list(texts))["input_ids"]]  # noqa: E731
    groups = [group for _, group in rows.groupby("problem", sort=False)][:2]
    return [list(zip(count(each["problem"]), count(each["completion"]), strict=True)) for each in groups]


def sums_lengths() -> list[list[tuple[int, int]]]:
    """12 prompts of 50 to 60 tokens, and completions as if each token ended one in ten, at most 32."""
    draw = random.Random(0)
    ends = lambda: next((n for n in range(1, 32) if draw.random() < 0.1), 32)  # noqa: E731
    return [[(prompt, ends()) for _ in range(8)] for prompt in (draw.randint(50, 60) for _ in range(12))]


LENGTHS = {"MATH": (math_lengths, 4, 2048), "sums": (sums_lengths, 24, 2048)}
"""Set -> its lengths, rows of a micro-batch, tokens of one."""
PADDING = {
    "rows": [],
    "tokens": ["model.max_tokens_per_micro_batch={tokens}"],
    "tokens, packed": ["model.max_tokens_per_micro_batch={tokens}", "model.pack=true"],
    "packed by transformers' mask": ["model.max_tokens_per_micro_batch={tokens}", "model.pack=true"],
    "rows, shared prompts": ["model.share_prompts=true"],
    "rows, half of the prompts silent": [],
    "rows, shared prompts, half of them silent": ["model.share_prompts=true"],
}
"""Variant -> its settings. A silent prompt gives no completion any credit."""


def make_batch(groups: list[list[tuple[int, int]]]) -> Batch:
    """Random tokens of these lengths, a prompt the same for its group; credit of 1 and -1 in turns."""
    draw = random.Random(0)
    tokens = lambda count: tuple(draw.randrange(2, 1024) for _ in range(count))  # noqa: E731
    made = [
        RolloutGroup(
            Prompt(Problem("", "", ""), "", tokens(group[0][0])),
            tuple(Completion(tokens(count), (0.0,) * count, "", False) for _, count in group),
            0,
        )
        for group in groups
    ]
    batch = collate(made, pad_token_id=0, device=torch.device("cpu"))
    sign = 1 - 2 * (torch.arange(len(batch.group_ids)) % 2)[:, None]
    return replace(batch, advantages=sign * batch.completion_mask.float())


def compare_padding(rounds: int = 4) -> None:
    """Prints a table for each set."""
    torch.set_num_threads(1)
    for name, (lengths, rows, tokens) in LENGTHS.items():
        batch, learners = make_batch(lengths()), dict[str, Learner]()
        with tempfile.TemporaryDirectory() as folder:
            write_model(vars(compose_config([]).model.architecture), folder)
            for variant, overrides in PADDING.items():
                given = [each.format(tokens=tokens) for each in overrides]
                config = compose_config(
                    ["algo=grpo", f"model.path={folder}", f"model.micro_batch_size={rows}", *given]
                )
                model = policy.load_model(config.model, torch.device("cpu"))
                if "mask" in variant:
                    model.set_attn_implementation("sdpa")
                learners[variant] = Learner(model, None, build_algorithm(config.algo), config, torch.float32)
        table = Table(title=f"{name}: a gradient of {len(batch.group_ids)} rows")
        for column in ("", "micro-batches", "padding", "CPU s", "ratio", "peak MB", "ratio"):
            table.add_column(column)
        base: list[float] = []
        for variant, seen in take_turns(learners, batch, rounds).items():
            size = CutSize.of(learners[variant].config.model)
            numbers = [statistics.median(column) for column in zip(*seen, strict=True)]
            base = base or numbers
            cells = f"{numbers[0]:.2f}", f"{numbers[0] / base[0]:.2f}"
            peak = f"{numbers[1] / 1e6:.0f}", f"{numbers[1] / base[1]:.2f}"
            padding = f"{padding_share(batch, size):.2f}"
            table.add_row(variant, str(len(split(batch, size))), padding, *cells, *peak)
        Console().print(table)


def take_turns(learners: dict[str, Learner], batch: Batch, rounds: int) -> dict[str, list[tuple[float, int]]]:
    """CPU seconds and peak bytes of each one's gradient; the first round is not counted."""
    seen: dict[str, list[tuple[float, int]]] = {name: [] for name in learners}
    for _ in range(rounds):
        for name, learner in learners.items():
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again
            credit = (
                batch.advantages * (batch.group_ids % 2)[:, None] if "silent" in name else batch.advantages
            )
            given = replace(batch, advantages=credit)
            before, began = resident("VmRSS"), time.process_time()
            learner.backward(StepInput(given, totals(given)), Stopwatch())
            seen[name].append((time.process_time() - began, resident("VmHWM") - before))
            learner.optimizer.zero_grad(set_to_none=True)
    return {name: values[1:] for name, values in seen.items()}


def main() -> None:
    if sys.argv[1:2] == ["--steps"]:
        return child(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--padding"]:
        return compare_padding()
    table = Table(title="peak memory on a CPU [MB]")
    for column in ("", "measured", "estimated", "estimated / measured", "malloc default"):
        table.add_column(column)
    for name, (shape, overrides) in CASES.items():
        measured, estimated = measure(overrides, shape)
        default, _ = measure(overrides, shape, default_malloc=True)
        sizes = [f"{number / 1e6:,.0f}" for number in (measured, estimated, default)]
        table.add_row(name, *sizes[:2], f"{estimated / measured:.2f}", sizes[2])
    Console().print(table)


if __name__ == "__main__":
    main()
