"""The last-layer model against autograd, torch.optim and the authors' program."""

import inspect
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import capo_exp.curvature
from capo_exp.core.types import AdamState, BatchShifts
from capo_exp.curvature.model import (
    apply_row_gradients,
    batch_shifts,
    copy_moments,
    init_adam_state,
    mean_row_gradients,
    pack,
    token_shifts,
    update_adam_state,
)

LR = 3e-3


def random_tokens(rows, length, vocab, support, width, seed=0):
    """hidden, topk_probs, topk_ids, token_ids, advantages, float64; some tokens outside their support."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, length, width, generator=generator, dtype=torch.float64)
    logits = torch.randn(rows, length, vocab, generator=generator, dtype=torch.float64)
    probs, ids = logits.softmax(-1).topk(support)
    token_ids = torch.randint(0, vocab, (rows, length), generator=generator)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    return hidden, probs / probs.sum(-1, keepdim=True), ids, token_ids, advantages


def recorded(reference, model, step):
    """What the authors' program has of a step, its tokens and their mask."""
    row = {key.split(".")[2]: value for key, value in reference.items() if key.startswith(f"{model}.{step}.")}
    names = ("hidden", "topk_probs", "topk_ids", "actions", "advantages")
    return row, tuple(row[name] for name in names), row["mask"].bool()


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("model", ["adam", "sgd"])
def test_parity_with_the_authors_program(reference, model):
    state = init_adam_state(300, 16, dtype=torch.float64) if model == "adam" else None
    for step in range(3):
        row, tokens, mask = recorded(reference, model, step)
        shifts = token_shifts(*tokens, LR, state)
        close(shifts.policy_shift[mask], row["policy_shift_token"][mask])
        close(shifts.objective_shift[mask], row["objective_shift_token"][mask])
        keep = mask & (shifts.policy_shift < 1e-3) & (shifts.objective_shift.abs() < 3e-2)
        assert torch.equal(keep, row["keep_mask"].bool())

        packed = pack(*tokens, mask)
        batch = batch_shifts(packed, mean_row_gradients(packed), learning_rate=LR, state=state)
        assert batch.policy_shift == pytest.approx(
            row["policy_shift_global"].item(), rel=1e-6
        )  # stored as float32
        assert batch.objective_shift_by_row == pytest.approx(row["objective_shift_global"].item(), rel=1e-6)
        for b in range(4):  # one completion alone is the authors' sentence level
            alone = (*(x[b : b + 1] for x in tokens), mask[b : b + 1])
            own = pack(*alone)
            one = batch_shifts(own, mean_row_gradients(own), learning_rate=LR, state=state)
            assert one.policy_shift == pytest.approx(row["policy_shift_sentence"][b].item(), rel=1e-10)
            assert one.objective_shift_by_row == pytest.approx(
                row["objective_shift_sentence"][b].item(), rel=1e-10
            )

        if state is not None:
            state = update_adam_state(state, *tokens, keep)
            slots = state.slot_of_id[row["moment_ids"]]
            seen = slots > 0
            close(state.first[slots], row["moment_m"])
            close(state.second[slots], row["moment_v"])
            assert len(state.first) - 1 == int(seen.sum())


def fixed_direction(direction):
    """Moments so old and settled that Adam's direction is `direction`, whatever gradient comes next."""
    vocab, width = direction.shape
    zero = torch.zeros(1, width, dtype=torch.float64)
    second = torch.cat([zero, torch.ones_like(direction)])
    return AdamState(
        torch.arange(1, vocab + 1), torch.cat([zero, direction]), second, 10**16, (1 - 1e-14, 1 - 1e-14), 0.0
    )


