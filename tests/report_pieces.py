"""Run directories with known numbers, and completions that no page should trust, for the report's tests."""

import json

import matplotlib.image
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from omegaconf import OmegaConf

from capo_exp.figures.curves import Curve
from capo_exp.figures.output import DrawnFigure
from capo_exp.figures.tables import TextTable
from capo_exp.runs.logger import COMPLETION_TYPES
from capo_exp.runs.read import load_run

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 2">',
    """'"><svg onload=alert(1)> & &lt;b&gt; `${window.pwned = 3}`""",
    "tab\there\nnew line\0null\x1b[31mred\x7f",
    "emoji 👨‍👩‍👧 🦊, ‮right to left‬ שלום, zero​width, line\u2028end",
]
TOKENS = ["One", " two", "\n", " three", ".", "<eos>"]
SHIFTS = [2e-5, 2e-4, 3e-9, 2e-4, float("nan"), 0.0]
CHANGES = [-4e-4, 0.0, 2e-3, -2e-2, 0.0, 5e-2]
KEEP = [True, False, True, False, False, False]
CAPO = {
    "_target_": "capo_exp.algorithms.capo.shift_bounds",
    "policy_shift_max": 1e-4,
    "objective_shift_min": -1e-2,
    "objective_shift_max": 1e-2,
}


def config(name, seed, selection):
    return {
        "algo": {"name": name, "selection": selection},
        "regime": {"name": "aggressive", "learning_rate": 1e-4},
        "experiment_name": "study <one>",
        "num_steps": 30,
        "seed": seed,
    }


def completion(tokens, *, prompt="Count.", reward=1.0):
    """A row with the first shifts and decisions of the tables above, in turn."""
    places = [i % len(TOKENS) for i in range(len(tokens))]
    return {
        "prompt": prompt, "completion": "".join(tokens), "answer": "3",
        "family": "counting" if prompt == "Count." else "other", "reward": reward,
        "advantage": 2 * reward - 1, "truncated": False, "weight_version": 9,
        "token_ids": [100 + i for i in range(len(tokens))], "tokens": tokens,
        "log_prob": [-0.5 * i for i in places], "policy_shift": [SHIFTS[i] for i in places],
        "objective_shift": [CHANGES[i] for i in places], "keep": [KEEP[i] for i in places],
    }  # fmt: skip


def old(row):
    """The row as runs logged it before there were token texts."""
    return {key: value for key, value in row.items() if key not in ("tokens", "log_prob")}


def write_completions(path, step, rows):
    (path / "completions").mkdir(parents=True, exist_ok=True)
    arrays = {key: pa.array([row[key] for row in rows], COMPLETION_TYPES.get(key)) for key in rows[0]}
    pq.write_table(pa.table(arrays), path / "completions" / f"step_{step:06d}.parquet")


def write_run(path, settings, *, accuracy, record):
    """30 steps whose training accuracy is `accuracy`, but 0 in the first 20, and 2% of tokens rejected."""
    path.mkdir(parents=True)
    rows = [
        {
            "counter/rollout_step": step,
            "counter/completions": 96 * step,
            "reward/accuracy": accuracy if step > 20 else 0.0,
            "selection/rejection_rate": 0.01 if step % 2 else 0.03,
        }
        for step in range(1, 31)
    ]
    scores = [(0, 0.25), (10, accuracy + 0.1), (30, accuracy)]
    held_out = [
        {"counter/rollout_step": s, "counter/completions": 96 * s, "eval/accuracy": a} for s, a in scores
    ]
    for name, lines in (("metrics", rows), ("eval", held_out)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    OmegaConf.save(OmegaConf.create(settings), path / "config.yaml")
    (path / "run.json").write_text(json.dumps({"run_id": path.name[-4:], "wall_seconds": 75.0, **record}))
    return path


def study(folder):
    """Two seeds of CAPO, an older GRPO run without token texts, and one that failed without completions."""
    capo = [
        write_run(folder / f"capo-s{seed}-aaa{seed}", config("capo", seed, CAPO), accuracy=0.5 + seed / 10,
                  record={"status": "finished", "git": {"commit": "c0ffee", "dirty": True}})
        for seed in (0, 1)
    ]  # fmt: skip
    for step in (10, 20, 30):
        counting = [completion([str(step), *TOKENS[1:]]), completion(["No"], reward=0.0)]
        write_completions(capo[0], step, [*counting, completion(TOKENS[:1], prompt="Else?")])
    hostile = [completion([text]) for text in HOSTILE] + [completion(["x"], prompt=HOSTILE[1])]
    write_completions(capo[1], 20, hostile)
    grpo = write_run(folder / "grpo-s0-bbb0", config("grpo", 0, {"_target_": "keep_all"}), accuracy=0.4,
                     record={"status": "finished"})  # fmt: skip
    write_completions(grpo, 10, [old(completion(TOKENS))])
    error = {"status": "failed", "error": "RunFailed: <img src=x onerror=window.pwned=4> \udcff"}
    failed = write_run(folder / "dapo-s0-ccc0", config("dapo", 0, {}), accuracy=0.3, record=error)
    runs = {path: load_run(path) for path in (*capo, grpo, failed)}
    return [
        Curve("CAPO (A)", tuple(runs[path] for path in capo)),
        Curve("GRPO (A)", (runs[grpo],)),
        Curve("DAPO (A)", (runs[failed],)),
    ]


def drawn(folder):
    """A figure as it is handed over."""
    matplotlib.image.imsave(folder / "one.png", np.zeros((80, 160, 3)))
    (folder / "one.csv").write_text("x,y\n1,2\n")
    table = TextTable(["curve", "x | y"], [["<i>a</i>", "1"]])
    return DrawnFigure(
        name="one", title="Figure <1>", caption="Mean & 95 % interval", png=folder / "one.png",
        csv=folder / "one.csv", table=table,
    )  # fmt: skip
