"""What the model reads, and the order in which it reads it."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import DatasetConfig, conf_dir
from capo_exp.core.policy import load_tokenizer
from capo_exp.core.types import Problem, Prompt
from capo_exp.data.prompts import choose_visits, count_with_special_tokens, preview, render_prompts
from capo_exp.grading.extract import find_last_box
from capo_exp.runs.identity import run_id
from tests.pieces import one_line

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<{{ message['role'] }}>{{ message['content'] }}</{{ message['role'] }}>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(chat_template):
    """One token a character, and a first token that the tokenizer itself adds."""
    characters = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(["[BOS]", "[UNK]", "[EOS]", *characters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="[BOS]", unk_token="[UNK]", eos_token="[EOS]"
    )
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(CHAT_TEMPLATE)


CONFIG = DatasetConfig(
    system_prompt="Think.", apply_chat_template=True, template="Q: {problem}\n", max_prompt_tokens=200
)


def problem(text):
    return Problem(id=text, problem=text, answer="1")


PLAIN = replace(CONFIG, apply_chat_template=False, system_prompt=None)


def render(tokenizer, config, question="1+1?"):
    (prompt,), dropped = render_prompts([problem(question)], tokenizer, config)
    assert dropped == 0
    return prompt


def test_latex_braces_are_text(tokenizer):
    question = r"What is $\frac{1}{2}$ of {problem} \{0\} {} %s?"
    assert render(tokenizer, PLAIN, question).text == f"Q: {question}\n"


def test_the_system_prompt_and_special_tokens_come_once(tokenizer):
    text = "[BOS]<system>Think.</system><user>Q: 1+1?\n</user><assistant>"
    assert render(tokenizer, CONFIG).text == text
    bare = replace(CONFIG, system_prompt=None)
    assert render(tokenizer, bare).text == "[BOS]<user>Q: 1+1?\n</user><assistant>"
    as_text = replace(CONFIG, apply_chat_template=False)
    assert render(tokenizer, as_text).text == "Think.\n\nQ: 1+1?\n"
    for config in (CONFIG, as_text):
        prompt = render(tokenizer, config)
        assert prompt.token_ids.count(tokenizer.bos_token_id) == 1
        assert prompt.token_ids[0] == tokenizer.bos_token_id
        decoded = tokenizer.decode(prompt.token_ids[1:]).replace(" ", "")
        assert decoded == prompt.text.removeprefix("[BOS]").replace(" ", "")


def test_long_prompts_are_dropped_and_counted_and_the_order_stays(tokenizer):
    config = replace(PLAIN, template="{problem}", max_prompt_tokens=4)
    asked = [problem(text) for text in ("abc", "abcd", "ab", "abcdef", "a")]
    kept, dropped = render_prompts(asked, tokenizer, config)
    assert [prompt.text for prompt in kept] == ["abc", "ab", "a"]
    assert [len(prompt.token_ids) for prompt in kept] == [4, 3, 2]
    assert dropped == 2
    with pytest.raises(ConfigError, match=r"max_prompt_tokens=2, which drops all 2 .* at least 4"):
        render_prompts(asked[:2], tokenizer, replace(config, max_prompt_tokens=2))


def test_a_template_that_is_missing():
    with pytest.raises(ConfigError, match=r"or dataset\.apply_chat_template=false"):
        render(make_tokenizer(None), CONFIG)


STYLES = sorted(path.stem for path in (conf_dir() / "prompt").glob("*.yaml"))


def styled(composed, style, *overrides):
    config = composed("dataset=math", f"prompt={style}", "dataset.max_prompt_tokens=10000", *overrides)
    check(config)
    return config.dataset


@pytest.mark.parametrize("style", STYLES)
def test_every_style_works_with_and_without_a_chat_template(style, composed, tokenizer):
    config = styled(composed, style)
    for chat, model in ((True, tokenizer), (False, make_tokenizer(None))):
        prompt = render(model, replace(config, apply_chat_template=chat))
        assert prompt.text.count("1+1?") == 1 and "{problem}" not in prompt.text
        assert prompt.text.endswith("<assistant>") == prompt.text.startswith("[BOS]") == chat
        assert prompt.token_ids.count(model.bos_token_id) == 1
    assert config.prompt_style == style
    if style in ("think", "think_boxed", "qwen_math", "step_by_step"):
        with pytest.raises(ConfigError, match=r"without a chat template; .*\.apply_chat_template=false"):
            render(make_tokenizer(None), config)


def test_styles_word_for_word(composed, tokenizer):
    asked = r"Please reason step by step, and put your final answer within \boxed{}."
    text = f"[BOS]<system>{asked}</system><user>1+1?</user><assistant>"
    assert render(tokenizer, styled(composed, "qwen_math")).text == text
    assert render(tokenizer, styled(composed, "plain")).text == "1+1?\n"
    assert render(tokenizer, styled(composed, "r1")).text.endswith("\nUser: 1+1?\nAssistant:")


def test_worked_examples_as_text_each_end_in_the_end_token(composed, tokenizer):
    config = styled(composed, "few_shot")
    golds = ["89", r"\frac{15}{2}", r"\frac{1}{8}", "60"]
    assert [find_last_box(example["solution"]) for example in config.examples] == golds
    prompt = render(tokenizer, config)
    first, *_, last = prompt.text.split("[EOS]\n\n")
    assert prompt.text.count("[EOS]\n\n") == len(config.examples) == 4
    assert prompt.token_ids.count(tokenizer.eos_token_id) == 4
    example = config.examples[0]
    assert first == f"Problem: {example['problem']}\nSolution: {example['solution']}"
    assert last == "Problem: 1+1?\nSolution:"


def test_worked_examples_as_turns(composed, tokenizer):
    turns = ("dataset.apply_chat_template=true", "dataset.template='{problem}'")
    config = styled(composed, "few_shot", *turns)
    turn = "<user>{problem}</user><assistant>{solution}</assistant>"
    asked = "".join(turn.format(**example) for example in config.examples)
    assert render(tokenizer, config).text == f"[BOS]{asked}<user>1+1?</user><assistant>"


def test_a_style_is_a_label_and_what_is_neutral_is_no_part_of_the_identity(composed):
    assert run_id(composed("dataset=math", "prompt=think")) == run_id(composed("dataset=math"))
    assert run_id(composed("dataset.prompt_style=other")) == run_id(composed())
    for override in ("prompt=few_shot", "prompt=qwen_math", "dataset.levels=[1]", "dataset.types=[chain]"):
        assert run_id(composed(override)) != run_id(composed())


def test_every_style_sets_every_key_so_that_none_is_left_from_the_dataset():
    keys = {"prompt_style", "system_prompt", "apply_chat_template", "template", "examples"}
    for style in STYLES:
        path = conf_dir() / "prompt" / f"{style}.yaml"
        assert set(OmegaConf.load(path)) == keys and path.read_text().startswith("# @package dataset\n")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('No system\nrole') }}{% endif %}",
            "No system role",
        ),
        ("{{ messages[0].nothing.at_all }}", "no attribute 'nothing'"),
        ("{% if %}", "Expected an expression"), ("{{ messages | sum }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)  # fmt: skip
def test_a_chat_template_that_raises(template, reason):
    text = one_line(lambda: render(make_tokenizer(template), CONFIG))
    assert reason in text
    assert "dataset.system_prompt=null or dataset.apply_chat_template=false" in text


def test_a_chat_template_that_leaves_the_question_out():
    blind = "{% for m in messages %}{{ m.content.text }}{% endfor %}"
    for template in (blind, "{{ messages[0].role }}", "Hello!"):
        with pytest.raises(ConfigError, match="not show the message to the model; expected another model"):
            render(make_tokenizer(template), CONFIG)


def test_a_long_problem_is_dropped_without_being_tokenised(tokenizer, monkeypatch):
    seen: list[str] = []
    tokenise = type(tokenizer).__call__

    def watched(self, texts, **options):
        seen.extend(texts)
        return tokenise(self, texts, **options)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    kept, dropped = render_prompts([problem("9" * 1_000_000), problem("1+1?")], tokenizer, CONFIG)
    assert [prompt.problem.id for prompt in kept] == ["1+1?"] and dropped == 1
    assert seen == [kept[0].text]
    with pytest.raises(ConfigError, match="which drops all 1 prompts"):
        render_prompts([problem("9" * 1_000_000)], tokenizer, CONFIG)


def test_control_characters_are_text_and_escaped_where_they_are_shown(tokenizer):
    question = "1\x00+\x1b[31m1\u202e?\r\n"
    assert question in render(tokenizer, replace(CONFIG, template="{problem}"), question).text
    assert shown(question, question) == r"1\x00+\x1b[31m1\u202e?\r\n => 2"


def test_questions_with_special_tokens_are_counted(tokenizer):
    asked = [problem(text) for text in ("1+1?", "1+1?[EOS]", "[BOS]1+[BOS]1?", "[eos]")]
    assert count_with_special_tokens(asked, tokenizer) == 2
    prompt = render(tokenizer, replace(CONFIG, template="{problem}"), "1+1?[EOS]")
    assert prompt.token_ids.count(tokenizer.eos_token_id) == 1  # the reason for the count


def shown(text, question, answer="2", width=60):
    return preview(Prompt(Problem("", question, answer), text, ()), width)


def test_a_prompt_is_shown_in_one_line_around_its_question():
    chat = "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert shown(chat.format("1+1?"), "1+1?") == r"...tart|>user\n1+1?<|im_end|>\n... => 2"
    asked = "What is " + "1+" * 500 + "1?"
    line = shown(chat.format(asked), asked, "7" * 99)
    assert len(line) <= 60 and "user\\nWha ... +1?<|im" in line and line.endswith("77777")
    assert shown("1+1?\n", "1+1?") == r"1+1?\n => 2"


def test_a_tokenizer_without_pad_or_end_token(composed, tmp_path):
    made = make_tokenizer(None)
    assert made.pad_token is None
    made.save_pretrained(tmp_path)
    config = replace(composed().model, path=str(tmp_path))
    loaded = load_tokenizer(config)
    assert loaded.pad_token_id == loaded.eos_token_id == made.eos_token_id
    made.eos_token = None
    made.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="expected a tokenizer with an end-of-sequence token"):
        load_tokenizer(config)


@given(
    num_problems=st.integers(1, 40),
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_problem_once_an_epoch(num_problems, sizes, seed):
    """Also where steps draw different numbers of prompts, as dynamic sampling does."""
    drawn: list[int] = []
    for size in sizes:
        drawn += choose_visits(num_problems, first=len(drawn), count=size, seed=seed)
    assert len(drawn) == sum(sizes)
    for start in range(0, len(drawn), num_problems):
        epoch = drawn[start : start + num_problems]
        assert max(Counter(epoch).values()) == 1
        assert set(epoch) <= set(range(num_problems))


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    first = choose_visits(1000, first=0, count=1000, seed=1)
    assert choose_visits(1000, first=0, count=1000, seed=1) == first
    assert choose_visits(1000, first=0, count=1000, seed=2) != first
    assert choose_visits(1000, first=1000, count=1000, seed=1) != first
    steps = [choose_visits(1000, first=100 * step, count=100, seed=1) for step in range(10)]
    assert [i for step in steps for i in step] == first
    assert all(type(i) is int for i in first)
    # What a resumed run relies on: numpy's PCG64 from (seed, epoch).
    order = [choose_visits(5, first=3 * step, count=3, seed=0) for step in range(4)]
    assert order == [[2, 4, 3], [0, 1, 1], [4, 3, 0], [2, 4, 2]]
