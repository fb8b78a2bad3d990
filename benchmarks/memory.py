"""Peak memory of real rollout steps against the estimate that `plan_only=true` prints, on a CPU.

Each case is a fresh process. It takes two small steps first, so that what libraries load late is there, and
notes its resident memory. Then it takes two steps of the case (in the second the optimiser has its moments),
with a randomly initialised model, and prompts and completions of full length: such a model ends a completion
by chance once in vocab_size tokens. Measured is the peak above the note.

glibc's malloc keeps freed blocks below a threshold that it raises as it goes: `measured` returns large blocks
at once (MALLOC_MMAP_THRESHOLD_), so that it is the memory of tensors alone; `malloc default` is what the
process holds without that setting.

    python -m benchmarks.memory
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from capo_exp.config.memory import estimate
from capo_exp.config.places import resolve_model_path
from capo_exp.config.schema import TrainConfig, conf_dir, register, to_config
from capo_exp.runs.identity import run_dir
from capo_exp.training import loop as train

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
    estimated = estimate(config, gpu=False).total
    sys.stdout.write(f"\n{json.dumps([peak, estimated])}\n")


def main() -> None:
    if sys.argv[1:2] == ["--steps"]:
        return child(sys.argv[2], sys.argv[3:])
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
