"""A model of a user's own: how it is named, its shape from its config.json, weights in bfloat16."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from capo_exp.cli.compose import compose_config
from capo_exp.cli.errors import in_one_line
from capo_exp.cli.words import as_overrides
from capo_exp.config import architecture
from capo_exp.config.architecture import ARCHITECTURE, read_architecture
from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.config.places import resolve_model_path
from capo_exp.config.schema import to_config
from capo_exp.runs.files import list_checkpoints
from capo_exp.runs.identity import run_id
from capo_exp.training import loop as train
from capo_exp.training.adamw_bfloat16 import AdamWBfloat16, join_bits, split_bits
from capo_exp.training.optimizer import reset_moments
from tests.pieces import assert_same_end, one_line, run_one_step
from tests.shapes import SHAPES

MATH_7B, RATE = "Qwen/Qwen2.5-Math-7B", "regime.learning_rate=1e-4"
SHORT = [
    RATE, "algo=sft", "rollout=demonstrations", "logger=files", "regime.prompts_per_step=2",
    "regime.group_size=1", "evaluation.num_problems=2", "dataset.max_completion_tokens=64",
    "evaluation.every=0", "checkpoint.every=1", "num_steps=2", "optimizer.schedule=constant",
]  # fmt: skip


def commanded(*words):
    """The configuration of a command line, checked."""
    with in_one_line():
        config = to_config(compose_config(as_overrides(words)))
    check(config)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the directory `my models/a=b, c` of a random Llama."""
    home = tmp_path_factory.mktemp("home")
    folder = home / "my models" / "a=b, c"
    tokenizer = AutoTokenizer.from_pretrained(resolve_model_path("pkg://capo_exp/assets/tiny"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=12, tie_word_embeddings=False, eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return home


def test_a_directory_is_a_model_however_it_is_written(home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "my models")
    path = str(home / "my models" / "a=b, c")
    for written in (path, "~/my models/a=b, c", "./a=b, c", "a=b, c", "../my models/a=b, c/", f"'{path}'"):
        assert as_overrides([f"model={written}"]) == ["model=auto", f"model.path='{path}'"], written
    config = commanded("model=a=b, c", RATE)
    assert (config.model.name, config.model.path) == ("a_b_c", path)
    shape = ("llama", 1024, 16, 40, 2, 2, 1, False, 12)
    assert tuple(getattr(config.model, name) for name in ARCHITECTURE) == shape
    assert run_id(config) == run_id(commanded("model=auto", f"model.path='{path}'", RATE))


def test_what_else_is_said_of_model_stays(home, monkeypatch):
    monkeypatch.chdir(home)
    for word in ("model=tiny", "model=tiny,keywords", "model=tinny", "model.path=x", "model=choice(a,b)"):
        assert as_overrides([word]) == [word]
    several = ["model=auto", f"model.path='{home / 'my models'}','org/name'"]
    assert as_overrides(["model=my models,org/name"]) == several
    with pytest.raises(ConfigError, match=r"^model=tiny,org/name: expected directories and hub ids alone"):
        as_overrides(["model=tiny,org/name"])
    (home / "tiny").mkdir()  # a shipped name is that of the shipped model
    assert as_overrides(["model=tiny"]) == ["model=tiny"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=HERE"], r"regime\.learning_rate: no value; .* no model\.reference_learning_rate is k"),
        (["model=HERE", "regime=scaled"], r"regime\.learning_rate: no value; expected a number"),
        (["model=/nothing/tinny"], r"model\.path=/nothing/tinny: expected a directory .*; nearest: tiny"),
        (["model=tinny"], r"model=tinny: no directory, no hub id org/name .*; nearest: tiny"),
        (["model=auto"], r"model\.path: no value; expected a directory or a hub id"),
        (["model=" + "x" * 300], "model=x+: no directory, no hub id org/name"),
        (["model=/" + "x" * 300], "model.path=/x+: expected a directory"),
        (["model=HERE", RATE, "model.hidden_size=7"], r"model\.hidden_size=7: expected 16, as the config"),
        (["model=HERE", RATE, "curvature.top_k=2000"], r"curvature\.top_k=2000: expected at most model\.voc"),
        (["model.load_dtype=bfloat16", "step_rule=measured"], r"algo\.step_rule\._target_=.*full_step with"),
        (["model.load_dtype=bfloat16", "model.compute_dtype=float32"], r"model\.compute_dtype=float32: exp"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line(home, words, message):
    given = [word.replace("HERE", str(home / "my models" / "a=b, c")) for word in words]
    assert re.match(message, one_line(lambda: commanded(*given)))


def test_transformers_adds_what_a_file_leaves_to_its_class(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 48, "n_head": 4}))
    shape = read_architecture(str(tmp_path), None)
    assert (shape["hidden_size"], shape["num_key_value_heads"], shape["intermediate_size"]) == (48, 4, 192)
    assert shape["tie_word_embeddings"] is True and shape["head_dim"] is None
    whole = json.loads(Path(resolve_model_path("pkg://capo_exp/assets/tiny"), "config.json").read_text())
    wrong = {"hidden_size": "128", "num_hidden_layers": 0, "tie_word_embeddings": 1, "model_type": {"a": 1}}
    faults = [("{", "a readable config.json"), ("[]", "transformers knows")]
    faults += [(json.dumps(whole | {name: value}), f"whose {name} is") for name, value in wrong.items()]
    for text, said in faults:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=rf"^model\.path={tmp_path}: expected .*{said}"):
            read_architecture(str(tmp_path), None)


def test_a_model_on_the_hub_is_read_from_the_cache(composed, tmp_path, monkeypatch):
    """Its run has the id that it had when its shape was typed into conf/model."""
    architecture._find_on_hub.cache_clear()
    config = composed("experiment=paper/capo")
    with pytest.raises(ConfigError, match=rf"^model\.path={MATH_7B}: its config\.json .*the hub, HF_HOME"):
        _ = config.model.architecture
    check(config)  # the plan says so
    place = tmp_path / "models--Qwen--Qwen2.5-Math-7B"
    snapshot = place / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    stated = {name: value for name, value in SHAPES[MATH_7B].items() if value is not None}
    (snapshot / "config.json").write_text(json.dumps(stated))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    architecture._find_on_hub.cache_clear()
    config = composed("experiment=paper/capo")
    assert config.model.vocab_size == 152064 and config.model.head_dim is None
    assert run_id(config) == "259d6515"
    architecture._find_on_hub.cache_clear()


def test_the_shape_of_the_model_that_is_made_here_is_what_was_made():
    kept = read_architecture("cache://smollm2_135m", None)
    assert kept == {**SHAPES["HuggingFaceTB/SmolLM2-135M-Instruct"], "head_dim": None}


def test_a_weight_and_its_rest_are_a_float32_to_the_bit():
    whole = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 50)
    nearest, rest = split_bits(whole)
    assert (nearest.dtype, rest.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_bits(nearest, rest), whole)
    assert (nearest.float() - whole).abs().le((whole.bfloat16().float() - whole).abs()).all()


