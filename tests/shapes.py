"""Shapes of models on the hub, as their config.json has them; docs/MODELS.md has the table."""

import json
from typing import Any

NAMES = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    repository: dict(zip(NAMES, values, strict=True))
    for repository, values in {
        "HuggingFaceTB/SmolLM2-135M-Instruct": ("llama", 49152, 576, 1536, 30, 9, 3, 64, True),
        "Qwen/Qwen2.5-0.5B": ("qwen2", 151936, 896, 4864, 24, 14, 2, None, True),
        "Qwen/Qwen3-0.6B": ("qwen3", 151936, 1024, 3072, 28, 16, 8, 128, True),
        "Qwen/Qwen2.5-1.5B": ("qwen2", 151936, 1536, 8960, 28, 12, 2, None, True),
        "Qwen/Qwen3-1.7B": ("qwen3", 151936, 2048, 6144, 28, 16, 8, 128, True),
        "Qwen/Qwen2.5-3B": ("qwen2", 151936, 2048, 11008, 36, 16, 2, None, True),
        "Qwen/Qwen3-4B": ("qwen3", 151936, 2560, 9728, 36, 32, 8, 128, True),
        "Qwen/Qwen2.5-Math-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4, None, False),
        "meta-llama/Llama-3.1-8B-Instruct": ("llama", 128256, 4096, 14336, 32, 32, 8, None, False),
    }.items()
}
"""In order of size."""


def write_shape(folder, repository, **more):
    """Writes config.json of a model without weights and returns its folder, for model.path."""
    place = folder / repository.rpartition("/")[2]
    place.mkdir(parents=True, exist_ok=True)
    stated = {name: value for name, value in SHAPES[repository].items() if value is not None}
    (place / "config.json").write_text(json.dumps(stated | more))
    return str(place)
