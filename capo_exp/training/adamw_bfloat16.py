"""AdamW for bfloat16 weights. A step of reinforcement learning is far below what a bfloat16 weight can show,
so the optimiser keeps what is left of each: 16 bits, with which the weight is a float32 to the bit."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw


def join_bits(weight: Tensor, rest: Tensor) -> Tensor:
    """Returns float32 weights, of which `weight` is the nearest bfloat16 and `rest` (int16) what is left."""
    return ((weight.view(torch.int16).int() << 16) + rest.int()).view(torch.float32)


def split_bits(whole: Tensor) -> tuple[Tensor, Tensor]:
    """Splits float32 weights into the nearest bfloat16 and the int16 that is left; the inverse of
    `join_bits`."""
    bits = whole.view(torch.int32)
    rest = bits.to(torch.int16)  # the lower half, with a sign
    return ((bits - rest.int()) >> 16).to(torch.int16).view(torch.bfloat16), rest


class AdamWBfloat16(torch.optim.AdamW):
    """Owns the rest of each weight and its two float32 moments: 10 bytes beside the 2 of the weight."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Moves the float32 weights as torch's AdamW does, one tensor at a time."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._step_one(weight, group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Goes on from a state; torch would round the moments to the weights' dtype."""
        super().load_state_dict(deepcopy({**state_dict, "state": {}}))
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, kept in state_dict["state"].items():
            device = weights[index].device
            self.state[weights[index]] = {
                name: value.to("cpu" if name == "step" else device) for name, value in kept.items()
            }

    def reset(self) -> None:
        """Lets the moments start again; the rest of each weight is no moment, and stays."""
        for state in self.state.values():
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].zero_()

    def _step_one(self, weight: Tensor, group: Mapping[str, Any]) -> None:
        state = self.state[weight]
        if not state:
            zero = torch.zeros_like(weight, dtype=torch.float32)
            state |= {"step": torch.zeros(()), "exp_avg": zero, "exp_avg_sq": zero.clone()}
            state["rest"] = torch.zeros_like(weight, dtype=torch.int16)
        whole = join_bits(weight, state["rest"])
        gradient = weight.grad
        assert gradient is not None
        adamw(
            [whole], [gradient.float()], [state["exp_avg"]], [state["exp_avg_sq"]], [], [state["step"]],
            foreach=False, amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
        nearest, rest = split_bits(whole)
        weight.copy_(nearest)
        state["rest"].copy_(rest)
