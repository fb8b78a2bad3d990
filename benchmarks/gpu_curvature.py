"""Shifts and moments of one micro-batch on a GPU: torch, the Triton kernels, and one read of the rows.

The size is the paper's, 24 x 1024 tokens, K 50, H 3584, V 152,064, once with ids that are all as frequent and
once with Zipf's frequencies, whose table is smaller and whose rows are of very different length. Peak memory
is what a call needs on top of its inputs. The kernels' results are compared with torch's, and their bits with
those of a second call. Last the log-probs of the last layer with their gradient, ours beside the fused
losses of liger-kernel and cut-cross-entropy where they are installed; ours also has entropy and top K. One
command, at most three minutes; without a GPU it says what it would run.

    python benchmarks/gpu_curvature.py
    TRITON_INTERPRET=1 python benchmarks/gpu_curvature.py --device cpu --tokens 6 --support 3 --width 40
"""

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from capo_exp.core.token_scores import score_hidden
from capo_exp.core.types import AdamState
from capo_exp.curvature import backend
from capo_exp.curvature.model import (
    apply_row_gradients,
    batch_shifts,
    init_adam_state,
    mean_row_gradients,
    pack,
    token_shifts,
)

LR, MIB = 1e-6, 2**20
BLOCKS = (
    (4, 512, 256), (4, 512, 64), (4, 512, 1024), (2, 512, 256), (2, 1024, 256), (4, 1024, 256), (4, 256, 256),
    (8, 256, 256), (8, 128, 256),
)  # fmt: skip
"""Pairs and columns of a block, pairs of a row that are summed at once; the package uses the first."""


def inputs(sizes: argparse.Namespace, frequencies: str) -> tuple[Tensor, ...]:
    """Random tokens; the ids of a support differ, by Gumbel's trick."""
    generator = torch.Generator(sizes.device).manual_seed(0)
    made = {"generator": generator, "device": sizes.device}
    rank = torch.arange(1, sizes.vocab + 1, device=sizes.device)
    bias = -rank.log() if frequencies == "zipf" else torch.zeros_like(rank, dtype=torch.float32)
    parts = [
        (
            torch.empty(len(part), sizes.vocab, device=sizes.device)
            .exponential_(generator=generator)
            .log_()
            .neg_()
            + bias
        )
        .topk(sizes.support)
        .indices
        for part in torch.empty(sizes.tokens, 0).split(512)
    ]
    ids = torch.cat(parts)[None]
    hidden = torch.randn(1, sizes.tokens, sizes.width, **made)
    probs = (3 * torch.randn(ids.shape, **made)).softmax(-1)
    return hidden, probs, ids, ids[..., 0].clone(), torch.randn(1, sizes.tokens, **made)


def measure(call: Callable[[], object], device: str, repeats: int) -> tuple[float, float]:
    """Median milliseconds, and peak MiB on top of what is there; a call before them compiles."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    call()
    before, seconds = memory(device, reset=True), list[float]()
    for _ in range(repeats):
        synchronize()
        began = time.perf_counter()
        call()
        synchronize()
        seconds.append(time.perf_counter() - began)
    return 1000 * statistics.median(seconds), (memory(device) - before) / MIB


def memory(device: str, *, reset: bool = False) -> int:
    """Bytes in use, or at most in use since the reset; 0 without a GPU."""
    if device != "cuda":
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


def calls(tokens: tuple[Tensor, ...], state: AdamState) -> dict[str, Callable[[], object]]:
    """What is measured; the update is training's, in place."""
    packed = pack(*tokens, torch.ones_like(tokens[3], dtype=torch.bool))
    gradients = mean_row_gradients(packed)
    return {
        "token_shifts": lambda: token_shifts(*tokens, LR, state),
        "mean_row_gradients": lambda: mean_row_gradients(packed),
        "apply_row_gradients": lambda: apply_row_gradients(state, gradients),
        "both, the moments' update": lambda: apply_row_gradients(state, mean_row_gradients(packed)),
        "batch_shifts": lambda: batch_shifts(packed, gradients, learning_rate=LR, state=state),
    }


def compare(tokens: tuple[Tensor, ...], state: AdamState) -> str:
    """Says how far the kernels' results are from torch's, and whether they are the same twice."""
    packed = pack(*tokens, torch.ones_like(tokens[3], dtype=torch.bool))
    found: list[list[Tensor]] = []
    for kernel in ("torch", "triton", "triton"):
        backend.choose_kernel(kernel, packed.hidden.device)
        found.append([*vars(token_shifts(*tokens, LR, state)).values(), mean_row_gradients(packed).means])
    far = [
        ((one - other).norm() / other.norm()).item() for one, other in zip(found[1], found[0], strict=True)
    ]
    same = all(torch.equal(*pair) for pair in zip(found[1], found[2], strict=True))
    return (
        f"triton against torch, m_F, m_H, row means: {', '.join(f'{x:.1e}' for x in far)}; same bits: {same}"
    )