def test_expectations_over_actions_are_the_exact_derivatives():
    """5 actions, 3 features, W + t D: enumerate the actions, weight their shifts with pi, compare with
    autograd.

    J(t) = sum_a pi_t(a) A_a.  sum_a pi(a) m_H(a) = lr J'(0) + 1/2 lr^2 J''(0), so the odd and even parts in
    lr are the two derivatives; sum_a pi(a) m_F(a) = 1/2 lr^2 d^2/dt^2 KL(pi_0 || pi_t) at 0, the Fisher form
    D^T F D.
    """
    torch.manual_seed(1)
    weight, direction = torch.randn(2, 5, 3, dtype=torch.float64)
    hidden, values = torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    probs = (weight @ hidden).softmax(0)

    def objective(t):
        return (((weight + t * direction) @ hidden).softmax(0) * values).sum()

    def divergence(t):
        return (probs * (probs.log() - ((weight + t * direction) @ hidden).log_softmax(0))).sum()

    def weighted(lr):
        every = (
            hidden.expand(5, 1, 3),
            probs.expand(5, 1, 5),
            torch.arange(5).expand(5, 1, 5),
            torch.arange(5)[:, None],
        )
        shifts = token_shifts(*every, values, lr, fixed_direction(direction))
        return probs @ shifts.policy_shift[:, 0], probs @ shifts.objective_shift[:, 0]

    zero, lr = torch.zeros((), dtype=torch.float64), 1.0
    (policy, up), (_, down) = weighted(lr), weighted(-lr)
    close((up - down) / 2, torch.autograd.functional.jacobian(objective, zero))
    close(up + down, torch.autograd.functional.hessian(objective, zero))
    close(2 * policy, torch.autograd.functional.hessian(divergence, zero))
    small = torch.tensor(1e-4, dtype=torch.float64)  # and the finite step itself, to third order
    policy, objective_change = weighted(1e-4)
    torch.testing.assert_close(policy, divergence(small), rtol=1e-3, atol=0)
    torch.testing.assert_close(objective_change, objective(small) - objective(zero), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("action", [0, 4])
def test_sgd_shifts_are_what_a_real_sgd_step_does(action):
    """m_H and m_F of a token against autograd through W + lr * grad(A log pi(a)) for decreasing lr."""
    torch.manual_seed(2)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(1, 1, 3, dtype=torch.float64)
    advantage = torch.tensor([-1.3], dtype=torch.float64)
    logits = hidden[0, 0] @ weight.T
    probs, ids = logits.detach().softmax(0).sort(descending=True)
    (gradient,) = torch.autograd.grad(advantage * logits.log_softmax(0)[action], weight)
    errors = []
    for lr in (1e-3, 1e-4):
        shifts = token_shifts(
            hidden, probs[None, None], ids[None, None], torch.tensor([[action]]), advantage, lr, None
        )
        moved = (hidden[0, 0] @ (weight + lr * gradient).T).log_softmax(0)
        ratio = (moved[action] - logits.log_softmax(0)[action]).exp()
        real = advantage * (ratio - 1)  # change of the surrogate A * pi_new / pi_old on the sampled token
        errors.append((shifts.objective_shift[0, 0] - real).abs().item())
        log_ratio = (moved[action] - logits.log_softmax(0)[action]).item()
        assert shifts.policy_shift.item() == pytest.approx(0.5 * log_ratio**2, rel=20 * lr)
    # What is left is third order: ten times smaller steps leave a thousand times smaller an error.
    assert errors[1] < errors[0] / 500


def test_adam_direction_is_the_next_step_of_torch_adam():
    """Two updates of a token each, then the predicted change of the logits is torch.optim.Adam's third."""
    vocab, width = 6, 4
    torch.manual_seed(3)
    weight = torch.nn.Parameter(torch.zeros(vocab, width, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=LR, maximize=True)
    state = init_adam_state(vocab, width, dtype=torch.float64)
    for step in range(3):
        tokens = random_tokens(1, 1, vocab, vocab, width, seed=step)
        hidden, probs, ids, token_ids, advantages = tokens
        order = ids[0, 0].argsort()
        pi = probs[0, 0, order]
        error = torch.nn.functional.one_hot(token_ids[0, 0], vocab) - pi
        weight.grad = advantages * torch.outer(error, hidden[0, 0])
        before = weight.detach().clone()
        optimizer.step()
        change = (weight.detach() - before) @ hidden[0, 0] / LR
        if step > 0:
            s = (error * change).sum()
            variance = (pi * change.square()).sum() - (pi * change).sum() ** 2
            shifts = token_shifts(*tokens, LR, state)
            close(shifts.policy_shift[0, 0], 0.5 * (LR * s) ** 2)
            close(shifts.objective_shift[0, 0], advantages[0] * (LR * s + 0.5 * LR**2 * (s**2 - variance)))
        state = update_adam_state(state, *tokens, torch.ones(1, 1, dtype=torch.bool))


def test_an_empty_state_predicts_the_raw_gradient_step_and_momentum_moves_without_credit():
    tokens, keep = random_tokens(2, 3, 20, 8, 5), torch.ones(2, 3, dtype=torch.bool)
    empty = init_adam_state(20, 5, dtype=torch.float64)
    sgd, adam = token_shifts(*tokens, LR, None), token_shifts(*tokens, LR, empty)
    assert torch.equal(sgd.policy_shift, adam.policy_shift)
    assert torch.equal(sgd.objective_shift, adam.objective_shift)
    *features, advantages = tokens
    idle = token_shifts(*features, 0 * advantages, LR, update_adam_state(empty, *tokens, keep))
    assert (idle.policy_shift > 0).all() and (idle.objective_shift == 0).all()


def on_policy(vocab, support, sharpness, seed):
    """A last layer [V, H], tokens of its softmax and support, a mask of completions of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    weight = sharpness * torch.randn(vocab, 4, generator=generator, dtype=torch.float64)
    hidden = torch.randn(5, 6, 4, generator=generator, dtype=torch.float64)
    logits = hidden @ weight.T
    token_ids = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator).view(5, 6)
    ids = logits.topk(support).indices
    ids[..., -1] = torch.where((ids == token_ids[..., None]).any(-1), ids[..., -1], token_ids)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([[6], [1], [3], [0], [5]])
    return weight, (hidden, logits.gather(-1, ids).softmax(-1), ids, token_ids, advantages), mask


def surrogate(weight, tokens, mask):
    """Mean over the tokens of A (ratio - 1) as a function of the last layer, by the full softmax."""
    hidden, _, _, token_ids, advantages = tokens

    def log_probs(layer):
        return (hidden @ layer.T).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]

    return lambda layer: (advantages[:, None] * (log_probs(layer) - log_probs(weight)).expm1())[mask].mean()


@pytest.mark.parametrize("model", ["adam", "sgd"])
def test_the_batch_prediction_is_the_exact_change_to_second_order(model):
    """K = V: torch.optim's own step of the mean surrogate, and autograd's two derivatives along it. The
    authors' number has the same first order there, and completions in place of tokens in the second."""
    weight, tokens, mask = on_policy(7, 7, 1.0, seed=0)
    layer, state = torch.nn.Parameter(weight.clone()), None
    optimizer = (torch.optim.Adam if model == "adam" else torch.optim.SGD)([layer], lr=LR, maximize=True)
    if model == "adam":
        _, others, every = on_policy(7, 7, 1.0, seed=1)
        state = update_adam_state(init_adam_state(7, 4, dtype=torch.float64), *others, every)
        first = pack(*others, every)
        layer.grad = mean_row_gradients(first).means
        optimizer.step()
    objective = surrogate(weight, tokens, mask)
    before = layer.detach().clone()
    layer.grad = torch.autograd.functional.jacobian(objective, weight)
    optimizer.step()
    change = layer.detach() - before
    along, zero = lambda t: objective(weight + t * change), torch.zeros((), dtype=torch.float64)
    expected = (
        torch.autograd.functional.jacobian(along, zero) + torch.autograd.functional.hessian(along, zero) / 2
    )
    packed = pack(*tokens, mask)
    got = batch_shifts(packed, mean_row_gradients(packed), learning_rate=LR, state=state)
    assert got.objective_shift == pytest.approx(expected.item(), rel=1e-9)
    assert got.objective_shift_by_row == pytest.approx(expected.item(), rel=1e-2)


def test_with_half_the_vocabulary_the_prediction_stays_and_the_authors_number_does_not():
    weight, tokens, mask = on_policy(40, 12, 2.0, seed=0)
    packed = pack(*tokens, mask)
    gradients = mean_row_gradients(packed)
    got = batch_shifts(packed, gradients, learning_rate=1e-4, state=None)
    moved = weight.clone()
    moved[gradients.ids] += 1e-4 * gradients.means
    exact = surrogate(weight, tokens, mask)(moved).item()
    assert got.objective_shift == pytest.approx(exact, rel=0.1)
    assert got.objective_shift_by_row > 2 * exact


def test_a_completion_without_a_kept_token_still_counts_in_the_mean():
    """The authors divide by all completions: two of four rejected whole halve the others' shifts."""
    tokens = random_tokens(4, 6, 30, 8, 5)
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[2:] = False
    some, alone = pack(*tokens, keep), pack(*(x[:2] for x in tokens), keep[:2])
    rows = mean_row_gradients(some)
    got, two = (batch_shifts(x, rows, learning_rate=LR, state=None) for x in (some, alone))
    assert (
        got.policy_shift == pytest.approx(two.policy_shift / 2) and got.objective_shift == two.objective_shift
    )
    first = LR * sum((g * g).sum().item() for g in rows.means)
    assert got.objective_shift_by_row - first == pytest.approx((two.objective_shift_by_row - first) / 2)


def trained_state(vocab, width, tokens):
    keep = torch.ones_like(tokens[3], dtype=torch.bool)
    return update_adam_state(init_adam_state(vocab, width, dtype=torch.float64), *tokens, keep)


def test_the_table_takes_its_steps_in_place_and_moves_only_to_double():
    """Against a table with a row for every id of the vocabulary, and against the copying update."""
    vocab, width, places = 200, 5, set[int]()
    state = init_adam_state(vocab, width, dtype=torch.float64)
    first, second = torch.zeros(2, vocab, width, dtype=torch.float64)
    for seed in range(12):
        tokens = random_tokens(2, 2, vocab, 4, width, seed)
        keep = torch.ones(2, 2, dtype=torch.bool)
        before, copied = copy_moments(state), update_adam_state(state, *tokens, keep)
        assert torch.equal(state.first, before.first) and torch.equal(state.second, before.second)
        rows = mean_row_gradients(pack(*tokens, keep))
        state = apply_row_gradients(state, rows)
        assert torch.equal(state.first, copied.first) and torch.equal(state.second, copied.second)
        places.add(state.first.data_ptr())
        first[rows.ids] = 0.9 * first[rows.ids] + 0.1 * rows.means
        second[rows.ids] = 0.999 * second[rows.ids] + 0.001 * rows.means**2
    torch.testing.assert_close(state.first[state.slot_of_id], first)
    torch.testing.assert_close(state.second[state.slot_of_id], second)
    assert len(places) <= 5 and not state.first[0].any() and not state.second[0].any()
    assert len(state.first) - 1 == (state.slot_of_id > 0).sum() > 100  # only the rows that were seen


def test_rejected_tokens_leave_no_trace_in_the_moments():
    tokens = random_tokens(4, 6, 30, 8, 5)
    keep = torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    poisoned = [x.clone() for x in tokens]
    poisoned[0][~keep] = 1e6
    start = init_adam_state(30, 5, dtype=torch.float64)
    clean, dirty = (update_adam_state(start, *x, keep) for x in (tokens, poisoned))
    assert torch.equal(clean.first, dirty.first) and torch.equal(clean.second, dirty.second)


def test_nothing_kept_is_no_shift_and_only_counts_the_step():
    tokens = random_tokens(2, 3, 20, 8, 5)
    state = trained_state(20, 5, tokens)
    keep = torch.zeros(2, 3, dtype=torch.bool)
    packed = pack(*tokens, keep)
    shifts = batch_shifts(packed, mean_row_gradients(packed), learning_rate=LR, state=state)
    after = apply_row_gradients(copy_moments(state), mean_row_gradients(packed))
    assert shifts == BatchShifts(0.0, 0.0, 0.0)
    assert torch.equal(after.first, state.first) and after.step == state.step + 1


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 12), st.integers(0, 10_000))
def test_any_shape_is_finite_and_policy_shift_is_not_negative(rows, length, support, seed):
    tokens = random_tokens(rows, length, 12, support, 3, seed)
    for state in (None, trained_state(12, 3, tokens)):
        shifts = token_shifts(*tokens, LR, state)
        assert shifts.policy_shift.shape == shifts.objective_shift.shape == (rows, length)
        assert (shifts.policy_shift >= 0).all() and shifts.objective_shift.isfinite().all()


