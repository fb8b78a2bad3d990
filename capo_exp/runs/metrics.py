"""Every key that a run logs, with its meaning; docs/METRICS.md is printed from here. Imports no torch.

Units: nats for policy shifts and Kullback-Leibler divergences, reward units for objective shifts and losses,
seconds for times. "Tokens" are completion tokens; padding never counts. A value that was not finite is null.
"""

from collections.abc import Iterable

GROUPS: dict[str, str] = {
    "counter": "How far the run is, summed from its first step.",
    "reward": "What the verifier said about this step's completions, and how often it could not say.",
    "eval": "Scores on held-out problems; they stand in eval.jsonl.",
    "test": "Scores on benchmarks; `python -m capo_exp.evaluate` writes them to evaluations/test.jsonl.",
    "advantage": "Credit after the baseline.",
    "loss": "What was differentiated.",
    "policy": "The model that is trained.",
    "mismatch": "Sampler against learner, at the weights that sampled; corrected/: the correction's weights.",
    "rollout": "Sampling.",
    "data": "The training problems.",
    "curvature": "Shifts that the last-layer model predicts, in the same way for every algorithm.",
    "selection": "Which tokens the update leaves out; one key per reason, a token can have several.",
    "calibration": "Shifts that a step really caused, on a sample of tokens, against those predicted.",
    "diagnosis": "Rejected tokens against kept ones, and the step against the one with every token whole.",
    "optim": "The optimiser's update.",
    "step": "What a step rule measured.",
    "time": "Seconds, the only keys that differ between two runs of one seed; and the padding.",
}
"""First part of a key -> what the group is about, in the order of docs/METRICS.md."""

