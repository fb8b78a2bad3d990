"""Loss and gradient of the methods that TRL has, too, against TRL's function (`pip install -e .[bench]`)."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from capo_exp.algorithms.opsm import mask_negative
from capo_exp.algorithms.protocols import build_algorithm
from capo_exp.algorithms.surrogates import to_sampler
from tests.pieces import gradients, inputs_of, run_updates, with_step
from tests.test_methods import loss_and_gradient, off_policy

pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.slow  # importing it is
GMPO = {"epsilon_low": 0.4, "epsilon_high": 0.4}
CASES = {
    "grpo": ("grpo", "token", 0.3, {"epsilon_low": 0.2, "epsilon_high": 0.2}),
    "dr_grpo": ("dr_grpo", "token", 0.3, {"epsilon_low": 0.2, "epsilon_high": 0.2}),
    "dapo": ("dapo", "token", 0.3, {"epsilon_low": 0.2, "epsilon_high": 0.28}),
    "cispo": ("cispo", "token", 1.5, {"epsilon_high": 5.0}),
    "gspo": ("grpo", "sequence", 1e-3, {"epsilon_low": 3e-4, "epsilon_high": 4e-4}),
    "luspo": ("luspo", "sequence", 5e-3, {"epsilon_low": 2e-3, "epsilon_high": 2.5e-3}),
    "sapo": ("sapo", "token", 0.5, {}),
    "vespo": ("vespo", "token", 0.3, {}),
    "gmpo": ("gmpo", "token", 0.6, GMPO),
}
"""Ours -> TRL's loss_type, its level, a spread of log-ratios at which bounds act, its numbers."""


def trl_loss(batch, name):
    """What TRL's _compute_loss makes of log-probs [B, T], on a trainer that holds nothing but its numbers."""
    from trl.experimental.gmpo import GMPOTrainer
    from trl.trainer.grpo_trainer import GRPOTrainer

    loss_type, level, spread, numbers = CASES[name]
    log_probs, old, advantages = off_policy(batch, spread)
    mask = batch.completion_mask.long()
    settings = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, steps_per_generation=1, sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05, vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0,
        vespo_lambda_neg=2.0,
    )  # fmt: skip
    trainer = SimpleNamespace(
        args=settings, loss_type=loss_type, importance_sampling_level=level, beta=0.0, use_vllm=False,
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False, current_gradient_accumulation_steps=1, max_completion_length=96,
        vllm_importance_sampling_correction=False, model=SimpleNamespace(training=True),
        accelerator=Alone(), _metrics={"train": Ignored()}, get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros_like(log_probs), None),
        **({"epsilon_low": 0.0, "epsilon_high": 0.0} | numbers),
    )  # fmt: skip
    inputs = {
        "prompt_ids": mask, "prompt_mask": mask, "completion_ids": mask, "completion_mask": mask,
        "advantages": advantages[:, 0], "old_per_token_logps": old, "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    kind = GMPOTrainer if loss_type == "gmpo" else GRPOTrainer
    loss = kind._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


class Alone:
    """An accelerator of one process."""

    num_processes, device = 1, torch.device("cpu")

    def gather(self, values):
        return values

    gather_for_metrics = gather

    def reduce(self, values, reduction):
        return values


class Ignored(dict[str, list[float]]):
    def __missing__(self, key):
        return []


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(name, composed, random_batch):
    batch = random_batch(rows=16)
    algorithm = build_algorithm(composed(f"algo={name}", "dataset.max_completion_tokens=96").algo)
    loss, gradient, _ = loss_and_gradient(algorithm, batch, CASES[name][2])
    expected = trl_loss(batch, name)
    torch.testing.assert_close((loss, gradient), expected, rtol=1e-6, atol=1e-8)


def test_the_off_policy_mask_is_trls(random_batch):
    from trl.trainer.grpo_trainer import GRPOTrainer

    batch = random_batch(rows=32)
    log_probs, old, advantages = off_policy(batch, 0.5)
    mask = batch.completion_mask
    step = with_step(inputs_of(log_probs, old, advantages, mask), batch.group_ids).step
    assert step is not None
    got = mask_negative(step, log_ratio=to_sampler, divergence_max=0.1).keep_mask
    expected = GRPOTrainer.get_off_policy_mask(advantages[:, :1], log_probs, old, mask.long(), 0.1)
    assert torch.equal(got, mask & expected.bool()) and 0 < expected.sum() < 32


def test_dpo_is_trls(learner, random_batch):
    """Loss, and gradient of the weights; TRL's batch has the better ones first, and then the worse ones."""
    from trl.trainer.dpo_trainer import DPOTrainer, add_fused_lm_head

    batch = random_batch()
    better = torch.arange(8) % 2 == 0
    batch = replace(batch, advantages=better[:, None] * batch.completion_mask.float())
    ours, again = (learner("algo=dpo", "model.micro_batch_size=3", distance=0.05) for _ in range(2))
    for model in (ours.model, ours.reference):  # as its trainer does
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    trainer = SimpleNamespace(
        model=ours.model, ref_model=ours.reference, accelerator=Alone(), _metrics={"train": Ignored()},
        args=SimpleNamespace(gradient_checkpointing_kwargs=None), beta=0.1, label_smoothing=0.0,
        ld_alpha=None, precompute_ref_logps=False, f_divergence_type="reverse_kl", loss_types=["sigmoid"],
        loss_weights=[1.0], use_weighting=False, aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    order = torch.cat([better.nonzero(), (~better).nonzero()]).squeeze(1)
    prompts = batch.attention_mask.shape[1] - batch.completion_mask.shape[1]
    inputs = {
        "input_ids": batch.input_ids[order], "attention_mask": batch.attention_mask[order],
        "completion_mask": torch.nn.functional.pad(batch.completion_mask.long(), (prompts, 0))[order],
    }  # fmt: skip
    ours.model.train()
    loss = DPOTrainer._compute_loss(trainer, ours.model, inputs, False)
    expected = torch.autograd.grad(loss, list(ours.model.parameters()))
    assert run_updates(again, batch)[0][0]["loss/total"] == pytest.approx(loss.item(), abs=1e-6)
    torch.testing.assert_close(gradients(ours, batch), list(expected), rtol=1e-5, atol=1e-6)
