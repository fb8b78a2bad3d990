"""The shipped tiny model and tokenizer: small and complete; tests/test_trace.py has what it samples."""

import json
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import capo_exp
from capo_exp.config.schema import conf_dir
from capo_exp.data.arithmetic import problems

ASSETS = Path(capo_exp.__file__).parent / "assets" / "tiny"
DATASET = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dataset" / "arithmetic.yaml"))
NUMBERS = {key: value for key, value in DATASET["source"].items() if not key.startswith("_")}
TOKENIZER = AutoTokenizer.from_pretrained(ASSETS)
FILE = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def test_problems():
    return problems("test", path=None, **NUMBERS)


@given(st.text())
@example("  Sei $\\frac{1}{2}$\n\n\t\\boxed{-3,14}  \r\n\u00e9\u4e2d\U0001f600 x^{10} \\\\ { }")
def test_any_text_survives_and_every_loader_gives_the_same_tokens(text):
    """Once composed (NFC); AutoTokenizer takes its pieces from Qwen2Tokenizer, others from the file."""
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == unicodedata.normalize("NFC", text) and tokens == FILE.encode(text).ids


def test_the_tokenizer_fits_model_and_problems(model, test_problems):
    words, encode = TOKENIZER.get_vocab(), TOKENIZER.encode
    assert not [word for word in words if len(word) > 1 and any(c.isascii() and c.isdigit() for c in word)]
    assert encode("7") == TOKENIZER.convert_tokens_to_ids(["7"])  # nothing in front or behind
    assert len(TOKENIZER) == model.config.vocab_size == 1024 and sorted(words.values()) == list(range(1024))
    marks = (TOKENIZER.eos_token, TOKENIZER.pad_token, TOKENIZER.padding_side)
    assert marks == ("<|endoftext|>", "<|pad|>", "left") and len(encode("<|im_start|><|im_end|>")) == 2
    for config in (model.config, model.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (TOKENIZER.eos_token_id, TOKENIZER.pad_token_id)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert max(len(TOKENIZER.encode(p.problem)) for p in test_problems) <= DATASET["max_prompt_tokens"]
    lengths = [len(TOKENIZER.encode(p.demonstration)) for p in test_problems]
    assert max(lengths) <= 60 and 15 <= sum(lengths) / len(lengths) <= 50


def test_size_dtype_and_origin_of_the_files(model):
    assert 0.85e6 < sum(p.numel() for p in model.parameters()) < 1.05e6
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 3_000_000
    with safe_open(ASSETS / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"BF16"}  # noqa: SIM118
    config = json.loads((ASSETS / "config.json").read_text())
    assert "_name_or_path" not in config  # nor any other path of the machine that made it
    assert not any("/" in str(value) for value in config.values())
