"""The language model as a policy: loading it, and one forward pass over a batch.

The shift by one (a state at position p predicts the token at p + 1) and the temperature live here, once.
"""

import json
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from capo_exp.config.errors import ConfigError
from capo_exp.config.places import MADE_HERE
from capo_exp.config.schema import ModelConfig, TrainConfig
from capo_exp.core import model_files, packing, smollm2
from capo_exp.core.masked import unpack
from capo_exp.core.token_scores import score_hidden
from capo_exp.core.types import Batch, PolicyOutput
from capo_exp.distributed.sharding import SCORE, decoder_layers, full, is_sharded


def read_origin(config: ModelConfig) -> dict[str, str] | None:
    """Returns what a model that was made on this machine came from, with its digest; None for others."""
    if not config.path.startswith(MADE_HERE):
        return None
    return json.loads((Path(model_files.find_model(config)) / smollm2.ORIGIN).read_text(encoding="utf-8"))


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Loads the model's tokenizer, which pads on the left.

    Raises:
        ConfigError: if it cannot be read, has no end-of-sequence token, or more tokens than the model.
    """
    with model_files.readable(f"model.path={config.path}"):
        path, revision = model_files.find_model(config), config.revision
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=False, padding_side="left"
        )
        encoded = tokenizer("1", add_special_tokens=False)["input_ids"]
        highest = max(tokenizer.get_vocab().values(), default=0)
    lacks = None if encoded else "that can encode text"  # an empty one is made where the files are missing
    if lacks or tokenizer.eos_token_id is None:
        lacks = lacks or "with an end-of-sequence token"
        raise ConfigError(f"model.path={config.path}: expected a tokenizer {lacks}")
    vocabulary = config.architecture.vocab_size
    if highest >= vocabulary:
        raise ConfigError(
            f"model.path={config.path}: its tokenizer has the token {highest}; expected one of at most "
            f"{vocabulary} tokens, the rows of the embedding"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(config: ModelConfig, tokens: int) -> None:
    """Compares the longest prompt and completion with the positions that the model was made for.

    Raises:
        ConfigError: there are fewer; transformers would go on beyond them in silence.
    """
    positions = getattr(model_files.read_facts(config), "max_position_embeddings", None)
    if positions is not None and tokens > positions:
        raise ConfigError(
            f"dataset.max_prompt_tokens + dataset.max_completion_tokens = {tokens}: expected at most "
            f"{positions}, the positions of {config.path}"
        )


def load_model(config: ModelConfig, device: torch.device, weights: Path | None = None) -> PreTrainedModel:
    """Loads the model with weights of model.load_dtype, in evaluation mode (no dropout: rollout and learner
    must agree).

    Args:
        config: which model, and how to run it.
        device: where it goes.
        weights: a checkpoint to load instead of config.path.

    Raises:
        ConfigError: if the weights cannot be loaded or are not whole, or the last layer has a bias.
    """
    model_files.check_attention(config, device)
    subject = f"model.path={config.path}" if weights is None else str(weights)
    source = model_files.find_model(config) if weights is None else str(weights)
    revision = config.revision if weights is None else None
    with model_files.readable(subject):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            dtype=getattr(torch, config.load_dtype),
            attn_implementation=config.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            generation_config=model_files.make_generation_config(
                source, revision, config.architecture.vocab_size
            ),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        model, found = loaded
        for weight in model.parameters():  # a product's last bit depends on how a file's tensors are aligned
            weight.data = weight.data.clone()
        model_files.check_weights(model, found, source, revision, subject)
        DynamicCache(config=model.config)  # which a config of wrong layers would stop when sampling begins
    if last_layer(model).bias is not None:
        raise ConfigError(f"{subject}: its last layer has a bias; expected logits W h without one")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if config.pack:
        packing.prepare_model(model)
    for layer in decoder_layers(model) if config.compile else ():
        layer.compile(dynamic=True)  # one graph for all layers and lengths
    return model.to(device=device).eval()


def last_layer(model: PreTrainedModel) -> torch.nn.Linear:
    """Returns the layer W of logits = W h."""
    head = model.get_output_embeddings()
    assert isinstance(head, torch.nn.Linear)
    return head


def head_weight(model: PreTrainedModel) -> Tensor:
    """Returns W [V, H], the whole of it; every process has to ask. Not to be differentiated."""
    return full(last_layer(model).weight.detach())


@dataclass(frozen=True)
class ForwardSettings:
    """How the logits of every forward pass of a run are computed."""

    temperature: float  # Divides the logits, as it did when the tokens were sampled
    chunk_tokens: int  # Tokens of the last layer computed at once
    compute_dtype: torch.dtype  # float32, or bfloat16 for autocast
    share_prompts: bool = False  # Computes a prompt once for the rows of its group
    pack: bool = False  # Computes rows behind each other, without padding

    @classmethod
    def of(cls, config: TrainConfig, compute_dtype: torch.dtype) -> "ForwardSettings":
        """Reads the learner's settings from the configuration."""
        model = config.model
        how = compute_dtype, model.share_prompts, model.pack
        return cls(config.rollout.temperature, model.logits_chunk_tokens, *how)


