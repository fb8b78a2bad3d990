"""scripts/pretrain.py, and the shipped model for the keywords language."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM, AutoTokenizer

import capo_exp
from capo_exp.config.errors import ConfigError
from capo_exp.config.schema import conf_dir
from capo_exp.data.keywords import make_language, problems
from capo_exp.training import loop
from scripts import pretrain

ASSETS = Path(capo_exp.__file__).parent / "assets" / "keywords"
SOURCE = OmegaConf.to_container(OmegaConf.load(conf_dir() / "dataset" / "keywords.yaml").source)
LANGUAGE = make_language(**{k: v for k, v in SOURCE["language"].items() if k != "_target_"})
STARTS = sorted(p.stem for p in (conf_dir() / "warm_start").glob("[!_]*.yaml"))


def compose_start(name, *overrides):
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(compose("pretrain", [f"warm_start={name}", *overrides]), resolve=True)


@pytest.fixture(scope="module")
def shipped():
    model = AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(ASSETS)


def test_every_word_of_the_language_is_one_token(shipped):
    _, tokenizer = shipped
    for word in (*LANGUAGE.good, *LANGUAGE.bad, *LANGUAGE.fillers):
        assert len(tokenizer.encode(f" {word}")) == 1


def test_the_shipped_model_is_small_and_of_the_yaml(shipped):
    model, tokenizer = shipped
    assert sum(path.stat().st_size for path in ASSETS.rglob("*")) < 3_000_000
    shape = compose_start("keywords")["warm_start"]["shape"]
    assert len(tokenizer) == model.config.vocab_size == shape["vocab_size"]
    assert {key: getattr(model.config, key) for key in shape} == shape
    assert "_name_or_path" not in (ASSETS / "config.json").read_text()


def test_the_shipped_model_leaves_room_and_keeps_to_the_form(shipped):
    model, tokenizer = shipped
    asked = problems("test", path=None, seed=0, num_train=1, num_eval=200, language=LANGUAGE)
    torch.manual_seed(0)
    prompts = [f"{p.problem}\n" for p in asked]
    texts = pretrain.complete(model, tokenizer, prompts, do_sample=True, top_k=0)
    pairs = zip(texts, asked, strict=True)
    right = [text.endswith(f"\\boxed{{{p.answer}}}<|endoftext|>") for text, p in pairs]
    assert 0.45 < sum(right) / len(right) < 0.7
    assert all(text.startswith("( ") for text in texts)


def test_every_warm_start_has_pairs_and_its_model_a_path():
    """The model's YAML points to where the warm start puts it."""
    for name in STARTS:
        config = compose_start(name)
        prompt, completion = next(pretrain.draw_pairs(config["warm_start"], config["dataset"]["template"], 0))
        assert prompt.endswith("\n") and completion
        assert config["model"]["path"].removeprefix("pkg://") == config["output"]


def test_a_vocabulary_that_the_corpus_does_not_fill_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"expected 5000; change warm_start\.shape\.vocab_size"):
        pretrain.train_tokenizer(iter(["a b c"]), 5000)


def test_a_mistake_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys):
    made = tmp_path / "model"
    given = ["warm_start=keywords", f"output={made}", "dataset.source.language.num_fillers=7000"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *given])
    with pytest.raises(SystemExit) as end:
        pretrain.main()
    GlobalHydra.instance().clear()
    assert end.value.code == 2 and not made.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "dataset.source.language.num_fillers=7000: expected at most 6,400 words" in line


@pytest.mark.slow
def test_the_script_makes_a_model_that_trains(tmp_path, composed):
    """As a user does, with two steps instead of 900; then one step of the main command with what it made."""
    made, threads = tmp_path / "model", torch.get_num_threads()
    small = ["warm_start.steps=2", "warm_start.batch_size=4", "warm_start.eval_problems=4"]
    pretrain.make(compose_start("keywords", f"output={made}", f"warm_start.threads={threads}", *small))
    directory = loop.run(
        composed(
            "setting=keywords", f"model.path={made}", "num_steps=1", "regime.prompts_per_step=2",
            "regime.group_size=2", "model.micro_batch_size=4", "evaluation.every=0", "logger=files",
            "evaluation.num_problems=2", f"output_dir={tmp_path}",
        )
    )  # fmt: skip
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1
