"""Problems -> prompts for one model, and the order in which training visits them."""

from collections.abc import Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from capo_exp.config import ConfigError, DatasetConfig
from capo_exp.types import Problem, Prompt

PLACEHOLDER = "{problem}"


def render(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, dataset_config: DatasetConfig
) -> tuple[list[Prompt], int]:
    """Writes each problem as the model shall read it, and drops what is longer than max_prompt_tokens.

    With a chat template, special tokens come from the template; without, from the tokenizer, and a system
    prompt is put before the text with an empty line between.

    Returns:
        The prompts that are short enough, in order, and how many were dropped.

    Raises:
        ConfigError: no placeholder in the template, no chat template in the tokenizer, or no prompt left.
    """
    texts = _texts([problem.problem for problem in problems], tokenizer, dataset_config)
    add_special_tokens = not dataset_config.apply_chat_template
    encoded = (
        tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)["input_ids"] if texts else []
    )
    token_ids = [tuple(ids) for ids in cast(list[list[int]], encoded)]
    limit = dataset_config.max_prompt_tokens
    kept = [
        Prompt(problem, text, ids)
        for problem, text, ids in zip(problems, texts, token_ids, strict=True)
        if len(ids) <= limit
    ]
    if not kept:
        shortest = min(map(len, token_ids), default=0)
        raise ConfigError(
            f"got dataset.max_prompt_tokens={limit}, which drops all {len(texts)} prompts; "
            f"expected at least {shortest}, the length of the shortest"
        )
    return kept, len(texts) - len(kept)


def _texts(questions: list[str], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig) -> list[str]:
    if PLACEHOLDER not in config.template:
        raise ConfigError(f"got dataset.template={config.template!r}, expected text with {PLACEHOLDER} in it")
    messages = [config.template.replace(PLACEHOLDER, question) for question in questions]  # LaTeX has braces
    if not config.apply_chat_template:
        return [f"{config.system_prompt}\n\n{text}" if config.system_prompt else text for text in messages]
    if not tokenizer.chat_template:
        raise ConfigError(
            "got dataset.apply_chat_template=true and a tokenizer without a chat template; "
            "expected a model with one, or dataset.apply_chat_template=false"
        )
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return [
        cast(
            str,
            tokenizer.apply_chat_template(
                [*system, {"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            ),
        )
        for text in messages
    ]


def visited(num_problems: int, *, first: int, count: int, seed: int) -> list[int]:
    """Which problems are the draws number `first` to `first + count - 1` of training (counted from 0).

    Epoch e visits every problem once, in the permutation drawn from (seed, e); draws walk through the endless
    sequence of epochs, so one step may hold the end of an epoch and the start of the next. A function of its
    arguments alone: resuming needs no more than the number of draws so far.

    Raises:
        ValueError: sizes below 1, or a negative first draw.
    """
    if num_problems < 1 or count < 1 or first < 0:
        raise ValueError(
            f"got num_problems={num_problems}, count={count}, first={first}; "
            "expected sizes of at least 1 and a first draw of at least 0"
        )
    epochs = range(first // num_problems, (first + count - 1) // num_problems + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(num_problems) for epoch in epochs]
    start = first - epochs[0] * num_problems
    return np.concatenate(orders)[start : start + count].tolist()
