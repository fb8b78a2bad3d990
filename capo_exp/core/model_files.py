"""The files of a model: what is wrong with them is one line; nothing in them changes how it is sampled."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.hub import cached_file

from capo_exp.config.errors import ConfigError, error
from capo_exp.config.places import MADE_HERE, resolve_model_path
from capo_exp.config.schema import ModelConfig
from capo_exp.core import smollm2

FLOATS = ("F64", "F32", "F16", "BF16")
"""Types of weights, as safetensors names them."""
SHOWN = 3
"""Tensors that a message names."""


@contextmanager
def readable(subject: str) -> Iterator[None]:
    """Turns what transformers raises for damaged, foreign or absent files into a ConfigError of one line.

    It raises anything, from AttributeError to the tokenizers' plain Exception, and warns in many lines.

    Args:
        subject: begins the message.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    except (ConfigError, MemoryError):
        raise
    except Exception as failure:
        named = isinstance(failure, OSError | ValueError | ImportError)
        kind = "" if named else f"{type(failure).__name__}: "
        reason = " ".join(f"{kind}{failure}".split())[:200]
        raise ConfigError(
            f"{subject}: could not be loaded ({reason}); expected a local directory with safetensors weights "
            "and a tokenizer, or a hub id that can be reached"
        ) from failure
    finally:
        logging.set_verbosity(verbosity)


def find_model(config: ModelConfig) -> str:
    """Returns the directory or hub id of a model; one in the cache is made if it is not there yet.

    Raises:
        ConfigError: if it has to be made, and what it is made from is missing.
    """
    path = resolve_model_path(config.path)
    if config.path.startswith(MADE_HERE) and not Path(path).is_dir():
        smollm2.convert(Path(path))
    return path


def read_facts(config: ModelConfig) -> PreTrainedConfig:
    """Reads the model's own config.json."""
    with readable(f"model.path={config.path}"):
        return AutoConfig.from_pretrained(
            find_model(config), revision=config.revision, trust_remote_code=False
        )


def check_logits(config: ModelConfig) -> None:
    """Refuses a model whose own config.json, which alone is read, says that its logits are not W h, and
    dropout where it would tell learner from sampler."""
    facts = read_facts(config)
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(facts, name, None)
        if value not in (None, 1.0):
            raise ConfigError(
                f"model.path={config.path}: {name}={value}; expected logits linear in the last state"
            )
    # transformers checkpoints activations in training mode only, where dropout would make learner and sampler
    # disagree.
    dropouts = {k: v for k, v in facts.to_dict().items() if k.endswith(("dropout", "pdrop"))}
    dropout = {name: value for name, value in dropouts.items() if value}
    if config.gradient_checkpointing and dropout:
        raise ConfigError(
            f"model.gradient_checkpointing=true: expected a model without dropout, got {dropout}"
        )


def check_attention(config: ModelConfig, device: torch.device) -> None:
    """Refuses attention that this device, this model or what is installed here cannot run."""
    key, name = "model.attn_implementation", config.attn_implementation
    if name in ("sdpa", "eager"):
        return
    if device.type == "cpu":
        raise error(key, name, "sdpa or eager on a CPU")
    facts = read_facts(config)
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(facts, attn_implementation=name, trust_remote_code=False)
    except (ImportError, OSError, ValueError, RuntimeError) as failure:
        raise error(key, name, f"sdpa, or what makes it run: {' '.join(str(failure).split())}") from failure


def check_weights(
    model: PreTrainedModel, found: dict[str, Any], source: str, revision: str | None, subject: str
) -> None:
    """Compares a loaded model with its files, of which transformers makes up what they lack.

    Args:
        model: as it was loaded.
        found: what transformers says of the loading.
        source: directory or hub id of the files.
        revision: commit on the hub.
        subject: begins the message.

    Raises:
        ConfigError: for a tensor that is absent, unknown, of another shape, no float, or not finite, and for
            two where one is tied to the other.
    """
    whole = model.named_parameters()
    faults = {
        "without": found["missing_keys"],
        "with the unknown": found["unexpected_keys"],
        "with another shape of": [name for name, *_ in found["mismatched_keys"]],
        "without floating-point numbers in": _find_integers(model, source, revision),
        "with NaN or infinity in": [name for name, tensor in whole if not tensor.sum().isfinite()],
    }
    said = [f"{what} {_name(names)}" for what, names in faults.items() if names]
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embedding = (getattr(layer, "weight", None) for layer in layers)
    if model.config.tie_word_embeddings and head is not embedding:  # as transformers does with two values
        said.append("whose last layer is not the embedding, though tie_word_embeddings is true")
    if said:
        kind = model.config.model_type
        raise ConfigError(f"{subject}: expected the weights of a {kind} model, got files {'; '.join(said)}")


def _find_integers(model: PreTrainedModel, source: str, revision: str | None) -> list[str]:
    """Returns the weights that the files hold as integers or in fewer bits, which are read as floats."""
    base = f"{model.base_model_prefix}."
    known = {name.removeprefix(base) for name, _ in model.named_parameters(remove_duplicate=False)}
    local = Path(source).is_dir()
    folder = source if local else snapshot_download(source, revision=revision, local_files_only=True)
    wrong: list[str] = []
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            kinds = {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
        wrong += [n for n, kind in kinds.items() if kind not in FLOATS and n.removeprefix(base) in known]
    return wrong


def _name(names: Iterable[str]) -> str:
    several = sorted(names)
    rest = len(several) - SHOWN
    return ", ".join(several[:SHOWN]) + (f" and {rest:,} more" if rest > 0 else "")


def make_generation_config(source: str, revision: str | None, vocab_size: int) -> GenerationConfig:
    """Makes what takes the place of the model's generation_config.json: the tokens that can end a completion.

    A chat model can have several, of which its tokenizer names one. All else in that file is how somebody
    wants to sample, of which the learner knows nothing; it may not be valid either, or not readable.
    """
    found: list[object] = []
    for name in ("config.json", "generation_config.json"):
        path = cached_file(
            source,
            name,
            revision=revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        try:
            content = json.loads(Path(path).read_bytes()) if path else None
        except ValueError:
            continue
        own = content.get("eos_token_id") if isinstance(content, dict) else None
        found += own if isinstance(own, list) else [own]
    ends = {end for end in found if type(end) is int and 0 <= end < vocab_size}
    return GenerationConfig(eos_token_id=sorted(ends) or None)
