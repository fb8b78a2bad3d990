"""How many bytes a run's record takes: of real rows, for 1,000 steps at the default sampling."""

import re
from pathlib import Path

import numpy as np
import pytest

from capo_exp.runs.logger import RunLogger
from capo_exp.runs.read import load_run
from capo_exp.runs.record import RunRecord

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "outputs" / "reference" / "default"  # a real run
STEPS, SCALE, TOKENS = 50, 20, 500
LIMIT = 22_000_000


def read_prose():
    """Words and signs of prose that no commit changes, about as long as a language model's tokens."""
    prose = (ROOT / "LICENSE").read_text(encoding="utf-8")
    return re.findall(r"\s?[A-Za-z]{1,7}|\d|\s?[^\sA-Za-z\d]+|\s", prose)


def completions(text, rng):
    """4 prompts x 8 completions; those of a prompt share phrases as answers to one question do, no numbers.

    Their text takes half as much again as 32 of Qwen2.5-Math's answers to 4 problems of MATH, compressed.
    """
    ids = {token: int(i) for token, i in zip(sorted(set(text)), rng.permutation(150_000), strict=False)}
    rows = []
    for start in rng.integers(len(text) - 2 * TOKENS, size=4).repeat(8):
        phrases = start + rng.integers(2 * TOKENS - 12, size=TOKENS // 10)
        words = [word for place in phrases for word in text[place : place + 12]][:TOKENS]
        signs = rng.choice([-1, 1], TOKENS)
        rows.append({
            "prompt": "".join(text[start : start + 60]), "completion": "".join(words), "answer": "42",
            "family": "algebra", "reward": 1.0, "advantage": 0.35, "truncated": False, "weight_version": 9,
            "token_ids": [ids[word] for word in words], "tokens": words,
            "log_prob": (-np.exp(rng.normal(-4, 3, TOKENS))).tolist(),
            "policy_shift": np.exp(rng.normal(-18, 3, TOKENS)).tolist(),
            "objective_shift": (np.exp(rng.normal(-12, 2, TOKENS)) * signs).tolist(),
            "keep": (rng.random(TOKENS) > 0.01).tolist(),
        })  # fmt: skip
    return rows


@pytest.mark.slow
def test_a_thousand_steps_take_less_than_22_mb(composed, tmp_path):
    config, text = composed("algo=capo", "logger=wandb"), read_prose()
    run = load_run(REFERENCE)
    row, evaluation = run.metrics[-1], run.evaluations[-1]
    rng = np.random.default_rng(0)

    def noisy(value):
        """Another number with as many digits."""
        return value * rng.uniform(0.5, 1.5) if isinstance(value, float) else value

    RunRecord(tmp_path, config)
    with RunLogger(tmp_path, resume_step=0, wandb_mode="offline") as logger:
        for step in range(1, STEPS + 1):
            counters = {"counter/rollout_step": step, "counter/completions": 1000 * step}
            logger.log_step({key: noisy(value) for key, value in row.items()} | counters)
            if step % config.evaluation.every == 0:
                logger.log_evaluation({key: noisy(value) for key, value in evaluation.items()} | counters)
            if step % config.logger.completions_every == 0:
                logger.log_completions(step, completions(text, rng))
    size = {place.name: _bytes(place) for place in tmp_path.iterdir()}
    assert size.keys() >= {"metrics.jsonl", "eval.jsonl", "completions", "wandb"}
    assert size["wandb"] > 50_000
    assert SCALE * sum(size.values()) < LIMIT, {name: SCALE * count for name, count in size.items()}


def _bytes(place):
    files = [place, *place.rglob("*")]
    return sum(file.stat().st_size for file in files if file.is_file() and not file.is_symlink())
