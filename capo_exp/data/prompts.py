"""Problems -> prompts for one model, and the order in which training visits them."""

import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from capo_exp.config.errors import ConfigError, brief
from capo_exp.config.schema import DatasetConfig
from capo_exp.core.types import Problem, Prompt

PLACEHOLDER = "{problem}"
MAX_CHARACTERS_PER_TOKEN = 256
"""More than the longest token of any vocabulary has, so that a text of 10 MB is known to be too long without
being tokenised, which takes gigabytes."""
AROUND = 12
"""Characters before and after a question that a person is shown of its prompt."""

Message = dict[str, str]


def render_prompts(
    problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, dataset_config: DatasetConfig
) -> tuple[list[Prompt], int]:
    """Writes each problem as the model shall read it, and drops what is longer than max_prompt_tokens.

    With a chat template, special tokens come from the template, and worked examples are earlier turns.
    Without, special tokens come from the tokenizer; a system prompt is put before the text with an empty line
    between, and each worked example ends in the tokenizer's end token.

    Returns:
        The prompts that are short enough, in order, and how many were dropped.

    Raises:
        ConfigError: no chat template in the tokenizer, or one that refuses the
            messages, an end token behind every prompt, or no prompt left.
    """
    texts = _render_texts([problem.problem for problem in problems], tokenizer, dataset_config)
    limit = dataset_config.max_prompt_tokens
    token_ids = _encode(texts, tokenizer, dataset_config, longest=limit * MAX_CHARACTERS_PER_TOKEN)
    kept = [
        Prompt(problem, text, ids)
        for problem, text, ids in zip(problems, texts, token_ids, strict=True)
        if ids is not None and len(ids) <= limit
    ]
    if not kept:
        shortest = min((len(ids) for ids in token_ids if ids is not None), default=limit + 1)
        raise ConfigError(
            f"got dataset.max_prompt_tokens={limit}, which drops all {len(texts)} prompts; "
            f"expected at least {shortest}, the length of the shortest"
        )
    return kept, len(texts) - len(kept)


def count_with_special_tokens(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns how many questions hold the text of a special token, such as <|im_end|>, and so that token."""
    tokens = [str(token) for token in tokenizer.all_special_tokens]
    return sum(any(token in problem.problem for token in tokens) for problem in problems)


def preview(prompt: Prompt, width: int) -> str:
    """Returns a prompt with the answer that it is graded by in one line of a terminal, such as
    `...user\\nWhat is 1+1?<|im_end|>... => 2`: escaped where not printable, and without the middle of what is
    long."""
    question = prompt.problem.problem
    before, found, after = prompt.text.partition(question)
    start, end = _escape(before), _escape(after)
    start = start if len(start) <= AROUND else f"...{start[-AROUND:]}"
    end = end if len(end) <= AROUND else f"{end[:AROUND]}..."
    answer = _shorten(_escape(prompt.problem.answer), width // 4)
    left = width - len(start) - len(end) - len(answer) - len(" => ")
    return f"{start}{_shorten(_escape(found), max(left, AROUND))}{end} => {answer}"


def _escape(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shorten(text: str, width: int) -> str:
    """Leaves out the middle of what is longer."""
    half = (width - len(" ... ")) // 2
    return text if len(text) <= width else f"{text[:half]} ... {text[-half:]}"


def _encode(
    texts: list[str], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig, *, longest: int
) -> list[tuple[int, ...] | None]:
    """Returns token ids of each text; None for one of more than `longest` characters."""
    short = [text for text in texts if len(text) <= longest]
    add = not config.apply_chat_template
    encoded = tokenizer(short, add_special_tokens=add, verbose=False)["input_ids"] if short else []
    if short and add and tokenizer("1")["input_ids"][-1:] == [tokenizer.eos_token_id]:
        raise ConfigError(
            f"got a tokenizer that puts its end token {tokenizer.eos_token} behind every prompt; expected "
            "none there: change its files (add_eos_token), or dataset.apply_chat_template=true"
        )
    ids = iter(cast(list[list[int]], encoded))
    return [tuple(next(ids)) if len(text) <= longest else None for text in texts]


def _render_texts(
    questions: list[str], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig
) -> list[str]:
    messages = [_fill(config, question) for question in questions]
    if not config.apply_chat_template:
        before = _examples_as_text(tokenizer, config)
        return [f"{before}{text}" for text in messages]
    if not tokenizer.chat_template:
        raise ConfigError(
            "got dataset.apply_chat_template=true and a tokenizer without a chat template; "
            "expected a model with one, or dataset.apply_chat_template=false"
        )
    before = _examples_as_turns(config)
    turns = [[*before, {"role": "user", "content": text}] for text in messages]
    texts = [_render_chat(each, tokenizer, config) for each in turns]
    if texts and messages[0].strip() not in texts[0]:  # as one for pictures, which wants a list of contents
        raise ConfigError(
            "got a chat template that does not show the message to the model; "
            "expected another model, or dataset.apply_chat_template=false"
        )
    return texts


def _fill(config: DatasetConfig, question: str) -> str:
    return config.template.replace(PLACEHOLDER, question)  # not format: LaTeX has braces


def _examples_as_text(tokenizer: PreTrainedTokenizerBase, config: DatasetConfig) -> str:
    text = f"{config.system_prompt}\n\n" if config.system_prompt else ""
    for example in config.examples:
        asked = _fill(config, example["problem"])
        space = "" if asked[-1].isspace() else " "
        text += f"{asked}{space}{example['solution']}{tokenizer.eos_token}\n\n"
    return text


def _examples_as_turns(config: DatasetConfig) -> list[Message]:
    turns = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    for example in config.examples:
        turns.append({"role": "user", "content": _fill(config, example["problem"])})
        turns.append({"role": "assistant", "content": example["solution"]})
    return turns


def _render_chat(messages: list[Message], tokenizer: PreTrainedTokenizerBase, config: DatasetConfig) -> str:
    """Renders the messages as one text, up to where the assistant's answer begins."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program: it may divide by 0, or refuse a system role
        others = "dataset.system_prompt=null or " if config.system_prompt else ""
        raise ConfigError(
            f"got a chat template that refuses the prompt ({brief(error, 200)}); expected another model, "
            f"{others}dataset.apply_chat_template=false"
        ) from error
    return cast(str, text)


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Returns 16 hex digits over what the model reads and the answers it is graded by."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update("\0".join((prompt.text, *prompt.problem.golds, "")).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


def choose_visits(num_problems: int, *, first: int, count: int, seed: int) -> list[int]:
    """Returns the problems of the draws number `first` to `first + count - 1` of training (counted from 0).

    Epoch e visits every problem once, in the permutation drawn from (seed, e); draws walk through the endless
    sequence of epochs, so one step may hold the end of an epoch and the start of the next. A function of its
    arguments alone: resuming needs no more than the number of draws so far.
    """
    assert num_problems > 0 and count > 0 and first >= 0
    epochs = range(first // num_problems, (first + count - 1) // num_problems + 1)
    orders = [np.random.default_rng([seed, epoch]).permutation(num_problems) for epoch in epochs]
    start = first - epochs[0] * num_problems
    return np.concatenate(orders)[start : start + count].tolist()
