"""The Triton kernels against torch: in Triton's interpreter without a GPU, else as they are."""

import importlib
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from capo_exp.config.errors import ConfigError
from capo_exp.core.types import AdamState, BatchShifts
from capo_exp.curvature import backend
from capo_exp.curvature.model import (
    apply_row_gradients,
    batch_shifts,
    init_adam_state,
    mean_row_gradients,
    pack,
    token_shifts,
    update_adam_state,
)
from capo_exp.curvature.table import decay
from tests.test_curvature import random_tokens

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Found = list[Tensor]
KERNELS = ("along_adam", "along_rows", "sum_rows", "decay")
SHAPES = {  # B, T, V, K, H; blocks are of 4 pairs and 8 columns, sums of 8 pairs
    "nothing divides": (1, 3, 7, 3, 11),
    "one pair a row": (1, 1, 9, 9, 5),
    "one row for all pairs": (2, 3, 1, 1, 8),
    "one pair": (1, 1, 4, 1, 1),
}


@pytest.fixture(scope="module")
def kernels():
    """The kernels, with small blocks. Triton decides on import whether it interprets, hence the reloading."""
    language = pytest.importorskip("triton.language")
    module = importlib.import_module("capo_exp.curvature.kernels")
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE.type == "cpu":
            patch.setenv("TRITON_INTERPRET", "1")
        _reload(language.standard, language.random, language, module)
        module.PAIRS, module.SLICE, module.PIECE = 4, 8, 8
        yield module
    _reload(language.standard, language.random, language, module)


def _reload(*modules):
    for module in modules:
        importlib.reload(module)


@pytest.fixture(autouse=True)
def chosen_as_before():
    yield
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CAPO_KERNEL", raising=False)
        backend.choose_kernel("auto", CPU)


def tokens_of(*shape, seed=0):
    """In single precision, on the device."""
    made = random_tokens(*shape, seed=seed)
    return [(values.float() if values.is_floating_point() else values).to(DEVICE) for values in made]


def two_steps(shape, state, keep):
    """Shifts and moments of step 0, and of a step in which some rows have no moments yet."""
    found: Found = []
    for seed in range(2):
        tokens = tokens_of(*shape, seed=seed)
        shifts, packed = token_shifts(*tokens, 1e-2, state), pack(*tokens, keep)
        gradients = mean_row_gradients(packed)
        batch = batch_shifts(packed, gradients, learning_rate=1e-2, state=state)
        state = update_adam_state(state, *tokens, keep)
        found += [*vars(shifts).values(), torch.tensor([*vars(batch).values()])]
        found += [gradients.means, state.first, state.second]
    return found


def compare(make):
    """What torch makes and what the kernels make, which has to be the same; twice, and to the same bits."""
    found: list[Found] = []
    for choice in ("torch", "triton", "triton"):
        backend.choose_kernel(choice, DEVICE)
        assert (backend.find_kernels(torch.empty(0, device=DEVICE)) is None) == (choice == "torch")
        found.append(make())
    reference, first, second = found
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    for one, other in zip(first, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=1e-7)
    return first


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shifts_and_moments_are_those_of_torch(kernels, monkeypatch, shape):
    """And each kernel is called."""
    called = {name: Mock(wraps=getattr(kernels, name)) for name in KERNELS}
    for name, counted in called.items():
        monkeypatch.setattr(kernels, name, counted)
    rows, length, vocab, _, width = shape
    keep = torch.rand(rows, length, generator=torch.Generator().manual_seed(1)).to(DEVICE) < 0.8
    empty = init_adam_state(vocab, width, device=DEVICE)
    assert compare(lambda: two_steps(shape, empty, keep))[0].numel()
    assert [name for name, counted in called.items() if not counted.called] == []


@pytest.mark.usefixtures("kernels")
def test_live_moments_of_the_loss_are_read_with_their_sign_and_weight():
    tokens, generator = tokens_of(2, 3, 11, 3, 9), torch.Generator().manual_seed(1)
    first, second = torch.randn(11, 9, generator=generator), torch.rand(11, 9, generator=generator)
    state = AdamState(
        torch.arange(11, device=DEVICE), first.to(DEVICE), second.to(DEVICE), 4, (0.9, 0.99), 1e-8,
        sign=-1.0, raw_steps=0, token_weight=1 / 6,
    )  # fmt: skip
    shifts, _ = compare(lambda: [*vars(token_shifts(*tokens, 1e-2, state)).values()])
    swapped = token_shifts(*tokens, 1e-2, replace(state, sign=1.0))
    assert not torch.allclose(shifts, swapped.policy_shift)


@pytest.mark.usefixtures("kernels")
def test_without_tokens_nothing_moves():
    tokens = tokens_of(2, 3, 11, 3, 9)
    nothing = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    state = update_adam_state(init_adam_state(11, 9, device=DEVICE), *tokens, ~nothing)

    def make():
        packed = pack(*tokens, nothing)
        gradients = mean_row_gradients(packed)
        assert batch_shifts(packed, gradients, learning_rate=1e-2, state=state) == BatchShifts(0.0, 0.0, 0.0)
        none = token_shifts(*(values[:0] for values in tokens), 1e-2, state)
        return [none.policy_shift, gradients.means, apply_row_gradients(state, gradients).first]

    compare(make)


@pytest.mark.parametrize("choice", ["torch", "triton"])
def test_a_table_in_bfloat16_decays_in_the_mean(kernels, choice):
    """1 - 0.001 lies a quarter of the way from 1 to the next number of bfloat16 below it."""
    kernels.SLICE = 1024
    backend.choose_kernel(choice, DEVICE)
    first, second = torch.ones(2, 2, 1000, dtype=torch.bfloat16, device=DEVICE)
    decay(
        first,
        second,
        torch.tensor([1], device=DEVICE),
        torch.zeros(1, 1000, device=DEVICE),
        (0.999, 0.999),
        5,
    )
    kernels.SLICE = 8
    for table in (first, second):
        assert (table[0] == 1).all() and set(table[1].tolist()) == {1.0, 1 - 2**-8}
        assert table[1].float().mean().item() == pytest.approx(0.999, abs=2e-4)  # 4 standard deviations
    assert not torch.equal(first[1], second[1])


def test_triton_on_a_cpu_is_one_clear_error(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "INTERPRETED", False)
    for key in ("config", "environment"):
        if key == "environment":
            monkeypatch.setenv("CAPO_KERNEL", "triton")
        with pytest.raises(ConfigError, match=r"^curvature\.kernel=triton: expected torch or auto: .* cpu$"):
            backend.choose_kernel("triton" if key == "config" else "auto", CPU)
    monkeypatch.setenv("CAPO_KERNEL", "fast")
    with pytest.raises(ConfigError, match=r"^CAPO_KERNEL=fast: expected one of auto, torch, triton$"):
        backend.choose_kernel("auto", CPU)


@pytest.mark.parametrize("lengths", [(1, 30, 1, 0, 9), (8, 8, 16), (3, 0, 0, 37), (5,)])
def test_sums_of_rows_that_are_cut(kernels, lengths):
    """Rows without pairs, rows of several pieces, rows that start or end where a piece does."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    hidden, weights = torch.randn(7, 11, generator=generator), torch.randn(len(rows), generator=generator)
    tokens = torch.randint(7, (len(rows),), generator=generator)
    wanted = torch.zeros(len(lengths), 11).index_add_(0, rows, weights[:, None] * hidden[tokens])
    found = kernels.sum_rows(*(values.to(DEVICE) for values in (hidden, tokens, weights, starts)))
    torch.testing.assert_close(found.cpu(), wanted)
