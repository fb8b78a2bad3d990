"""What the report's completion viewer shows: chosen steps of each run, small enough to be inside the page."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, zip_longest
from typing import Any

import numpy as np

from capo_exp.runs.read import LoggedRow, LoggedRun, list_samples, load_completions

MAX_BYTES = 5_500_000
"""Of all completions in the page together; what does not fit is left out, and the page says so."""
MAX_STEPS = 12
"""Of one run, however much room there is."""
MAX_TOKENS = 4_000
"""Of one completion."""
ROW_BYTES, TOKEN_BYTES = 200, 32
"""What a completion and each of its tokens take as JSON, on the large side."""

KEPT, BY_POLICY, BY_OBJECTIVE, OTHER = 0, 1, 2, 4
"""Why a token was rejected; policy and objective together are 3. OTHER: no bound of config.yaml says why."""
COLOURS = {"policy": 6, "objective": 4}
"""Steps of each colour scale of report.css, for one sign."""
BOUNDS = ("policy_shift_max", "objective_shift_min", "objective_shift_max")
Bounds = tuple[float, float, float]
Places = dict[tuple[Any, ...], int]
"""Token id and text, or prompt, answer and family -> the place in its table."""


@dataclass(frozen=True)
class Excerpt:
    """What the page has of one run's completions."""

    run: LoggedRun
    logged: list[int]  # Steps with completions on disk
    steps: dict[int, list[LoggedRow]]  # Step -> its first completions, in the order they were logged
    total: int  # Completions that the chosen steps have on disk

    @property
    def shown(self) -> int:
        return sum(map(len, self.steps.values()))

    @property
    def note(self) -> str:
        """Says which steps and completions are here and which are not, as a sentence."""
        if not self.logged:
            return "no completions on disk (logger.completions_every)"
        text = f"{len(self.steps)} of {len(self.logged)} logged steps: {', '.join(map(str, self.steps))}"
        rows = "all" if self.shown == self.total else f"the first {self.shown} of"
        return f"{text}; {rows} {self.total} completions of these"


def excerpts(runs: Sequence[LoggedRun], max_bytes: int = MAX_BYTES) -> list[Excerpt]:
    """Returns the completions of each run that the page has room for, first and last step among them."""
    return [excerpt(run, max_bytes / len(runs)) for run in runs]


def excerpt(run: LoggedRun, room: float) -> Excerpt:
    """Takes evenly spread steps, first and last among them, and of each as many of its first completions as
    fit into `room` bytes."""
    logged = sorted(list_samples(run.path))
    places = np.linspace(0, len(logged) - 1, min(len(logged), MAX_STEPS)) if logged else []
    rows = {step: load_completions(run, step) for step in [logged[round(place)] for place in places]}
    shown = {step: _first_rows(found, room / len(rows)) for step, found in rows.items()}
    return Excerpt(run, logged, shown, sum(map(len, rows.values())))


def _first_rows(rows: Sequence[LoggedRow], room: float) -> list[LoggedRow]:
    """Returns the completions that fit into `room` bytes from the start, at least one."""
    sizes = accumulate(row_bytes(row) for row in rows)
    return [row for i, (row, size) in enumerate(zip(rows, sizes, strict=True)) if size <= room or i == 0]


def row_bytes(row: LoggedRow) -> int:
    """Estimates how long a completion is as JSON."""
    return ROW_BYTES + TOKEN_BYTES * min(MAX_TOKENS, len(row.get("token_ids") or row.get("tokens") or ()))


def viewer_data(taken: Sequence[Excerpt], labels: Sequence[str]) -> dict[str, Any]:
    """Returns everything assets/viewer.js needs of these runs and their labels, as plain JSON values.

    Token texts and prompts stand in one table each, and completions have places in them.
    """
    tokens: Places = {}
    prompts: Places = {}
    runs = []
    for label, part in zip(labels, taken, strict=True):
        bounds = bounds_of(part.run)
        steps = [
            {"step": step, "rows": [_row(row, part.run, bounds, tokens, prompts) for row in rows]}
            for step, rows in part.steps.items()
        ]
        if steps:
            shown = [digits(bound) for bound in bounds] if bounds else None
            runs.append({"label": label, "bounds": shown, "note": part.note, "steps": steps})
    rows = [row for run in runs for step in run["steps"] for row in step["rows"]]
    return {
        "tokens": list(tokens),
        "prompts": list(prompts),
        "edges": {name: edges(chain(*(row[name] for row in rows)), n) for name, n in COLOURS.items()},
        "runs": runs,
    }


