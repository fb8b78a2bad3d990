"""The shape of a model, read from its own config.json and typed nowhere. Imports no torch where the file says
all of it."""

import json
import os
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

from capo_exp.config.errors import ConfigError, brief, error, suggest
from capo_exp.config.places import MADE_HERE, conf_dir, is_local_path, resolve_model_path, slug

NEEDS = "the hub, HF_HOME or model.path=DIR"
"""What has the config.json of a model on the hub."""
SECONDS = 5.0
"""How long the hub may take to answer for a plan."""


class HubSilent(ConfigError):
    """The config.json of a model is on the hub alone, which does not hand it out here."""


@dataclass(frozen=True)
class Architecture:
    """The shape of a decoder, named as in config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    head_dim: int | None
    """None where it is hidden_size / num_attention_heads."""

    @property
    def head_size(self) -> int:
        """Returns how many numbers a head's query of a token has."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


ARCHITECTURE = tuple(field.name for field in fields(Architecture))
"""Keys of `model` that its config.json fills; a record has them too, and they count in a run's identity."""


def read_architecture(path: str, revision: str | None) -> dict[str, Any]:
    """Reads what config.json says of the ARCHITECTURE; transformers adds what the file leaves to its class.

    Raises:
        HubSilent: it is on the hub alone, which does not hand it out here.
        ConfigError: it is not there, or none that transformers knows; the message names other models.
    """
    file = _find_config(path, revision)
    try:
        stated = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as failure:
        raise error("model.path", path, f"a readable config.json ({failure})") from None
    shape = {name: stated.get(name) if isinstance(stated, dict) else None for name in ARCHITECTURE}
    if None in [value for name, value in shape.items() if name != "head_dim"]:
        shape = _ask_transformers(path, file.parent)
    for name, kind in get_type_hints(Architecture).items():
        value = shape[name]
        is_flag, too_small = isinstance(value, bool), isinstance(value, int) and value < 1
        if not isinstance(value, kind) or is_flag != (kind is bool) or (too_small and not is_flag):
            wanted = f"the config.json of a model, got one whose {name} is {json.dumps(value)[:40]}"
            raise error("model.path", path, wanted)
    if shape["head_dim"] and shape["head_dim"] * shape["num_attention_heads"] == shape["hidden_size"]:
        shape["head_dim"] = None
    return shape


def fill_architecture(model: Any) -> None:
    """Puts what config.json says into a ModelConfig where it is null; leaves null what cannot be read."""
    with suppress(ConfigError):
        for name, value in read_architecture(model.path, model.revision).items():
            if getattr(model, name) is None:
                setattr(model, name, value)


def no_model(path: str, lacks: str) -> str:
    """Returns what is wrong with a path, with the models that this installation knows."""
    known = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))
    choices = suggest(slug(path.rpartition("/")[2]).lower().replace(".", "_").replace("-", "_"), known)
    return f"model.path={path}: {lacks}; or, with model=, {choices.removeprefix('expected ')}"


def _find_config(path: str, revision: str | None) -> Path:
    if path.startswith(MADE_HERE):  # as the conversion writes it, which may not have run yet
        return Path(__file__).parents[1] / "assets" / f"{path.removeprefix(MADE_HERE)}.json"
    if is_local_path(path):
        file = Path(resolve_model_path(path)) / "config.json"
        if not os.path.isfile(file):
            raise ConfigError(no_model(path, "expected a directory with the config.json of a model"))
        return file
    found = _find_on_hub(path, revision)
    if isinstance(found, str):
        raise HubSilent(no_model(path, f"its config.json cannot be read ({found}); expected {NEEDS}"))
    return found


@cache
def _find_on_hub(path: str, revision: str | None) -> Path | str:
    """Returns where the hub's cache has config.json, after fetching it if need be; or why it has not."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    try:
        known = try_to_load_from_cache(path, "config.json", revision=revision)
        if not isinstance(known, str):
            # One question, since the download asks six times where there is no hub.
            get_hf_file_metadata(hf_hub_url(path, "config.json", revision=revision), timeout=SECONDS)
            known = hf_hub_download(path, "config.json", revision=revision)
    except Exception as failure:
        return brief(failure, 120)
    return Path(known)


def _ask_transformers(path: str, folder: Path) -> dict[str, Any]:
    from transformers import AutoConfig

    try:
        facts: Any = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    except Exception as failure:  # it raises anything
        wanted = f"a config.json that transformers knows ({brief(failure, 120)})"
        raise error("model.path", path, wanted) from None
    shape = {name: getattr(facts, name, None) for name in ARCHITECTURE}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    shape["intermediate_size"] = shape["intermediate_size"] or 4 * (shape["hidden_size"] or 0)
    return shape