def test_bfloat16_weights_move_as_float32_ones_do_also_after_a_checkpoint():
    """Rates of which a bfloat16 weight alone shows nothing."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=generator).bfloat16()
    whole, half = torch.nn.Parameter(start.float()), torch.nn.Parameter(start.clone())
    real = torch.optim.AdamW([whole], lr=1e-6, weight_decay=0.1, foreach=False)
    ours = AdamWBfloat16([half], lr=1e-6, weight_decay=0.1)
    for step in range(6):
        gradient = torch.randn(40, 30, generator=generator).bfloat16()
        whole.grad, half.grad = gradient.float(), gradient
        if step == 3:
            torch.save(ours.state_dict(), file := io.BytesIO())
            file.seek(0)
            ours = AdamWBfloat16([half], lr=1.0)
            ours.load_state_dict(torch.load(file))
        real.step()
        ours.step()
    assert torch.equal(join_bits(half.data, ours.state[half]["rest"]), whole.data)
    reset_moments(ours)  # the rest of a weight is no moment
    assert torch.equal(join_bits(half.data, ours.state[half]["rest"]), whole.data)
    assert not ours.state[half]["exp_avg"].any() and ours.state[half]["step"] == 0
    assert ours.state[half]["exp_avg_sq"].dtype == torch.float32
    assert not torch.equal(whole.data, start.float()) and (half.data == start).float().mean() > 0.9


@pytest.mark.slow
def test_an_own_model_trains_in_bfloat16_and_resumes_to_the_same_bits(home, tmp_path):
    """On demonstrations: what a random model samples earns nothing, and would move no weight."""
    words = [f"model={home / 'my models' / 'a=b, c'}", "model.load_dtype=bfloat16", "algo.kl_coefficient=0.1"]
    folders = (tmp_path / name for name in ("whole", "stopped"))
    configs = [commanded(*words, *SHORT, f"output_dir={folder}") for folder in folders]
    run_one_step(configs[1])
    whole, stopped = map(train.run, configs)
    assert_same_end(whole, stopped)
    with safe_open(list_checkpoints(whole)[2] / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