METRICS: dict[str, str] = {
    "counter/rollout_step": "Rollout rounds done; 0 = before training.",
    "counter/optimizer_step": "Optimiser updates done.",
    "counter/prompts": "Prompts drawn for training, those of filtered groups too.",
    "counter/completions": "Completions sampled for training; the x axis of figures.",
    "counter/generated_tokens": "Tokens sampled for training.",
    "counter/unrewarded_steps": "Rollout steps in a row, up to this one, without any reward.",
    "counter/reference_resets": "How often the reference has become the policy.",
    "reward/accuracy": "Share of completions whose answer is right; correctness alone; none of pairs.",
    "reward/format": "Mean format term before its weight, where reward.format is on.",
    "reward/length": "Mean length term before its weight, where reward.length is on.",
    "reward/mean": "Mean reward of the completions that train: correctness, terms and shaping.",
    "reward/state_value": "Mean value of the states of a step's completions; with algo.continuations.",
    "reward/no_answer_fraction": "Share of completions without an answer that could be read.",
    "reward/gold_unparsable": "Gold answers the verifier could not read.",
    "reward/timeouts": "Verifications killed at the time limit; they count as wrong.",
    "reward/crashes": "Verifier workers that died; their completions count as wrong.",
    "reward/exceptions": "Completions for which your reward function raised an exception (reward=function).",
    "reward/not_a_number": "Completions for which your reward function returned NaN, or no number.",
    "eval/accuracy": "Share of right completions on the evaluation problems, mean over samples.",
    "eval/truncated_fraction": "Share of evaluation completions cut at the length limit.",
    "eval/no_answer_fraction": "Share of evaluation completions without a readable answer.",
    "eval/completion_length/mean": "Mean tokens of an evaluation completion.",
    "eval/problems": "Problems evaluated.",
    "test/accuracy": "Unweighted mean over benchmarks of avg@n, the paper's TEST accuracy.",
    "advantage/std": "Standard deviation of the advantages over completions, after the correction.",
    "advantage/zero_group_fraction": "Share of prompts whose completions all got the same reward: no signal.",
    "loss/total": "The scalar that was differentiated.",
    "loss/kl": "Mean kl_k3 to the reference, whatever estimator the loss uses; 0 without a reference.",
    "loss/clip_fraction": "Share of tokens whose gradient the trust region cut.",
    "policy/entropy": "Mean entropy of the next-token distribution at the training temperature.",
    "policy/grad_norm": "Norm of the gradient before clipping.",
    "policy/ratio_max": "Largest exp(log_probs - old_log_probs) of a token, before any clipping.",
    "policy/sampler_kl_k3": "The same as mismatch/kl_k3; a key that scripts from outside rely on.",
    "mismatch/kl_k1": "Mean -ln ratio, k1 of KL(sampler, learner); ratio = learner over sampler.",
    "mismatch/kl_k3": "Mean ratio - 1 - ln ratio, k3 of the same; never negative.",
    "mismatch/ratio_max": "Largest ratio of a token, before any correction.",
    "mismatch/beyond_2x_fraction": "Share of tokens whose ratio is above 2 or below 1/2.",
    "mismatch/corrected/kl_k1": "Mean -ln weight of tokens with weight above 0; uncorrected as the raw one.",
    "mismatch/corrected/kl_k3": "Mean weight - 1 - ln weight of the same; uncorrected as the raw one.",
    "mismatch/corrected/ratio_max": "Largest weight of a token; uncorrected as the raw one.",
    "mismatch/corrected/beyond_2x_fraction": "Share of the same above 2 or below 1/2; else raw.",
    "mismatch/dropped_fraction": "Share of tokens whose weight is 0.",
    "mismatch/probe_difference": "Mean absolute difference of a probe's log-probs after the last transfer.",
    "rollout/completion_length/mean": "Mean tokens of a completion.",
    "rollout/truncated_fraction": "Share of completions cut at the length limit.",
    "rollout/sampling_rounds": "Rounds of sampling until enough groups passed the group filter.",
    "rollout/filtered_group_fraction": "Share of sampled groups that the group filter left out.",
    "rollout/states": "States of which a value was estimated; with algo.continuations.",
    "rollout/unfinished_completions": "Completions that go on in the next step; with algo.rollout_tokens.",
    "rollout/unfinished_age": "Mean number of steps that have sampled them; 0 without any.",
    "rollout/resumed_tokens": "Tokens of the completions that train which earlier steps had sampled.",
    "rollout/restarted_groups": "Groups begun anew because they were older than algo.max_age.",
    "data/dropped_prompts": "Training prompts left out because they are longer than max_prompt_tokens.",
    "curvature/token/policy_shift/mean": "m_F, k2 of a token's own predicted update (not its KL): mean.",
    "curvature/token/policy_shift/p99": "m_F, 99th percentile over tokens.",
    "curvature/token/policy_shift/max": "m_F, largest token.",
    "curvature/token/objective_shift/mean": "m_H, predicted objective change by a token's own update: mean.",
    "curvature/token/objective_shift/p99": "m_H, 99th percentile over tokens.",
    "curvature/token/objective_shift/min": "m_H, most negative token.",
    "curvature/token/objective_shift/max": "m_H, largest token.",
    "curvature/batch/policy_shift": "Predicted policy shift (k2) of the whole update, kept tokens only.",
    "curvature/batch/objective_shift": "Predicted mean A (ratio - 1) by the whole update, kept tokens only.",
    "curvature/batch/objective_shift_by_row": "The authors' number: each vocabulary row weighs the same.",
    "selection/rejection_rate": "Share of tokens rejected for any reason.",
    "selection/weight": "Mean of what tokens count: 0 if rejected, less than 1 if weighed down.",
    "selection/rejection_rate_policy": "Share of tokens rejected because of policy_shift.",
    "selection/rejection_rate_objective": "Share of tokens rejected because of objective_shift.",
    "selection/filtered_completion_fraction": "Share of completions that the learner did not see.",
    "calibration/tokens": "Tokens of the sample.",
    "calibration/policy_shift/measured": "Mean KL of a token, from the policy before the step to that after.",
    "calibration/policy_shift/last_layer": "The same if only the last layer had moved.",
    "calibration/policy_shift/spearman": "Rank correlation of m_F with the measured KL.",
    "calibration/policy_shift/last_layer_spearman": "Rank correlation of m_F with the last layer's KL.",
    "calibration/objective_shift/measured": "Mean change of a token's surrogate, A (ratio - 1).",
    "calibration/objective_shift/last_layer": "The same if only the last layer had moved.",
    "calibration/objective_shift/spearman": "Rank correlation of m_H with the measured change.",
    "calibration/objective_shift/last_layer_spearman": "Rank correlation of m_H with the last layer's.",
    "calibration/last_layer/spearman": "Rank correlation of the last layer's KL with the measured KL.",
    "calibration/entropy/spearman": "Control: rank correlation of a token's entropy with the measured KL.",
    "calibration/ratio": "Measured mean KL over curvature/batch/policy_shift.",
    "diagnosis/kept/probability": "Mean probability of a kept token before the step.",
    "diagnosis/kept/positive": "Share of kept tokens with advantage above 0.",
    "diagnosis/kept/negative": "Share of kept tokens with advantage below 0.",
    "diagnosis/kept/position": "Mean place of a kept token in its completion, 0 first, 1 last.",
    "diagnosis/kept/frequency": "Mean share of the step's tokens that have a kept token's id.",
    "diagnosis/kept/agreement": "Share of kept tokens with m_H above 0, of those with an advantage.",
    "diagnosis/kept/momentum": "m_F of the moments alone over m_F, sums over kept tokens.",
    "diagnosis/kept/signal_share": "Part of kept tokens in the sum of abs(A) (1 - probability).",
    "diagnosis/gradient/cosine": "Cosine of the gradient with the unmasked one, that of every token kept.",
    "diagnosis/gradient/norm_ratio": "Norm of the gradient over that of the unmasked one, before clipping.",
    "diagnosis/update/cosine": "Cosine of the proposed step with the unmasked one, made of that gradient.",
    "diagnosis/update/norm_ratio": "Length of the proposed step over that of the unmasked one.",
    "diagnosis/log_prob_change/kept_positive": "Mean change of a kept token's log-prob, advantage above 0.",
    "diagnosis/log_prob_change/kept_negative": "Mean change of a kept token's log-prob, advantage below 0.",
    "diagnosis/log_prob_change/rejected_positive": "The same of rejected tokens with advantage above 0.",
    "diagnosis/log_prob_change/rejected_negative": "The same of rejected tokens with advantage below 0.",
    "diagnosis/policy_shift": "Mean KL of a token, policy before the step to after, on a sample.",
    "diagnosis/policy_shift_unmasked": "The same by the unmasked step.",
    "diagnosis/gain": "Mean change of a token's surrogate, A (ratio - 1).",
    "diagnosis/gain_unmasked": "The same by the unmasked step.",
    "optim/learning_rate": "Learning rate of the update.",
    "step/policy_shift_measured": "Mean KL of the step taken, where a step rule measured it or a longer one.",
    "step/policy_shift_predicted": "Mean KL of the step taken, as the step rule predicted it.",
    "step/policy_shift_bound": "What the step rule let the step's mean KL be, where it sets that itself.",
    "step/ratio": "What the step rule multiplies its prediction by.",
    "optim/step_scale": "Share of the proposed step that the step rule took; 1 = all.",
    "time/rollout_seconds": "Sampling.",
    "time/transfer_seconds": "New weights to the engine, and their proof; of evaluations since, too.",
    "time/reward_seconds": "Verification.",
    "time/credit_seconds": "Shaping and advantages, with the log-probs that KL in the reward needs.",
    "time/scoring_seconds": "Forward passes before the first gradient, where the selection needs the step.",
    "time/calibration_seconds": "Measuring the real shifts.",
    "time/diagnosis_seconds": "Comparing rejected tokens with kept ones, and the step with the unmasked one.",
    "time/policy_seconds": "Forward and backward passes.",
    "time/curvature_seconds": "Predicted shifts and the optimiser model.",
    "time/update_seconds": "Gradient clipping and the optimiser's update.",
    "time/padding_fraction": "Share of the positions of forward and backward passes that hold no token.",
    "time/tokens_per_second": "Sampled tokens per second of the whole step.",
    "time/total_seconds": "The whole rollout step; in eval.jsonl the whole evaluation.",
}