def _row(
    row: LoggedRow, run: LoggedRun, bounds: Bounds | None, tokens: Places, prompts: Places
) -> dict[str, Any]:
    enough = run.setting("reward.verifier.correct_from")  # None for a run from before there was one
    reward = row.get("reward")
    prompt = (str(row.get("prompt", "")), str(row.get("answer", "")), str(row.get("family", "")))
    ids, texts, text = row.get("token_ids") or [], row.get("tokens") or [], str(row.get("completion") or "")
    pairs = list(zip_longest(ids, texts))
    policy, objective, keep, log_prob = (
        [math.nan if value is None else value for value in (row.get(name) or ())[:MAX_TOKENS]]
        for name in ("policy_shift", "objective_shift", "keep", "log_prob")
    )
    joined = "".join(part or "" for part in texts)
    return {
        "prompt": prompts.setdefault(prompt, len(prompts)),
        "reward": digits(row.get("reward")),
        "right": reward is not None and bool(reward > 0.5 if enough is None else reward >= enough),
        "advantage": digits(row.get("advantage")),
        "truncated": bool(row.get("truncated", False)),
        "length": len(pairs),
        "text": None if text in joined else text,  # an emoji of several tokens is in none of them
        "tokens": [tokens.setdefault(pair, len(tokens)) for pair in pairs[:MAX_TOKENS]],
        "policy": [digits(value) for value in policy],
        "objective": [digits(value) for value in objective],
        "probability": [digits(math.exp(min(value, 0.0))) for value in log_prob],
        "rejected": "".join(map(str, reasons(policy, objective, keep, bounds))),
    }


def bounds_of(run: LoggedRun) -> Bounds | None:
    """Returns (m_F below, m_H above, m_H below) if the run's selection tests each token alone, else None."""
    by_token = str(run.setting("algo.selection._target_")).endswith("capo.shift_bounds")
    policy, low, high = (run.setting(f"algo.selection.{name}") for name in BOUNDS)
    if not by_token or None in (policy, low, high):
        return None
    return float(policy), float(low), float(high)


def reasons(
    policy: Sequence[float], objective: Sequence[float], keep: Sequence[Any], bounds: Any
) -> list[int]:
    """Returns the code of each token. Comparisons as in shift_bounds: strict, so that NaN fails."""
    if bounds is None or not len(policy) == len(objective) == len(keep):
        return [KEPT if kept else OTHER for kept in keep]
    highest, low, high = map(np.float32, bounds)
    codes = []
    for kept, shift, change in zip(keep, policy, objective, strict=True):
        broken = BY_POLICY * (not shift < highest) + BY_OBJECTIVE * (not low < change < high)
        codes.append(KEPT if kept else broken or OTHER)
    return codes


def digits(value: float | None) -> float | int | None:
    """Returns three significant digits; None where there is no finite number."""
    if value is None or not math.isfinite(value):
        return None
    short = float(f"{value:.3g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short


def edges(values: Iterable[float | None], count: int) -> list[float]:
    """Returns where the colours of a scale begin, two to a power of ten (1 and 3), rising.

    The last one begins below the 99.9th percentile of the sizes, so that outliers do not pale the rest.
    """
    sizes = [abs(value) for value in values if value]
    top = math.log10(np.quantile(sizes, 0.999)) if sizes else 0.0
    last = 2 * math.floor(top) + (top % 1 >= math.log10(3))
    return [float(f"{(1, 3)[half % 2]}e{half // 2}") for half in range(last - count + 1, last + 1)]
