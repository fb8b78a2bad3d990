"""How time and memory grow with the work: 1, 2, 4 and 8 times the tokens, the vocabulary and the width.

Three parts of a step: token shifts, the optimiser model's update, and the policy (a forward and a backward
pass of two random Qwen2 layers and their last layer). On a CPU each size of each part runs in a process of
its own, on a GPU, whose allocator knows the peak of each, all in one. The time is the process's CPU seconds,
or what CUDA took, the smallest of its repeats; the memory is what it needs on top of its inputs. An exponent
is the slope of log cost over log work, by least squares over the four sizes. A layer's multiplications grow
with the square of its width, so the policy's work along that axis is counted in multiplications.

    python -m benchmarks.growth
"""

import argparse
import ctypes
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import linear_regression
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.curvature import _status, inputs
from capo_exp.core.policy import ForwardSettings, forward
from capo_exp.core.types import Batch
from capo_exp.curvature.model import (
    apply_row_gradients,
    init_adam_state,
    mean_row_gradients,
    pack,
    token_shifts,
)

Sizes = dict[str, int]
BASE: Sizes = {"tokens": 1024, "vocabulary": 4096, "width": 128}
BASE_CUDA: Sizes = {"tokens": 8192, "vocabulary": 32_768, "width": 1024}
"""What fills a GPU: with less, all sizes take what starting the kernels takes."""
LENGTH, SUPPORT, FACTORS = 64, 50, (1, 2, 4, 8)
PARTS = ("shifts", "update", "policy")


def prepare(part: str, size: Sizes, device: torch.device) -> Callable[[], Any]:
    """Makes the inputs, and returns what is to be measured."""
    rows, vocabulary, width = size["tokens"] // LENGTH, size["vocabulary"], size["width"]
    if part == "policy":
        return prepare_policy(rows, vocabulary, width, device)
    tokens = inputs(rows, LENGTH, vocabulary, SUPPORT, width, device=device)
    packed = pack(*tokens, torch.ones(rows, LENGTH, dtype=torch.bool, device=device))
    empty = init_adam_state(vocabulary, width, device=device)
    state = apply_row_gradients(empty, mean_row_gradients(packed))
    if part == "shifts":
        return lambda: token_shifts(*tokens, 1e-4, state)
    return lambda: apply_row_gradients(state, mean_row_gradients(packed))


def prepare_policy(rows: int, vocabulary: int, width: int, device: torch.device) -> Callable[[], Any]:
    torch.manual_seed(0)
    shape = {
        "vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 3 * width,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)).to(device)
    ids = torch.randint(vocabulary, (rows, 2 * LENGTH), device=device)
    none, mask = torch.zeros(rows, LENGTH, device=device), torch.ones_like(ids[:, :LENGTH]).bool()
    groups = torch.zeros(rows, dtype=torch.int64, device=device)
    batch = Batch(ids, torch.ones_like(ids), mask, none, none, groups, groups.bool(), none[:, 0])
    settings = ForwardSettings(1.0, 8192, torch.float32, False)

    def step() -> None:
        forward(model, batch, settings, top_k=SUPPORT).log_probs.sum().backward()
        model.zero_grad()

    return step


def measure(part: str, size: Sizes, device: torch.device, repeats: int) -> dict[str, float]:
    """Returns seconds and MiB of one part at one size, in this process."""
    torch.set_num_threads(1)
    run, cuda = prepare(part, size, device), device.type == "cuda"
    if cuda:
        run()  # compiles kernels, makes handles
        torch.cuda.reset_peak_memory_stats(device)
    else:
        ctypes.CDLL(None).malloc_trim(0)  # else freed memory that the process still has hides what is needed
        with open("/proc/self/clear_refs", "w") as peak:  # forget the peak that making the inputs left
            peak.write("5")
    before = torch.cuda.memory_allocated(device) / 2**20 if cuda else _status("VmRSS") / 1024
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < (0.3 if cuda else 2):  # many, where one takes milliseconds
        began = clock(cuda)
        run()
        seconds.append(clock(cuda) - began)
    peak_mib = torch.cuda.max_memory_allocated(device) / 2**20 if cuda else _status("VmHWM") / 1024
    return {"seconds": min(seconds), "mib": peak_mib - before}


def clock(cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def work(part: str, size: Sizes) -> float:
    """Returns what a part's cost is held against: elements, or the multiplications of the policy."""
    tokens, vocabulary, width = size.values()
    if part != "policy":
        return tokens * vocabulary * width
    layer = (1 + 0.5 + 0.5 + 1 + 3 * 3) * width**2 + 2 * LENGTH * width
    return tokens * (2 * 2 * layer + vocabulary * width)  # two layers see the prompts, too


def exponents(part: str, sizes: list[Sizes], costs: list[dict[str, float]]) -> dict[str, float]:
    grown = [math.log(work(part, size)) for size in sizes]
    found = {key: [math.log(max(cost[key], 1e-6)) for cost in costs] for key in ("seconds", "mib")}
    return {key: linear_regression(grown, values).slope for key, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--child", nargs=2, metavar=("PART", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        part, size = given.child
        found = measure(part, json.loads(size), torch.device(given.device), given.repeats)
        sys.stdout.write(json.dumps(found))
        return
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        print(
            f"no GPU: would run {', '.join(PARTS)}, each at {', '.join(map(str, FACTORS))} times {BASE_CUDA}"
        )
        return
    base = BASE_CUDA if given.device.startswith("cuda") else BASE
    table = Table("part", "grows", *(f"{factor} x" for factor in FACTORS), "exponents: time", "memory")
    for part in PARTS:
        for axis in base:
            sizes = [base | {axis: factor * base[axis]} for factor in FACTORS]
            costs = [child(part, size, given) for size in track(sizes, f"{part}, {axis}", transient=True)]
            cells = [f"{1000 * cost['seconds']:.0f} ms, {cost['mib']:.0f} MiB" for cost in costs]
            found = exponents(part, sizes, costs)
            table.add_row(part, axis, *cells, f"{found['seconds']:.2f}", f"{found['mib']:.2f}")
    Console(width=140).print(table)


def child(part: str, size: Sizes, given: argparse.Namespace) -> dict[str, float]:
    if given.device.startswith("cuda"):
        return measure(part, size, torch.device(given.device), given.repeats)
    options = ["--repeats", str(given.repeats), "--device", given.device, "--child", part, json.dumps(size)]
    command = [sys.executable, "-m", "benchmarks.growth", *options]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
