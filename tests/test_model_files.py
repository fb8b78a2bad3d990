"""A model's files: what is wrong with them is one line, and nothing in them changes how it is sampled."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor
from transformers import AddedToken

import capo_exp
from capo_exp.config.errors import ConfigError
from capo_exp.core import policy
from capo_exp.core.model_files import check_logits
from capo_exp.core.types import Problem, Prompt
from capo_exp.data.prompts import render_prompts
from capo_exp.rollout import SamplingRequest
from capo_exp.rollout.hf import HFRollout, find_end_token_ids
from tests.pieces import run_training

Tensors = dict[str, Tensor]
ASSETS = Path(capo_exp.__file__).parent / "assets" / "tiny"
CPU = torch.device("cpu")
UP, NORM = "model.layers.1.mlp.up_proj.weight", "model.norm.weight"


@pytest.fixture
def config(composed, tmp_path):
    """The tiny model in a folder of its own."""
    shutil.copytree(ASSETS, tmp_path / "tiny")
    return replace(composed().model, path=str(tmp_path / "tiny"))


def change(config, how):
    file = Path(config.path) / "model.safetensors"
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def load(config):
    """All that a run reads of a model."""
    check_logits(config)
    policy.check_length(config, 100)
    policy.load_tokenizer(config)
    policy.load_model(config, CPU)


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


FAULTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda w: without(w, UP), f"without {UP}$"),
    "foreign prefix": (
        lambda w: {f"module.{k}": v for k, v in w.items()},
        r"without lm_head\.weight, [\w.]+, [\w.]+ and 48 more; with the unknown module[\w.]+, [\w., ]+ more$",
    ),
    "unknown": (lambda w: w | {"b": torch.ones(2), "a": torch.ones(2)}, "with the unknown a, b$"),
    "another shape": (lambda w: w | {NORM: torch.ones(64)}, f"with another shape of {NORM}$"),
    "int8": (
        lambda w: {k: v.to(torch.int8) for k, v in w.items()},
        "without floating-point numbers in model.embed_tokens.weight, .* and 47 more$",
    ),
    "one int64": (lambda w: w | {NORM: torch.ones(128).long()}, f"floating-point numbers in {NORM}$"),
    "float8": (lambda w: w | {NORM: torch.ones(128).to(torch.float8_e4m3fn)}, f"numbers in {NORM}$"),
    "two last layers": (
        lambda w: w | {"lm_head.weight": torch.ones(w["model.embed_tokens.weight"].shape)},
        "files whose last layer is not the embedding, though tie_word_embeddings is true$",
    ),
    "NaN": (lambda w: w | {NORM: torch.full((128,), torch.nan)}, f"with NaN or infinity in {NORM}$"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_the_models_are_named(fault, config):
    how, message = FAULTS[fault]
    change(config, how)
    with pytest.raises(ConfigError, match=message) as raised:
        load(config)
    start = f"model.path={config.path}: expected the weights of a qwen2 model, got files w"
    assert str(raised.value).startswith(start) and "\n" not in str(raised.value)
    if fault == "missing":
        with pytest.raises(ConfigError) as raised:  # as a run's own checkpoint: does not blame model.path
            policy.load_model(replace(config, path=str(ASSETS)), CPU, weights=Path(config.path))
        assert str(raised.value).startswith(f"{config.path}: expected the weights")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_floats_of_any_size_are_weights(dtype, config):
    change(config, lambda w: {key: value.to(dtype) for key, value in w.items()})
    load(config)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "{"), ("config.json", "[]"), ("config.json", '{"model_type": "nosuch"}'),
        ("tokenizer.json", "{"), ("tokenizer_config.json", "[]"),
        ("model.safetensors", "version https://git-lfs"),
    ],
)  # fmt: skip
def test_damaged_files_are_one_line(file, content, config):
    (Path(config.path) / file).write_text(content)
    with pytest.raises(ConfigError, match=r"^model\.path=.*: could not be loaded \(.+\); expected") as raised:
        load(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_position_embeddings", None), ("hidden_act", "nosuch"), ("dtype", "nosuch"),
        ("layer_types", ["sliding_attention"] * 4),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_one_line(key, value, config):
    file = Path(config.path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(ConfigError, match=r"^model\.path=.*: could not be loaded \(.+\); expected"):
        load(config)


GENERATION = [
    {"temperature": 0.9, "top_p": 0.6, "num_return_sequences": 4, "num_beams": 3, "repetition_penalty": 1.5,
     "do_sample": True, "suppress_tokens": [4, 5, 6], "pad_token_id": 7, "bos_token_id": 8, "nosuch": {}},
    {"stop_strings": ["a"], "min_new_tokens": 9}, {"max_new_tokens": -1, "max_length": "x"},
    {"cache_implementation": "nosuch", "compile_config": 3, "watermarking_config": [1]},
    {"eos_token_id": [16, 1.5, None, True, -1, 10**9]}, [1], None, "text",
]  # fmt: skip


def sample(config):
    model, tokenizer = policy.load_model(config, CPU), policy.load_tokenizer(config)
    prompts = [Prompt(Problem("0", "", ""), "", tuple(tokenizer("Compute 31 + 5.\n")["input_ids"]))]
    engine = HFRollout(model, tokenizer, torch.float32, max_sequences_per_call=8)
    request = SamplingRequest(prompts, 8, 30, 1.0, top_k=0, top_p=1.0, seed=3, weight_version=0)
    model.save_pretrained(f"{config.path}-saved")
    return [completion.token_ids for completion in engine.generate(request)[0].completions]


@pytest.mark.slow
def test_a_generation_config_changes_no_sample_and_stops_nothing(config):
    """Nor does the saved model hold what stood there."""
    plain, file = sample(config), Path(config.path) / "generation_config.json"
    contents = [b"", b"\xff\xfe", *(json.dumps(content).encode() for content in GENERATION)]
    for content in contents:
        file.write_bytes(content)
        assert sample(config) == plain, content
        saved = json.loads(Path(f"{config.path}-saved/generation_config.json").read_text())
        assert set(saved) - {"transformers_version", "_from_model_config"} == {"eos_token_id"}
    file.unlink()
    assert sample(config) == plain


def test_special_tokens_that_the_files_name_end_a_completion_too(config):
    tokenizer = policy.load_tokenizer(config)
    turn, end = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    (Path(config.path) / "generation_config.json").write_text(json.dumps({"eos_token_id": [turn, 20]}))
    assert find_end_token_ids(policy.load_model(config, CPU), tokenizer) == sorted({turn, end})


def test_a_tokenizer_larger_than_the_embedding(config):
    load(config)
    tokenizer = policy.load_tokenizer(config)
    tokenizer.add_tokens([AddedToken("<new>")])
    tokenizer.save_pretrained(config.path)
    with pytest.raises(ConfigError, match=r"has the token 1024; expected one of at most 1024 tokens"):
        load(config)


def test_a_tokenizer_that_ends_prompts_is_said(composed):
    """With a chat template the tokenizer adds nothing."""
    config = composed()
    tokenizer, asked = policy.load_tokenizer(config.model), [Problem("0", "1+1?", "2")]
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    with pytest.raises(
        ConfigError, match=r"puts its end token <\|endoftext\|> behind every prompt; expected"
    ):
        render_prompts(asked, tokenizer, config.dataset)
    (prompt,), _ = render_prompts(asked, tokenizer, replace(config.dataset, apply_chat_template=True))
    assert prompt.token_ids[-1] != end[1]


@pytest.mark.parametrize("name", ["org/kernel", "flash_attention_2", "flex_attention"])
def test_attention_that_cannot_run_blames_its_own_key(name, config):
    wanted = replace(config, attn_implementation=name)
    with pytest.raises(ConfigError, match=f"^model.attn_implementation={name}: expected sdpa or eager on a"):
        policy.load_model(wanted, CPU)
    if name != "flex_attention":  # which needs no package
        with pytest.raises(ConfigError, match=f"^model.attn_implementation={name}: expected sdpa, or what"):
            policy.load_model(wanted, torch.device("cuda"))


def test_a_run_ends_with_one_line_and_2(config, tmp_path, capfd):
    change(config, lambda w: without(w, UP))
    assert run_training(f"model.path={config.path}", f"output_dir={tmp_path / 'out'}", "num_steps=1") == 2
    [said] = [line for line in capfd.readouterr().err.splitlines() if "Loading weights" not in line]
    assert said.endswith(f"got files without {UP}")
    assert not list(tmp_path.glob("out/**/metrics.jsonl"))
