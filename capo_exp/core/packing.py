"""Rows without padding: one after the other in a single row, each of which sees itself alone.

transformers makes a mask of all tokens x all tokens for such a row with attn_implementation=sdpa, which costs
more than the padding did. Attention here goes row by row, causal and without a mask; the flash kernels take
the same boundaries by themselves.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from capo_exp.config.errors import error
from capo_exp.config.memory import KINDS

SDPA = "capo_exp_packed_sdpa"
"""What sdpa is called where packed rows pass through it, too."""


def prepare_model(model: PreTrainedModel) -> PreTrainedModel:
    """Lets a model take packed rows beside padded ones, in place.

    Raises:
        ConfigError: it is of a kind whose layers may mix neighbours.
    """
    facts = model.config
    if facts.model_type not in KINDS or getattr(facts, "sliding_window", None) is not None:
        wanted = f"false for this {facts.model_type} model; {', '.join(KINDS)} without a sliding window can"
        raise error("model.pack", True, wanted)
    if facts._attn_implementation == "sdpa":
        AttentionInterface.register(SDPA, _attend)
        AttentionMaskInterface.register(SDPA, _mask)
        model.set_attn_implementation(SDPA)
    return model


def boundaries(mask: Tensor) -> dict[str, Any]:
    """Returns what a decoder is told of the rows that are True tokens of mask [B, S] behind each other: the
    tokens' places in their rows, and where rows begin, by transformers' names."""
    lengths = mask.sum(1)
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {
        "position_ids": (mask.cumsum(1) - 1)[mask][None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """Attends within each row of a packed one, [1, heads, N, width]; any other as transformers does."""
    starts = given.pop("cu_seq_lens_q", None)
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, mask, **given)
    lengths = starts.diff().tolist()
    rows = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    return torch.cat([sdpa_attention_forward(module, q, k, v, None, **given)[0] for q, k, v in rows], 1), None


def _mask(*sizes: Any, attention_mask: Tensor | None = None, **given: Any) -> Tensor | None:
    """Makes none for a packed row, which comes without one."""
    return None if attention_mask is None else sdpa_mask(*sizes, attention_mask=attention_mask, **given)