METRICS |= {
    key.replace("/kept/", "/rejected/"): "The same of the rejected tokens."
    for key in METRICS
    if key.startswith("diagnosis/kept/")
} | {
    key.replace("change/", "change_unmasked/"): "The same by the unmasked step."
    for key in METRICS
    if key.startswith("diagnosis/log_prob_change/")
}

FAMILIES: dict[str, str] = {
    "selection/rejection_rate_": "Share of tokens rejected for the reason that ends the key.",
    "test/accuracy/": "avg@n of one benchmark, such as test/accuracy/math500.",
}
"""Prefix -> meaning, for keys whose last part is a name from the data or the algorithm."""

STEP = "counter/rollout_step"
COMPLETIONS = "counter/completions"
GENERATED_TOKENS = "counter/generated_tokens"
UNREWARDED_STEPS = "counter/unrewarded_steps"
TRAIN_REWARD = "reward/mean"
TRAIN_ACCURACY = "reward/accuracy"
EVAL_ACCURACY = "eval/accuracy"
POLICY_SHIFT = "curvature/token/policy_shift/"
OBJECTIVE_SHIFT = "curvature/token/objective_shift/"
REJECTION_RATE = "selection/rejection_rate"
TOKENS_PER_SECOND = "time/tokens_per_second"
ENTROPY = "policy/entropy"
COMPLETION_LENGTH = "rollout/completion_length/mean"
STEP_SCALE = "optim/step_scale"


def meaning(key: str) -> str | None:
    """Returns one line about a key, or None if nobody has documented it."""
    families = (text for prefix, text in FAMILIES.items() if key.startswith(prefix) and key != prefix)
    return METRICS.get(key) or next(families, None)


def check_known(metrics: Iterable[str]) -> None:
    """Asserts that every key is in the tables above; another is a bug of the code that made it."""
    unknown = sorted(key for key in metrics if meaning(key) is None)
    assert not unknown, f"undocumented metrics {unknown}: add them to capo_exp/runs/metrics.py"
