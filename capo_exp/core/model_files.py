"""The files of a model: what is wrong with them is one line; nothing in them changes how it is sampled."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from capo_exp.config.errors import ConfigError

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
    except Exception as error:
        kind = "" if isinstance(error, OSError | ValueError | ImportError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())[:200]
        raise ConfigError(
            f"{subject}: could not be loaded ({reason}); expected a local directory with safetensors weights "
            "and a tokenizer, or a hub id that can be reached"
        ) from error
    finally:
        logging.set_verbosity(verbosity)


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
        ConfigError: for a tensor that is absent, unknown, of another shape, no float, or not finite.
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
