"""Token shifts and moments update: time and peak memory against a dense version, as ratios at three sizes.

The dense version builds the [B, T, K, H] gradients and directions that the formulas name. Each version runs
in a process of its own, in turn; peak memory is what it needs on top of its inputs.

    python benchmarks/curvature.py
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from capo_exp.core.types import AdamState
from capo_exp.curvature.model import (
    apply_row_gradients,
    init_adam_state,
    mean_row_gradients,
    pack,
    token_shifts,
    update_adam_state,
)

SIZES = {
    "small": (32, 64, 1024, 50, 128),
    "medium": (32, 128, 4096, 50, 256),
    "large": (16, 128, 16384, 50, 896),
}
LR = 1e-4


def inputs(
    rows: int, length: int, vocab: int, support: int, width: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    hidden = torch.randn(rows, length, width, device=device)
    logits = 3 * torch.randn(rows, length, vocab, device=device)
    probs, ids = logits.softmax(-1).topk(support)
    advantages = torch.randn(rows, device=device)
    return hidden, probs / probs.sum(-1, keepdim=True), ids, ids[..., 0].clone(), advantages


def ours(tokens: tuple[Tensor, ...], state: AdamState, keep: Tensor) -> tuple[Tensor, AdamState]:
    """As training does it: the table takes its step in place."""
    shifts = token_shifts(*tokens, LR, state)
    return shifts.policy_shift, apply_row_gradients(state, mean_row_gradients(pack(*tokens, keep)))


def dense(tokens: tuple[Tensor, ...], state: AdamState, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The formulas as they stand, and per-row sums scattered from the [B, T, K, H] gradients."""
    hidden, probs, ids, token_ids, advantages = tokens
    (beta1, beta2), t = state.betas, state.step + 1
    error = (ids == token_ids[..., None]).float() - probs
    gradient = (advantages[:, None, None] * error)[..., None] * hidden[:, :, None, :]
    slots = state.slot_of_id[ids]
    first = (beta1 * state.first[slots] + (1 - beta1) * gradient) / (1 - beta1**t)
    second = (beta2 * state.second[slots] + (1 - beta2) * gradient**2) / (1 - beta2**t)
    change = ((first / (second.sqrt() + state.eps)) * hidden[:, :, None, :]).sum(-1)
    s = (error * change).sum(-1)
    sums = torch.zeros(len(state.slot_of_id), hidden.shape[-1])
    sums.index_add_(0, ids[keep].reshape(-1), gradient[keep].reshape(-1, hidden.shape[-1]))
    counts = torch.bincount(ids[keep].reshape(-1), minlength=len(sums)).clamp(min=1)
    return 0.5 * (LR * s) ** 2, sums / counts[:, None]


def measure(version: str, size: str, repeats: int) -> dict[str, float]:
    """Median seconds and peak MiB of one version, in this process."""
    tokens = inputs(*SIZES[size])
    rows, length, vocab, _, width = SIZES[size]
    keep = torch.ones(rows, length, dtype=torch.bool)
    state = update_adam_state(init_adam_state(vocab, width), *tokens, keep)
    run = {"ours": ours, "dense": dense}[version]
    with open("/proc/self/clear_refs", "w") as peak:  # forget the peak that making the inputs left
        peak.write("5")
    before = _status("VmRSS")
    seconds, checksums = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        shifts = run(tokens, state, keep)[0]
        seconds.append(time.perf_counter() - began)
        checksums.append(shifts.double().sum().item())
    peak_mib = (_status("VmHWM") - before) / 1024
    return {"seconds": statistics.median(seconds), "mib": peak_mib, "checksum": checksums[0]}


def _status(key: str) -> int:
    """KiB of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", nargs=2, metavar=("VERSION", "SIZE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.stdout.write(json.dumps(measure(*arguments.child, arguments.repeats)))
        return
    table = Table(title=f"shifts and moments, ours / dense, {torch.get_num_threads()} threads")
    for column in ("B x T, V, K, H", "seconds", "dense", "time ratio", "peak MiB", "dense", "memory ratio"):
        table.add_column(column)
    for size, (rows, length, vocab, support, width) in SIZES.items():
        here, there = (child(version, size, arguments.repeats) for version in ("ours", "dense"))
        assert abs(here["checksum"] / there["checksum"] - 1) < 1e-3, "the two versions disagree"
        table.add_row(
            f"{rows} x {length}, {vocab}, {support}, {width}",
            f"{here['seconds']:.3f}", f"{there['seconds']:.3f}", f"{here['seconds'] / there['seconds']:.2f}",
            f"{here['mib']:.0f}", f"{there['mib']:.0f}", f"{here['mib'] / there['mib']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)


def child(version: str, size: str, repeats: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--repeats", str(repeats), "--child", version, size]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    main()
