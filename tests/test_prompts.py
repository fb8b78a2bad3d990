"""What the model reads, and the order in which it reads it."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from capo_exp.config import ConfigError, DatasetConfig
from capo_exp.data.prompts import render, visited
from capo_exp.types import Problem

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    """One token a character, and a first token that the tokenizer itself adds."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["[BOS]", "[UNK]", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="[BOS]", unk_token="[UNK]")
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(CHAT_TEMPLATE)


CONFIG = DatasetConfig(
    system_prompt="Think.", apply_chat_template=True, template="Q: {problem}\n", max_prompt_tokens=200
)


def problem(text: str) -> Problem:
    return Problem(id=text, problem=text, answer="1")


def test_latex_braces_are_text(tokenizer):
    question = r"What is $\frac{1}{2}$ of {problem} \{0\} {} %s?"
    (prompt,), _ = render(
        [problem(question)], tokenizer, replace(CONFIG, apply_chat_template=False, system_prompt=None)
    )
    assert prompt.text == f"Q: {question}\n"


def test_chat_template_with_and_without_system_prompt(tokenizer):
    (prompt,), dropped = render([problem("1+1?")], tokenizer, CONFIG)
    assert prompt.text == "[BOS]<system>Think.</system><user>Q: 1+1?\n</user><assistant>"
    assert dropped == 0
    (prompt,), _ = render([problem("1+1?")], tokenizer, replace(CONFIG, system_prompt=None))
    assert prompt.text == "[BOS]<user>Q: 1+1?\n</user><assistant>"


@pytest.mark.parametrize("chat", [True, False])
def test_special_tokens_come_once(tokenizer, chat):
    (prompt,), _ = render([problem("1+1?")], tokenizer, replace(CONFIG, apply_chat_template=chat))
    assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
    assert prompt.token_ids[0] == tokenizer.bos_token_id
    decoded = tokenizer.decode(prompt.token_ids[1:]).replace(" ", "")
    assert decoded == prompt.text.removeprefix("[BOS]").replace(" ", "")


def test_plain_text_puts_the_system_prompt_first(tokenizer):
    (prompt,), _ = render([problem("1+1?")], tokenizer, replace(CONFIG, apply_chat_template=False))
    assert prompt.text == "Think.\n\nQ: 1+1?\n"


def test_long_prompts_are_dropped_and_counted_and_the_order_stays(tokenizer):
    config = replace(
        CONFIG, apply_chat_template=False, system_prompt=None, template="{problem}", max_prompt_tokens=4
    )
    kept, dropped = render(
        [problem(text) for text in ("abc", "abcd", "ab", "abcdef", "a")], tokenizer, config
    )
    assert [prompt.text for prompt in kept] == ["abc", "ab", "a"]
    assert [len(prompt.token_ids) for prompt in kept] == [4, 3, 2]
    assert dropped == 2


def test_nothing_left_names_the_key_and_the_shortest(tokenizer):
    config = replace(
        CONFIG, apply_chat_template=False, system_prompt=None, template="{problem}", max_prompt_tokens=2
    )
    with pytest.raises(
        ConfigError, match=r"got dataset.max_prompt_tokens=2, which drops all 2 .* at least 4"
    ):
        render([problem("abcd"), problem("abc")], tokenizer, config)


def test_tokenizer_without_chat_template():
    with pytest.raises(ConfigError, match=r"or dataset\.apply_chat_template=false"):
        render([problem("1+1?")], make_tokenizer(None), CONFIG)


def test_template_without_placeholder(tokenizer):
    with pytest.raises(
        ConfigError, match=r"got dataset\.template='Q:', expected text with \{problem\} in it"
    ):
        render([problem("1+1?")], tokenizer, replace(CONFIG, template="Q:"))


# --- order ---


@given(
    num_problems=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_problem_once_an_epoch(num_problems, sizes, seed):
    """Also where steps draw different numbers of prompts, as dynamic sampling does."""
    drawn: list[int] = []
    for size in sizes:
        drawn += visited(num_problems, first=len(drawn), count=size, seed=seed)
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn), num_problems):
        epoch = drawn[start : start + num_problems]
        assert max(Counter(epoch).values()) == 1
        assert set(epoch) <= set(range(num_problems))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first = visited(1000, first=0, count=1000, seed=1)
    assert visited(1000, first=0, count=1000, seed=1) == first
    assert visited(1000, first=0, count=1000, seed=2) != first
    assert visited(1000, first=1000, count=1000, seed=1) != first
    assert [i for step in range(10) for i in visited(1000, first=100 * step, count=100, seed=1)] == first
    assert all(type(i) is int for i in first)


def test_a_known_order_stays():
    """The order is part of what a resumed run relies on: numpy's PCG64 from (seed, epoch)."""
    order = [visited(5, first=3 * step, count=3, seed=0) for step in range(4)]
    assert order == [[2, 4, 3], [0, 1, 1], [4, 3, 0], [2, 4, 2]]


@pytest.mark.parametrize(("problems", "first", "count"), [(0, 0, 1), (1, 0, 0), (1, -1, 1)])
def test_impossible_sizes(problems, first, count):
    with pytest.raises(ValueError, match="expected sizes of at least 1 and a first draw of at least 0"):
        visited(problems, first=first, count=count, seed=0)
