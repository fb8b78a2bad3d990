"""How long `python -m capo_exp.figures figure=all` takes: seconds for each figure, and for the command.

Makes run directories of its own: six methods with the seeds and steps asked for, and every documented metric.
The command is timed in a process of its own, imports and files included.

    python benchmarks/figures.py
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from capo_exp.config.schema import conf_dir, register, to_config
from capo_exp.figures.curves import curves
from capo_exp.figures.gallery import FIGURES
from capo_exp.figures.output import write_figure
from capo_exp.figures.page import compose as compose_figure
from capo_exp.figures.study import Lacking, Study
from capo_exp.runs import metrics as names
from capo_exp.runs.read import find_runs, load_run

JOBS = ("grpo_conservative", "grpo_aggressive", "capo", "dr_capo", "reinforce_aggressive", "capo_sgd")
TOKENS, COMPLETIONS, EVERY = 30, 32, 10
"""Of a logged completion; of a file; steps between files."""


def make_runs(root: Path, seeds: int, steps: int) -> None:
    """Random but plausible records with the configs of the paper's experiments on the tiny model."""
    register()
    for job in JOBS:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            config = asdict(to_config(compose("config", [f"experiment=paper/{job}", "scale=tiny"])))
        for seed in range(seeds):
            folder = root / f"{job}-s{seed}"
            folder.mkdir(parents=True)
            OmegaConf.save(OmegaConf.create(config | {"seed": seed}), folder / "config.yaml")
            record = {
                "run_id": folder.name,
                "status": "finished",
                "git": {"commit": "0" * 40, "dirty": False},
            }
            (folder / "run.json").write_text(json.dumps(record))
            write_rows(folder, config, np.random.default_rng(seed), steps)


def write_rows(folder: Path, config: dict[str, Any], rng: np.random.Generator, steps: int) -> None:
    """metrics.jsonl, eval.jsonl and completions/ of one run."""
    batch = config["regime"]["prompts_per_step"] * config["regime"]["group_size"]
    rows = []
    for step in range(1, steps + 1):
        row: dict[str, float] = {key: rng.uniform(0.1, 0.2) for key in names.METRICS}
        row |= {names.STEP: step, names.COMPLETIONS: step * batch, "counter/optimizer_step": step}
        rows.append(row | {names.TRAIN_ACCURACY: 0.4 + 0.2 * step / steps + rng.normal(0, 0.04)})
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", [{**rows[0], names.STEP: 0, names.COMPLETIONS: 0}, *rows[19::20]])
    (folder / "completions").mkdir()
    for step in range(EVERY, steps + 1, EVERY):
        texts = [[f" w{i}" for i in rng.integers(0, 400, TOKENS)] for _ in range(COMPLETIONS)]
        keep = [list(map(bool, rng.uniform(size=TOKENS) > 0.05)) for _ in range(COMPLETIONS)]
        ids = [[0] * TOKENS] * COMPLETIONS
        table = pa.table({"token_ids": ids, "tokens": texts, "keep": keep})
        pq.write_table(table, folder / "completions" / f"step_{step:06d}.parquet")


def write_jsonl(path: Path, rows: list[dict[str, float]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def each_figure(runs: Path, output: Path) -> dict[str, float]:
    """Seconds of each figure in one process; only those that these runs have something for."""
    loaded = tuple(map(load_run, find_runs([runs])))
    study = Study(loaded, tuple(curves(loaded, mix=False)), "mean", "bootstrap", smoothing=None, x=None)
    seconds = {}
    for name in FIGURES:
        began = time.perf_counter()
        try:
            write_figure(compose_figure(name, study), output, "benchmark")
        except Lacking:
            continue
        seconds[name] = time.perf_counter() - began
    return seconds


def whole_command(runs: Path, output: Path) -> tuple[float, float]:
    """Seconds of the command, and of the CPU in it, which say more on a busy machine."""
    began = time.perf_counter()
    arguments = [f"runs={runs}", "figure=all", f"output={output}"]
    command = [sys.executable, "-m", "capo_exp.figures", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs, output = Path(folder) / "runs", Path(folder) / "figures"
        make_runs(runs, options.seeds, options.steps)
        total, cpu = whole_command(runs, output)
        table = Table("figure", "seconds", box=None)
        for name, seconds in each_figure(runs, output).items():
            table.add_row(name, f"{seconds:.2f}")
    console = Console()
    console.print(table)
    console.print(f"the command, {len(JOBS) * options.seeds} runs of {options.steps} steps: {total:.1f} s")
    console.print(f"of these {cpu:.1f} s of CPU; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