def forward(
    model: PreTrainedModel, batch: Batch, settings: ForwardSettings, *, top_k: int, hidden_shift: int = 0
) -> PolicyOutput:
    """Computes log-probs, entropy and top-K of the sampled tokens.

    The last layer runs over at most `chunk_tokens` tokens at a time and its logits are made again in the
    backward pass, so that no tensor of B*T*V elements exists. Curvature inputs are float32 whatever the
    compute dtype.

    Args:
        model: a causal language model whose logits are W h.
        batch: rows of tokens.
        settings: temperature, chunks and dtype.
        top_k: K, the support of the curvature model; it always holds the sampled token.
        hidden_shift: how many tokens late the returned `hidden` is; 0, or 1 for the authors' program, which
            takes the state of the sampled token itself. Everything else stays where it belongs.
    """
    through_root = getattr(model, SCORE, partial(score_tokens, model))
    packed = through_root(batch, settings, top_k, hidden_shift)
    return PolicyOutput(*(unpack(values, batch.completion_mask) for values in packed))


def score_tokens(
    model: PreTrainedModel, batch: Batch, settings: ForwardSettings, top_k: int, hidden_shift: int
) -> tuple[Tensor, ...]:
    """Computes what `forward` unpacks: log_probs [N], entropy [N], topk_probs [N, K], topk_ids [N, K], hidden
    [N, H]. A sharded model has this as its root's forward pass."""
    mask = batch.completion_mask
    with autocast(mask.device, settings.compute_dtype, cache=not is_sharded(model)):
        if settings.share_prompts:
            states = _states_by_prompt(model, batch, extra=hidden_shift)
        else:
            states = _states(model, batch, extra=hidden_shift, pack=settings.pack)
        hidden = states[:, : mask.shape[1]][mask] / settings.temperature
        scored = score_hidden(last_layer(model), hidden, batch.token_ids[mask], top_k, settings.chunk_tokens)
    late = states[:, hidden_shift:][mask] / settings.temperature if hidden_shift else hidden
    return (*scored, late.detach().float())


@torch.no_grad()
def log_probs(model: PreTrainedModel, batch: Batch, settings: ForwardSettings) -> Tensor:
    """Computes [B, T] log-probs [nats] without a gradient, in one forward pass."""
    return forward(model, batch, settings, top_k=1).log_probs


def _states(model: PreTrainedModel, batch: Batch, *, extra: int, pack: bool) -> Tensor:
    """Computes [B, T + extra, H]: for each completion token, the state of the token BEFORE it, which produced
    its logits; with extra = 1 the last token's own state comes after them."""
    width = batch.input_ids.shape[1] - 1 + extra
    ids, mask = batch.input_ids[:, :width], batch.attention_mask[:, :width]
    states = _decode_packed(model, ids, mask.bool()) if pack else _decode(model, ids, mask)
    return states[:, -batch.completion_mask.shape[1] - extra :]


def _states_by_prompt(model: PreTrainedModel, batch: Batch, *, extra: int) -> Tensor:
    """Computes the same with one pass over each prompt and one over the completions, which attend to their
    prompt's keys and values; gradients flow through them."""
    end = batch.input_ids.shape[1] - 1 + extra
    width = batch.input_ids.shape[1] - batch.completion_mask.shape[1]
    groups, group_of_row = batch.group_ids.unique(return_inverse=True)
    rows = torch.arange(len(group_of_row), device=group_of_row.device)
    first = rows.new_full((len(groups),), len(rows)).scatter_reduce(0, group_of_row, rows, "amin")
    cache = DynamicCache(config=model.config)
    prompts = _decode(model, batch.input_ids[first, :width], batch.attention_mask[first, :width], cache)
    last = prompts[group_of_row, -1:]
    if end == width:
        return last
    cache.batch_select_indices(group_of_row)
    completions = _decode(model, batch.input_ids[:, width:end], batch.attention_mask[:, :end], cache)
    return torch.cat([last, completions], 1)


def _decode(model: PreTrainedModel, ids: Tensor, mask: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """Runs the layers below the last one over the columns of `ids`, the last ones that `mask` covers."""
    return model.base_model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def _decode_packed(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Does the same over the tokens alone; the states of padding are 0."""
    given = packing.boundaries(mask)
    return unpack(
        model.base_model(input_ids=ids[mask][None], use_cache=False, **given).last_hidden_state[0], mask
    )


def autocast(
    device: torch.device, dtype: torch.dtype, *, cache: bool = True
) -> AbstractContextManager[object]:
    """Sets the precision of every forward pass, the learner's and the sampler's alike. The cache holds all
    weights once more, which is what sharded ones are there to avoid."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cache)


def choose_device(name: str) -> torch.device:
    """Resolves `auto`.

    Raises:
        ConfigError: for a GPU that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device, gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ConfigError(f"device={name}: expected one of the {gpus} GPUs that torch sees here, or cpu")
    return device


def device_name(device: torch.device) -> str:
    """Returns `cpu`, or the GPU with its kind."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def choose_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """Returns what forward passes compute in."""
    if config.compute_dtype != "auto":
        return getattr(torch, config.compute_dtype)
    half = device.type == "cuda" or config.load_dtype == "bfloat16" or _gains_on_cpu(config)
    return torch.bfloat16 if half else torch.float32


def _gains_on_cpu(config: ModelConfig) -> bool:
    """Returns whether this CPU multiplies bfloat16 in hardware (AMX or AVX-512), and the model is wide enough
    to gain by it; the shipped ones are not, so their numbers are the same on every CPU."""
    able, wide = getattr(torch.cpu, "get_capabilities", dict)(), (config.hidden_size or 0) >= 512
    return wide and any(able.get(f"{unit}_bf16", False) for unit in ("amx", "avx512"))
