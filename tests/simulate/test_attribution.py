"""The counterfactuals against attention with real queries, keys and values in float64, entry by entry."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvtool.attention import AttentionCall
from kvtool.policies import Policy
from kvtool.policies.leftovers import LayerTensors
from kvtool.policies.representatives import evicted_positions
from kvtool.policies.select import TensorView
from kvtool.policies.statistics import AttentionInputs
from kvtool.simulate.attribution import (
    CAUSES,
    COUNT,
    COUNTED,
    EVICT,
    FEWER,
    LADDER,
    N_SETS,
    N_STATES,
    PLAIN,
    SLOTS,
    VALUE,
    VARIANCE,
    Cell,
    measures,
    shapley,
    state_sums,
)
from kvtool.simulate.attribution_refine import FULL, _attend, _layer
from kvtool.simulate.attribution_sample import WEIGHTED, compensated
from kvtool.simulate.curves import ProbeTable

T, P, D, G, H = 29, 3, 8, 2, 2


@dataclass(frozen=True, slots=True)
class Toy:
    """One layer: queries, keys and values of the fed tokens come after those of T prompt positions; gradients [Q, P, D]."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    gradient: Tensor

    def logits(self, q: int, i: int) -> Tensor:
        """Logits of one fed token over the prompt and the fed tokens up to itself."""
        return self.keys[q // G, : T + i + 1] @ self.queries[q, i] / math.sqrt(D)


def make_toy(seed: int, spread: float = 2.0) -> Toy:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Toy(spread * normal(G * H, P, D), normal(H, T + P, D), normal(H, T + P, D), normal(G * H, P, D))


def table_of(toy: Toy, gradient: Tensor | None = None) -> ProbeTable:
    """What a capture would hold, in float64."""
    gradient = toy.gradient if gradient is None else gradient
    attention, gain = torch.zeros(2, G * H, P, T, dtype=torch.float64)
    own = torch.zeros(2, G * H, P, dtype=torch.float64)
    for q, i in itertools.product(range(G * H), range(P)):
        a = toy.logits(q, i).softmax(0)
        b = a * (toy.values[q // G, : T + i + 1] @ gradient[q, i])
        attention[q, i], gain[q, i], own[0, q, i], own[1, q, i] = a[:T], b[:T], a[T:].sum(), b[T:].sum()
    rows = torch.cat([x.view(H, G * P, T).transpose(1, 2) for x in (attention, gain)], dim=-1).numpy()[None]
    own_attention, own_gain = own.view(2, 1, H, G * P).numpy()
    mass, gain_of_all = rows[..., : G * P].sum(2), rows[..., G * P :].sum(2)
    return ProbeTable(rows, own_attention, own_gain, gain_of_all + own_gain, mass)


def cells_of(order: np.ndarray, budgets: list[int], kept: list[int], block: int | None) -> tuple[Cell, list[list[list[int]]]]:
    """A cell, and its evicted positions per slots and head."""
    cell = Cell(np.array([budgets]), np.array([kept]), block)
    return cell, [[sorted(order[0, h, n:].tolist()) for h, n in enumerate(counts)] for counts in (budgets, kept)]


def literal_output(
    toy: Toy, q: int, i: int, state: int, gone: list[int], block: int | None, observed: Tensor
) -> tuple[Tensor, float]:
    """Output of one head and fed token in a state, and the softmax's denominator over that with everything."""
    h, logits = q // G, toy.logits(q, i)
    rest = [j for j in range(T + i + 1) if j not in gone]
    weights, values = [logits[j].exp() for j in rest], [toy.values[h, j] for j in rest]
    size = block or max(1, len(gone))
    for members in [] if state in (EVICT, FEWER, FULL) else [gone[s : s + size] for s in range(0, len(gone), size)]:
        s, v, n = logits[members], toy.values[h, members], len(members)
        if state == WEIGHTED:
            w = observed[h, members] / observed[h, members].sum()
            weights.append((w @ toy.keys[h, members] @ toy.queries[q, i] / math.sqrt(D) - (w * w.log()).sum()).exp())
            values.append(w @ v)
            continue
        mass = (
            (toy.keys[h, members].mean(0) @ toy.queries[q, i] / math.sqrt(D)).exp() if state & VARIANCE else s.exp().sum() / n
        )
        weights.append(mass if state & COUNT else mass * n)
        values.append(v.mean(0) if state & VALUE else s.softmax(0) @ v)
    mass = torch.stack(weights)
    return (mass[:, None] * torch.stack(values)).sum(0) / mass.sum(), float(mass.sum() / logits.exp().sum())


def literal(toy: Toy, state: int, gone: list[list[int]], block: int | None, gradient: Tensor | None = None) -> np.ndarray:
    """Harm, lost margin and error of the mass per head, ``(3, H)``."""
    gradient, found = toy.gradient if gradient is None else gradient, np.zeros((3, H))
    for q, i in itertools.product(range(G * H), range(P)):
        output, mass = literal_output(toy, q, i, state, gone[q // G], block, torch.empty(0))
        full, _ = literal_output(toy, q, i, FULL, [], None, torch.empty(0))
        change = float(gradient[q, i] @ (output - full))
        found[:, q // G] += [-min(0.0, change), -change, abs(mass - 1) / (G * P)]
    return found


def has_slots(state: int) -> bool:
    return state in (FEWER, WEIGHTED) or (state < N_SETS and bool(state & SLOTS))


@pytest.mark.parametrize("block", [1, 4, 5, None])
def test_states_equal_attention_with_real_keys_and_values(block: int | None) -> None:
    toy, rng = make_toy(0), np.random.default_rng(0)
    table = table_of(toy)
    order = np.stack([rng.permutation(T) for _ in range(H)])[None]
    cells = [cells_of(order, [17, 21], [12, 14], block), cells_of(order, [6, 29], [1, 27], block)]
    sums, mass = state_sums(table, order, [cell for cell, _ in cells])
    found = measures(table, sums)
    for n, (_, gone) in enumerate(cells):
        for state in range(N_STATES):
            want = literal(toy, state, gone[has_slots(state)], block)
            got = [getattr(found, name)[n, state, 0] for name in ("harm", "margin", "mass")]
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11, err_msg=f"state {state}")
        for h in range(H):
            assert_block_mass(
                toy, h, gone[1][h], block, [getattr(mass, f)[n, 0, h] for f in ("exact", "plain", "counted", "gap")]
            )


def assert_block_mass(toy: Toy, head: int, gone: list[int], block: int | None, found: list[float]) -> None:
    want = np.zeros(4)
    for q, i in itertools.product(range(head * G, (head + 1) * G), range(P)):
        logits = toy.logits(q, i)
        shares, size = logits - logits.logsumexp(0), block or max(1, len(gone))
        for members in [gone[s : s + size] for s in range(0, len(gone), size)]:
            exact, plain = float(shares[members].exp().sum()), float(shares[members].mean().exp())
            want += [exact, plain, len(members) * plain, exact * math.log(exact / len(members) / plain)]
    np.testing.assert_allclose(found, want, rtol=1e-9, atol=1e-12)


def test_perfect_representatives_do_no_harm_and_parts_add_up() -> None:
    toy, rng = make_toy(1), np.random.default_rng(1)
    order = np.stack([rng.permutation(T) for _ in range(H)])[None]
    cell, _ = cells_of(order, [14, 9], [10, 4], 4)
    found = measures(table_of(toy), state_sums(table_of(toy), order, [cell])[0])
    for values in (found.harm, found.margin, found.mass):
        assert np.abs(values[0, [0, SLOTS]]).max() < 1e-12
        assert np.abs(values[0, PLAIN]).min() > 1e-3
        parts = shapley(np.moveaxis(values[0, :N_SETS], 0, -1))
        np.testing.assert_allclose(parts.sum(-1), values[0, PLAIN] - values[0, 0], rtol=0, atol=1e-12)
        np.testing.assert_allclose(
            np.diff(values[0, LADDER], axis=0).sum(0), values[0, PLAIN] - values[0, EVICT], rtol=0, atol=1e-12
        )


def toy_with(keys: str, values: str) -> Toy:
    """Prompt keys or values that are equal within the blocks of 4 of positions 5 to 28."""
    toy = make_toy(2)
    for name, kind in (("keys", keys), ("values", values)):
        if kind == "equal":
            tensor = getattr(toy, name)
            for start in range(5, T, 4):
                tensor[:, start : start + 4] = tensor[:, start : start + 1]
    return toy


@pytest.mark.parametrize(
    ("keys", "values", "guilty"),
    [
        ("equal", "equal", {"count"}),
        ("equal", "different", {"count"}),  # equal keys get equal attention, and the plain mean is the right one
        ("different", "equal", {"count", "variance"}),
        ("different", "different", {"count", "variance", "value"}),
    ],
)
def test_only_flaws_that_are_there_are_blamed(keys: str, values: str, guilty: set[str]) -> None:
    toy, order = toy_with(keys, values), np.broadcast_to(np.arange(T), (1, H, T))
    cell = Cell(np.full((1, H), 5), np.full((1, H), 5), 4)  # no slot is paid for
    table = table_of(toy)
    parts = shapley(measures(table, state_sums(table, order, [cell])[0]).harm[0, :N_SETS].sum((1, 2)))
    assert {cause for cause, part in zip(CAUSES, parts, strict=True) if abs(part) > 1e-9} == guilty


@pytest.mark.parametrize("state", [PLAIN, COUNTED, EVICT, VALUE, VARIANCE | SLOTS])
def test_lost_margin_is_the_slope_of_a_real_function_for_small_changes(state: int) -> None:
    toy, order = make_toy(3), np.broadcast_to(np.arange(T), (1, H, T))
    readout = torch.randn(7, G * H * P * D, generator=torch.Generator().manual_seed(4), dtype=torch.float64) / 8
    cell, gone = cells_of(order, [11, 11], [9, 9], 4)

    def margin(outputs: Tensor) -> Tensor:
        logits = readout @ torch.tanh(outputs.flatten())
        return logits[0] - logits[1:].logsumexp(0)

    def outputs(which: int, sets: list[list[int]]) -> Tensor:
        places = itertools.product(range(G * H), range(P))
        found = [literal_output(toy, q, i, which, sets[q // G], 4, torch.empty(0))[0] for q, i in places]
        return torch.stack(found).view(G * H, P, D)

    # Evicted keys that all point away from every query hold little, so that the change is small; then smaller by half.
    errors = []
    toy.queries[..., 0] = 3.0
    for depth in (9.0, 12.0):
        toy.keys[:, 9:T, 0] = -depth
        full = outputs(FULL, [[], []]).requires_grad_()
        gradient = torch.autograd.grad(margin(full), full)[0]
        table = table_of(toy, gradient)
        predicted = -measures(table, state_sums(table, order, [cell])[0]).margin[0, state].sum()
        real = (margin(outputs(state, gone[has_slots(state)])) - margin(full)).item()
        errors.append(abs(predicted / real - 1))
    assert errors[0] < 0.02
    assert errors[1] < errors[0] / 4


def test_attention_below_the_precision_of_the_file_is_floored() -> None:
    toy, order = make_toy(5), np.broadcast_to(np.arange(T), (1, H, T))
    table = table_of(toy)
    table.rows[0, :, 12:16, :] = 0.0  # attention and gain of a whole block, and of half of one
    table.rows[0, :, 16:18, :] = 0.0
    table.prompt_mass[:] = table.rows[..., : G * P].sum(2)
    table.full_gain[:] = (table.rows[..., G * P :].sum(2) + table.own_gain) / (table.prompt_mass + table.own_attention)
    found = measures(table, state_sums(table, order, [Cell(np.full((1, H), 10), np.full((1, H), 8), 4)])[0])
    assert np.isfinite(found.harm).all()
    assert found.harm[0, [0, SLOTS]].max() < 1e-8


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 10**6))
def test_shapley_is_the_mean_over_all_orders(n: int, seed: int) -> None:
    values = np.random.default_rng(seed).normal(size=(2, 1 << n))
    want = np.zeros((2, n))
    for order in itertools.permutations(range(n)):
        members = 0
        for player in order:
            want[:, player] += values[:, members | (1 << player)] - values[:, members]
            members |= 1 << player
    np.testing.assert_allclose(shapley(values), want / math.factorial(n), atol=1e-12)


@pytest.mark.parametrize("block", ["4", "full"])
def test_masked_forward_attends_as_every_state_says(block: str) -> None:
    toy, rng = make_toy(6), np.random.default_rng(6)
    queries = torch.randn(G * H, T, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    view = TensorView(AttentionInputs(queries, toy.keys[:, :T], toy.values[:, :T], D**-0.5), 0, 1)
    policy = compensated(Policy.parse("streaming:budget=50%"), block, "weighted", "entropy")
    observed = policy.compensation.weights(view)
    assert observed is not None
    tensors = LayerTensors(toy.keys[:, :T], toy.values[:, :T], queries, D**-0.5)
    kept = [[torch.from_numpy(np.sort(rng.permutation(T)[:n])) for n in counts] for counts in ((17, 20), (12, 29))]
    cut = (_layer(view, tensors, kept[0], policy), _layer(view, tensors, kept[1], policy))
    states = [FULL, *range(WEIGHTED + 1)]
    fed = [t[None].expand(len(states), -1, -1, -1) for t in (toy.queries, toy.keys[:, T:], toy.values[:, T:])]
    found = _attend(AttentionCall(0, *fed, None, D**-0.5, None), tensors, cut, states)
    size = None if block == "full" else int(block)
    for r, state in enumerate(states):
        for q, i in itertools.product(range(G * H), range(P)):
            gone = [] if state == FULL else evicted_positions(kept[has_slots(state)][q // G], T).tolist()
            want, _ = literal_output(toy, q, i, state, gone, size, observed.double())
            assert found[r, q, i].tolist() == pytest.approx(want.tolist(), abs=3e-5), (state, q, i)
