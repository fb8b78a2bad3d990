"""Seconds a step by number of processes: the same run in 1, 2 and 4, on CPU with gloo unless there are GPUs.

    python benchmarks/scaling.py --processes 1,2,4 --steps 6 [key=value ...]

The whole is the mean of the steps after the first; of it the learner's stages and sampling; ratios are to
the run in one process without sharding. One thread a process, so that a core is worth the same in each row.
On a machine with fewer cores than processes a row says what sharding costs, and not what it gains.

    python benchmarks/scaling.py --simulate

A calculation, no measurement: seconds of one optimiser step (sampling left out) at Qwen2.5-Math-7B, 1,024
tokens a completion, on GPUs of which 8 are joined at 300 GB/s each way and nodes at 50 GB/s a GPU. A pass
takes the larger of computing and gathering, which FSDP2 does at once.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from capo_exp.runs.read import load_run

COMMON = (
    "logger=files", "rollout.chunking=per_micro_batch", "evaluation.num_problems=2", "evaluation.every=0",
    "checkpoint.every=1000", "model.micro_batch_size=8", "regime.prompts_per_step=4", "regime.group_size=8",
)  # fmt: skip
COMPLETION = 4.8 / 24
"""Seconds of computing for a completion, forward and backward; expected of an H100 in bfloat16."""
WEIGHTS = 4 * 7.616e9
"""Bytes; a pass gathers them twice and scatters as many of gradients."""
TABLE = 4 * 84_000 * 3584
"""Bytes of row gradients that an optimiser step adds up (docs/DISTRIBUTED.md)."""
LARGEST_PASS = 24
"""Completions that a GPU computes at once."""
BATCHES = {"aggressive": 96, "conservative": 1152}
STAGES = ("total", "rollout", "policy", "curvature", "update")


def measure(processes: int, steps: int, overrides: list[str]) -> dict[str, float]:
    """Mean seconds of each stage; the largest process's memory in MB."""
    world = () if processes == 0 else ("distributed=fsdp2", f"distributed.processes={processes}")
    with tempfile.TemporaryDirectory() as place:
        chosen = (*COMMON, *world, f"num_steps={steps}", f"output_dir={place}", *overrides)
        command = [sys.executable, "-m", "capo_exp", *chosen]
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        (directory,) = Path(place).glob("*/*")
        rows = load_run(directory).metrics[1:]
    seconds = {stage: fmean(row.get(f"time/{stage}_seconds", 0.0) for row in rows) for stage in STAGES}
    return seconds | {"memory": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e3}


def simulate() -> None:
    """Prints a Markdown table of expected seconds."""
    columns = "GPUs", "completions a pass", "passes", "computing s", "gathering s", "step s"
    print(f"| batch | {' | '.join(columns)} | speed-up | efficiency |\n" + "|---" * 9 + "|")
    for name, batch in BATCHES.items():
        base = 0.0
        for gpus in (8, 16, 64, 512):
            speed = (300e9 if gpus <= 8 else 50e9) * gpus / (gpus - 1)  # of what a ring of GPUs hands on
            rows = min(LARGEST_PASS, batch // gpus)
            if not rows:
                print(f"| {name}, {batch} | {gpus} | refused: some would have none" + " |" * 7)
                continue
            passes = -(-batch // (rows * gpus))
            computing, gathering = rows * COMPLETION, 3 * WEIGHTS / speed
            step = passes * max(computing, gathering) + 2 * TABLE / speed
            base = base or step
            gain = base / step
            cells = f"{computing:.2f} | {gathering:.2f} | {step:.2f} | {gain:.1f} | {gain * 8 / gpus:.0%}"
            print(f"| {name}, {batch} | {gpus} | {rows} | {passes} | {cells} |")


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", default="1,2,4", help="with commas")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_intermixed_args()
    if given.simulate:
        return simulate()
    print("| processes | " + " | ".join(f"{stage} s" for stage in STAGES) + " | ratio | largest so far MB |")
    print("|---" * (len(STAGES) + 3) + "|")
    base = 0.0
    for processes in (0, *map(int, given.processes.split(","))):
        seen = measure(processes, given.steps, given.overrides)
        base = base or seen["total"]
        cells = [f"{seen[stage]:.2f}" for stage in STAGES]
        name = f"{processes}, sharded" if processes else "1, whole"
        print(
            f"| {name} | {' | '.join(cells)} | {seen['total'] / base:.2f} | {seen['memory']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