def report(sizes: argparse.Namespace, frequencies: str, console: Console) -> None:
    tokens, device = inputs(sizes, frequencies), torch.device(sizes.device)
    packed = pack(*tokens, torch.ones_like(tokens[3], dtype=torch.bool))
    empty = init_adam_state(sizes.vocab, sizes.width, device=device)
    state = apply_row_gradients(empty, mean_row_gradients(packed))
    del packed
    console.print(
        f"{frequencies}: {tokens[2].numel():,} pairs, {len(state.first):,} rows; {compare(tokens, state)}"
    )
    table = Table("call", "kernel", "ms", "peak MiB", title=f"{frequencies} ids")
    reading = measure(lambda: (state.first.sum(), state.second.sum()), sizes.device, sizes.repeats)
    table.add_row("one read of the rows", "", f"{reading[0]:.2f}", "")
    half = AdamState(**vars(state) | {"first": state.first.bfloat16(), "second": state.second.bfloat16()})
    for dtype, moments in (("float32", state), ("bfloat16", half)):
        for kernel in ("torch", "triton"):
            backend.choose_kernel(kernel, device)
            for name, call in calls(tokens, moments).items():
                if dtype == "float32" or name in ("token_shifts", "apply_row_gradients"):
                    spent, peak = measure(call, sizes.device, sizes.repeats)
                    table.add_row(f"{name}, {dtype}", kernel, f"{spent:.2f}", f"{peak:.0f}")
    console.print(table)
    console.print(tune(tokens, state, sizes))


def tune(tokens: tuple[Tensor, ...], state: AdamState, sizes: argparse.Namespace) -> Table:
    """Returns a table of the blocks."""
    from capo_exp.curvature import kernels

    table, first = Table("block", "token_shifts ms", "mean_row_gradients ms"), BLOCKS[0]
    for block in BLOCKS:
        kernels.PAIRS, kernels.SLICE, kernels.PIECE = block
        now = calls(tokens, state)
        spent = [measure(now[name], sizes.device, sizes.repeats)[0] for name in list(now)[:2]]
        table.add_row(", ".join(map(str, block)), *(f"{each:.2f}" for each in spent))
    kernels.PAIRS, kernels.SLICE, kernels.PIECE = first
    return table


def last_layer(sizes: argparse.Namespace, console: Console) -> None:
    """Measures the sum of log-probs and its gradient, and how far a fused one's are from ours."""
    torch.manual_seed(0)
    kind = {"device": sizes.device, "dtype": torch.bfloat16 if sizes.device == "cuda" else torch.float32}
    head = torch.nn.Linear(sizes.width, sizes.vocab, bias=False, **kind)
    hidden = torch.randn(sizes.tokens, sizes.width, **kind, requires_grad=True)
    ids = torch.randint(sizes.vocab, (sizes.tokens,), device=sizes.device)
    ways = {"ours": lambda: score_hidden(head, hidden, ids, sizes.support, 1024)[0].sum()}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        ways["liger-kernel"] = lambda: (
            -liger_fused_linear_cross_entropy(hidden, head.weight, ids, reduction="sum")
        )
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        ways["cut-cross-entropy"] = lambda: -linear_cross_entropy(hidden, head.weight, ids, reduction="sum")
    if len(ways) < 3:
        console.print("pip install liger-kernel cut-cross-entropy: both fused losses beside ours")
    table, seen = (
        Table("last layer", "ms", "peak MiB", "log-prob", "gradients beside ours"),
        list[list[Tensor]](),
    )
    for name, way in ways.items():
        value = way()
        value.backward()
        seen.append([hidden.grad, head.weight.grad])
        hidden.grad = head.weight.grad = None
        pairs = zip(seen[-1], seen[0], strict=True)
        far = [f"{((one - our).float().norm() / our.float().norm()).item():.1e}" for one, our in pairs]
        spent, peak = measure(lambda way=way: way().backward(), sizes.device, sizes.repeats)
        hidden.grad = head.weight.grad = None
        table.add_row(
            name, f"{spent:.2f}", f"{peak:.0f}", f"{value.item() / sizes.tokens:.5f}", ", ".join(far)
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    for name, size in (
        ("tokens", 24 * 1024),
        ("support", 50),
        ("width", 3584),
        ("vocab", 152_064),
        ("repeats", 7),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    sizes, console = parser.parse_args(), Console(width=110)
    if sizes.device == "cuda" and not torch.cuda.is_available():
        size = f"{sizes.tokens:,} tokens, K {sizes.support}, H {sizes.width:,}, V {sizes.vocab:,}"
        ways = f"uniform and Zipf ids, torch and triton, float32 and bfloat16, {len(BLOCKS)} sizes of blocks"
        console.print(f"no GPU: would run {size}; {ways}; the last layer beside fused losses")
        return
    if sizes.device == "cuda":
        console.print(torch.cuda.get_device_name())
    with torch.inference_mode():
        for frequencies in ("uniform", "zipf"):
            report(sizes, frequencies, console)
    last_layer(sizes, console)


if __name__ == "__main__":
    main()