def test_nothing_as_large_as_all_directions_is_ever_built():
    rows, length, vocab, support, width = shape = (2, 16, 200, 50, 64)
    tokens = random_tokens(*shape)
    state = trained_state(vocab, width, tokens)
    keep = torch.ones(rows, length, dtype=torch.bool)
    with LargestTensor() as seen:
        token_shifts(*tokens, LR, state)
        packed = pack(*tokens, keep)
        gradients = mean_row_gradients(packed)
        batch_shifts(packed, gradients, learning_rate=LR, state=state)
        apply_row_gradients(state, gradients)
    assert 0 < seen.elements < rows * length * support * width


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns (a sparse one counts its stored values)."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_sparse:
                self.elements = max(self.elements, prod(tensor.shape))
        return out


def test_the_room_exports_its_contract():
    """For tests from outside: these functions, and no name of an argument changes."""
    assert set(capo_exp.curvature.__all__) == {"init_adam_state", "token_shifts", "update_adam_state"}
    tokens = ["hidden", "topk_probs", "topk_ids", "token_ids", "advantages"]
    names = {
        "init_adam_state": ["vocab_size", "hidden_size", "betas", "eps", "dtype", "device"],
        "token_shifts": [*tokens, "learning_rate", "state"],
        "update_adam_state": ["state", *tokens, "keep_mask"],
    }
    for name, expected in names.items():
        assert list(inspect.signature(getattr(capo_exp.curvature, name)).parameters) == expected
