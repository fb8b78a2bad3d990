"""What a number or text of the configuration may be, each range a value that stands beside a key's field in
schema.py, or in the annotation of a part's parameter, as in `Annotated[float, POSITIVE]`. Imports no torch.
"""

import math
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from capo_exp.config.errors import error


class Rule(NamedTuple):
    """A range or a choice."""

    holds: Callable[[Any], bool]
    expected: str
    """Goes on after "expected"."""


def apply(rule: Rule, key: str, value: Any) -> None:
    """Raises ConfigError if the value of a key breaks the rule, or is of a kind that the rule cannot see."""
    with suppress(TypeError):
        if rule.holds(value):
            return
    raise error(key, value, rule.expected)


def one_of(*choices: str) -> Rule:
    """Returns the rule that a text is one of these."""
    return Rule(lambda v: v in choices, f"one of {', '.join(choices)}")


def or_null(rule: Rule) -> Rule:
    """Returns the rule that a value is null or keeps another."""
    return Rule(lambda v: v is None or rule.holds(v), f"null, or {rule.expected}")


def not_empty(meaning: str) -> Rule:
    """Returns the rule that a text is not empty."""
    return Rule(lambda v: v != "", meaning)


def matches(pattern: str, meaning: str) -> Rule:
    """Returns the rule that a whole text matches a regular expression."""
    return Rule(lambda v: re.fullmatch(pattern, v) is not None, meaning)


def _compiles(pattern: str) -> bool:
    with suppress(re.error):
        return re.compile(pattern) is not None
    return False


TEMPLATE = Rule(
    lambda v: "{problem}" in v and not re.search(r"\\n(?![a-z])", v),
    r"text with {problem} in it, and line breaks where \n stands: write $'...' in a shell, or a YAML file",
)
LEVELS = ("solution", "inference", "step")
"""Of which rollout=pairs makes pairs."""
OFF = "infinite = off: inf on the command line, .inf in YAML"
AT_LEAST_0 = Rule(lambda v: v >= 0, "an integer of at least 0")
AT_LEAST_1 = Rule(lambda v: v >= 1, "an integer of at least 1")
POSITIVE = Rule(lambda v: 0 < v < math.inf, "a positive finite number")
SHARE = Rule(lambda v: 0 <= v <= 1, "a number in [0, 1]")
INNER_SHARE = Rule(lambda v: 0 < v < 1, "a number inside (0, 1)")
POSITIVE_OR_INF = Rule(lambda v: v > 0, f"a positive number ({OFF})")
NON_NEGATIVE = Rule(lambda v: 0 <= v < math.inf, "a finite number of at least 0")
NON_NEGATIVE_OR_INF = Rule(lambda v: v >= 0, f"a number of at least 0 ({OFF})")
FINITE = Rule(math.isfinite, "a finite number")
NOT_NAN = Rule(lambda v: not math.isnan(v), f"a number ({OFF})")
HIDDEN_SHIFT = Rule(lambda v: v in (0, 1), "0, or 1 to compare with the authors' program")
AT_LEAST_1_OR_INF = Rule(lambda v: v >= 1, f"a number of at least 1 ({OFF})")
ABOVE_1_OR_INF = Rule(lambda v: v > 1, f"a number above 1 ({OFF})")
ABOVE_0_TO_1 = Rule(lambda v: 0 < v <= 1, "a number in (0, 1]")
FROM_1 = Rule(lambda v: 1 <= v < math.inf, "a finite number of at least 1")
NUM_PROBLEMS = Rule(lambda v: 1 <= v <= 1_000_000, "an integer in [1, 1,000,000]")
TOP_P = Rule(lambda v: 0 < v <= 1, "a number in (0, 1] (1 = off)")
BETAS = Rule(lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers in [0, 1)")
OPEN_BETAS = Rule(lambda v: len(v) == 2 and all(0 < b < 1 for b in v), "two numbers inside (0, 1)")
PAIR_LEVELS = Rule(lambda v: len(set(v)) == len(v) and set(v) <= {*LEVELS}, f"a list of {', '.join(LEVELS)}")
COUNT = Rule(lambda v: 1 <= v <= 10**9, "an integer of at least 1, at most 1e9")
COUNT_OR_0 = Rule(lambda v: 0 <= v <= 10**9, "an integer of at least 0, at most 1e9")
LEARNING_RATE = Rule(lambda v: v == 0 or 1e-12 <= v <= 10, "0 or a number in [1e-12, 10]")
WEIGHT_DECAY = Rule(lambda v: 0 <= v <= 10, "a number in [0, 10]")
EPS = Rule(lambda v: 1e-20 <= v <= 1, "a number in [1e-20, 1]")
TEMPERATURE = Rule(lambda v: 0.01 <= v <= 100, "a number in [0.01, 100]")
TEMPERATURE_OR_0 = Rule(lambda v: v == 0 or TEMPERATURE.holds(v), "0 (greedy) or a number in [0.01, 100]")
PROJECT = matches(r"[^/\\#?%:\x00-\x1f]{1,128}", "a name of W&B: 1 to 128 characters without / \\ # ? % :")
TRACKER = one_of("files", "wandb", "tensorboard", "trackio")
TAGS = Rule(lambda v: all(re.fullmatch(r".{1,64}", tag) for tag in v), "texts of 1 to 64 characters")
DEVICE = matches(r"auto|cpu|cuda(:\d+)?", "auto, cpu, cuda or cuda:N")
GPUS = Rule(lambda v: all(re.fullmatch(r"[\w,-]+", d) for d in v), "a list of GPUs, such as [0,1]")
_NAME, _LETTERS = r"[A-Za-z0-9][A-Za-z0-9._-]", "letters, digits, dot, underscore, hyphen"
FOLDER = matches(f"{_NAME}{{0,99}}", f"the name of one folder: at most 100 {_LETTERS}")
NAME = matches(f"{_NAME}{{0,39}}", f"a name that can be in that of a folder: at most 40 {_LETTERS}")
NAME_OR_EMPTY = Rule(lambda v: v == "" or NAME.holds(v), f"empty, or at most 40 {_LETTERS}")
NAME_OR_NULL = Rule(lambda v: v is None or NAME.holds(v), f"null, or at most 40 {_LETTERS}")
PATTERN = Rule(_compiles, "a regular expression")
ONE_LINE = matches(r".*", "one line of text")
COLOUR = matches(r"(#[0-9a-fA-F]{6})?", "empty, or a colour as #rrggbb")
MARKER = matches(
    r"[.o^v<>sphHPXDd*8]?", "empty, or one of matplotlib's markers . o ^ v < > s p h H P X D d * 8"
)
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
ATTENTION = Rule(lambda v: v in ATTENTIONS or "/" in v, f"{', '.join(ATTENTIONS)} or a hub kernel org/name")
