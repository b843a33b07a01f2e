"""Methods that share by head importance or kinds, against literal references; the worked example of docs/hace.md."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvtool.errors import ConfigError, DataError
from kvtool.policies import Policy, kept_counts, kept_positions, parse_policy, select
from kvtool.policies.select import TensorView
from kvtool.policies.statistics import AttentionInputs

PAGE = Path(__file__).parents[2] / "docs" / "hace.md"
L, Q, H, T, D = 3, 6, 3, 80, 8


def tensors(seq_len: int = T, seed: int = 0, n_kv: int = H) -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(seed)
    sizes = (Q, n_kv, n_kv)
    return tuple([torch.randn(n, seq_len, D, generator=generator) * (1 + i) for i in range(L)] for n in sizes)


def counts(text: str, seq_len: int = T, seed: int = 0, n_kv: int = H, scores: np.ndarray | None = None) -> list[list[int]]:
    kept = select(text, *tensors(seq_len, seed, n_kv), head_scores=None if scores is None else torch.tensor(scores))
    return [[len(p) for p in layer] for layer in kept]


def literal_share(weights: list[Fraction], total: int, low: int, high: int) -> list[int]:
    """Largest remainder above `low`, with water-filling at `high`, in exact fractions."""
    n, pool = len(weights), Fraction(total - low * len(weights))
    shares, open_ = [Fraction(0)] * n, set(range(n))
    while True:
        left = pool - sum(shares[i] for i in range(n) if i not in open_)
        mass = sum(weights[i] for i in open_)
        for i in open_:
            shares[i] = left * weights[i] / mass if mass else left / len(open_)
        full = {i for i in open_ if shares[i] >= high - low}
        if not full:
            break
        for i in full:
            shares[i] = Fraction(high - low)
        open_ -= full
        if not open_:
            break
    whole = [math.floor(x) for x in shares]
    order = sorted(range(n), key=lambda i: (-(shares[i] - whole[i]), i))
    for i in order[: int(pool) - sum(whole)]:
        whole[i] += 1
    return [low + x for x in whole]


def by_rows(flat: list[int], n_kv: int = H) -> list[list[int]]:
    return [flat[i : i + n_kv] for i in range(0, len(flat), n_kv)]


# --- HACE -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ExampleView:
    """A layer whose preference is `preference` and whose heads have `scores`: no attention behind it."""

    layer: int
    preference: float
    scores: tuple[float, ...]
    seq_len: int
    n_layers: int = 2
    seed: int = 0

    @property
    def n_heads(self) -> int:
        return len(self.scores)

    @property
    def n_kv_heads(self) -> int:
        return len(self.scores)

    def statistic(self, name: str) -> torch.Tensor:
        kind, _, window = name.partition("/")
        w = int(window or 1)
        if kind == "head_scores":
            return torch.tensor(self.scores)[:, None]
        if kind == "window_entropy":  # H: sum over heads and the window's queries
            return torch.full((self.n_heads, 1), self.preference / self.n_heads / w)
        if kind == "window_var":  # V: sum over heads and past positions of the sample variance, here 1
            return torch.full((self.n_heads, self.seq_len), (w - 1) / w / self.n_heads / (self.seq_len - w))
        return torch.rand(self.n_heads, self.seq_len, generator=torch.Generator().manual_seed(self.layer))


def tables() -> list[list[list[str]]]:
    """The example's tables: rows of cells."""
    text = PAGE.read_text().split("## A worked example")[1]
    found: list[list[list[str]]] = []
    for block in text.split("\n\n"):
        rows = [
            re.findall(r"[^|]+", line) for line in block.splitlines() if line.startswith("| ") and "." in line.split("|")[1]
        ]
        found += [[[cell.strip() for cell in row] for row in rows[1:]]] if rows else []
    return found


@pytest.mark.parametrize(("which", "seq_len"), [(0, 100), (1, 30)])
def test_the_worked_example(which: int, seq_len: int) -> None:
    facts = [row[:4] for row in tables()[0]]
    preference = [float(facts[2 * layer][1]) for layer in range(2)]
    scores = [tuple(float(facts[2 * layer + head][2]) for head in range(2)) for layer in range(2)]
    assert [float(row[3]) for row in facts] == [p * s for p, row in zip(preference, scores, strict=True) for s in row]
    shares, rounded, budgets = zip(*(row[-3:] for row in tables()[which]), strict=True)
    floor = 4 + int(0.2 * (20 - 4))
    weights = [Fraction(row[3]) for row in facts]
    assert literal_share(weights, 80, floor, seq_len) == [int(b) for b in budgets]
    assert [floor + int(r) for r in rounded] == [int(b) for b in budgets]
    # The shares before rounding: with the short prompt the first head is full, the others share what it leaves.
    full = [int(b) == seq_len for b in budgets]
    left = 80 - 4 * floor - sum(seq_len - floor for f in full if f)
    mass = sum(w for w, f in zip(weights, full, strict=True) if not f)
    want = [seq_len - floor if f else float(left * w / mass) for w, f in zip(weights, full, strict=True)]
    np.testing.assert_allclose([float(s) for s in shares], want, atol=5e-4)
    views = [ExampleView(layer, preference[layer], scores[layer], seq_len) for layer in range(2)]
    policy = parse_policy("hace:budget=20,window=4")
    found = kept_counts(policy, views, [policy.method.parts().scorer.score(view) for view in views])
    assert [n for row in found for n in row] == [int(b) for b in budgets]


def literal_preference(q: torch.Tensor, k: torch.Tensor, window: int, tau1: float, tau2: float) -> float:
    """CAKE's layer preference, query by query in float64."""
    entropy, variance = 0.0, 0.0
    seq_len, group = q.shape[1], q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        rows = []
        for i in range(seq_len - window, seq_len):
            logits = (k[head // group, : i + 1].double() @ q[head, i].double()) / math.sqrt(q.shape[2])
            past = logits.softmax(0)[: seq_len - window]
            rows.append(past)
            entropy -= float((past * past.log()).sum())
        variance += float(torch.stack(rows).var(dim=0, unbiased=True).sum())
    return float(entropy ** (1 / tau1) * variance ** (1 / tau2))


@pytest.mark.parametrize(
    ("name", "options", "a", "b"),
    [
        ("hace", "", 1.0, 1.0),
        ("hace", ",layer_power=0.5,head_power=2,tau1=1.6,tau2=0.4,floor=0.35", 0.5, 2.0),
        ("hace-layer", "", 1.0, 0.0),
        ("hace-head", "", 0.0, 1.0),
        ("hace-head", ",head_power=0.5,floor=0", 0.0, 0.5),
    ],
)
@pytest.mark.parametrize("budget", [10, 24, 60])
def test_hace_is_its_definition(name: str, options: str, a: float, b: float, budget: int) -> None:
    scores = np.random.default_rng(1).random((L, Q)) ** 3
    q, k, _ = tensors()
    given_ = dict(re.findall(r"(\w+)=([\d.]+)", options))
    tau1, tau2, floor = (float(given_.get(key, default)) for key, default in (("tau1", 1), ("tau2", 1), ("floor", 0.2)))
    preference = [literal_preference(q[i], k[i], 8, tau1, tau2) for i in range(L)]
    per_kv = scores.reshape(L, H, -1).mean(axis=2)
    weights = [Fraction(preference[i] ** a * per_kv[i, h] ** b) for i in range(L) for h in range(H)]
    low = 8 + int(floor * (budget - 8))
    want = by_rows(literal_share(weights, budget * L * H, low, T))
    found = counts(f"{name}:budget={budget},window=8{options}", scores=None if name == "hace-layer" else scores)
    assert sum(map(sum, found)) == budget * L * H
    # Preferences come in float32: a remainder may be rounded to the neighbour.
    assert np.abs(np.subtract(found, want)).max() <= 1
    assert np.abs(np.subtract(found, want)).sum() <= 2
    if budget > 10:
        assert len({n for row in found for n in row}) > 1


def test_hace_ablations_are_hace() -> None:
    scores = np.random.default_rng(2).random((L, Q))
    for ablation, power in (("hace-layer", "head_power=0"), ("hace-head", "layer_power=0")):
        both = [
            counts(f"{text}:budget=30,window=8{more}", scores=scores) for text, more in ((ablation, ""), ("hace", f",{power}"))
        ]
        assert both[0] == both[1]
    assert all(len(set(row)) == 1 for row in counts("hace-layer:budget=30,window=8"))
    assert counts("hace-layer:budget=30,window=8,floor=0") == counts("cake:budget=30,window=8")
    assert counts("hace:budget=30,window=8,floor=1", scores=scores) == [[30] * H] * L
    # No importance at all: heads alike.
    assert counts("hace-head:budget=30,window=8", scores=np.zeros((L, Q))) == [[30] * H] * L


@pytest.mark.parametrize("scorer", ["cake", "snapkv"])
def test_hace_ranks_by_its_scorer(scorer: str) -> None:
    like = {"cake": "cake:budget={},window=8", "snapkv": "snapkv:budget={},window=8,kernel=5"}[scorer]
    kept = select(f"hace-layer:budget=30,window=8,scorer={scorer}", *tensors())
    for layer, heads in enumerate(kept):
        # The same number of entries of the method that the scorer is from; its budgets differ between layers, so one layer alone.
        one = [[x[layer]] for x in tensors()]
        for found, want in zip(heads, select(like.format(f"{len(heads[0])}entries"), *one)[0], strict=True):
            assert found.tolist() == want.tolist()


# --- HeadKV -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_kv", [1, 3, 6])
@pytest.mark.parametrize("beta", [1.01, 1.5, 10])
@pytest.mark.parametrize("budget", [9, 20, 47, 79])
def test_headkv_is_its_formula(budget: int, beta: float, n_kv: int) -> None:
    scores = np.random.default_rng(3).random((L, Q)) ** 4
    per_kv = scores.reshape(L, n_kv, -1).mean(axis=2)
    past = Fraction(budget - 8)
    pool = past / Fraction(beta)
    shares = [Fraction(x) for x in (per_kv / per_kv.sum()).flatten().tolist()]
    targets = [s * pool * L * n_kv + (past - pool) for s in shares]
    want = by_rows(literal_share(targets, budget * L * n_kv, 8, T), n_kv)
    found = counts(f"headkv:budget={budget},beta={beta}", n_kv=n_kv, scores=scores)
    assert found == want
    assert min(map(min, found)) >= 8 + math.floor(past - pool)
    # What the official rounding loses at a budget where heads are capped by the prompt, the exact one hands on.
    official = counts(f"headkv:budget={budget},beta={beta},rule=official", n_kv=n_kv, scores=scores)
    if budget == 47 and beta == 1.01 and n_kv > 1:
        assert sum(map(sum, official)) < sum(map(sum, found))
        assert not Policy.parse("headkv:budget=47,rule=official").exact


def test_more_beta_shares_less() -> None:
    scores = np.random.default_rng(4).random((L, Q)) ** 4
    spread = [np.ptp(counts(f"headkv:budget=20,beta={beta}", scores=scores)) for beta in (1.0, 1.5, 3, 100)]
    assert spread == sorted(spread, reverse=True)
    assert spread[-1] <= 1 < spread[0]


def test_a_file_gives_what_the_same_scores_give(toy_heads: Callable[..., Path]) -> None:
    path = toy_heads(L, Q, H)
    heads = json.loads(path.read_text())["heads"]
    scores = np.asarray([h["importance"] for h in heads]).reshape(L, Q)
    # KV heads of this toy file have scores of their own, which count before a mean of the group's.
    kv = np.asarray([h["importance"] for h in json.loads(path.read_text())["kv_heads"]]).reshape(L, H).repeat(Q // H, axis=1)
    for text in ("headkv:budget=20", "hace:budget=20,window=8", "hace-head:budget=20,window=8"):
        assert counts(f"{text},heads={path}") == counts(text, scores=kv)
    published = {f"{layer}-{head}": [x] for (layer, head), x in np.ndenumerate(scores)}
    (other := path.with_name("published.json")).write_text(json.dumps(published))
    assert counts(f"headkv:budget=20,heads={other}") == counts("headkv:budget=20", scores=scores)
    with pytest.raises(DataError, match="is of 3 layers with 6 heads, the model has 2 with 4"):
        select(f"headkv:budget=20,heads={other},rule=official", *[[torch.randn(n, 40, 4)] * 2 for n in (4, 2, 2)])
    with pytest.raises(ConfigError, match="add heads=FILE"):
        counts("headkv:budget=20")
    with pytest.raises(DataError, match="finite and not negative"):
        counts("headkv:budget=20", scores=-scores)


# --- DuoAttention -----------------------------------------------------------------------------------------------------------


def literal_duo(gates: np.ndarray, budget: int, streaming: int, seq_len: int) -> list[list[int]]:
    """One head after the other by falling gate, as long as there is anything left."""
    found = np.full(gates.shape, min(streaming, seq_len))
    left = budget * gates.size - int(found.sum())
    heads = sorted(np.ndindex(gates.shape), key=lambda lh: (-gates[lh], lh))
    for head in heads:
        more = min(left, seq_len - found[head])
        found[head] += more
        left -= more
    return found.tolist()


@given(budget=st.integers(12, T), seed=st.integers(0, 5), levels=st.integers(1, 9))
def test_duo_with_a_budget(budget: int, seed: int, levels: int) -> None:
    # Few levels: many ties, which go to the earlier layer and head.
    gates = np.random.default_rng(seed).integers(0, levels, (L, H)) / levels
    found = counts(f"duo:budget={budget}entries,sink=4,recent=8", scores=gates.repeat(Q // H, axis=1))
    assert found == literal_duo(gates, budget, 12, T)
    assert sum(map(sum, found)) == budget * L * H
    flat = [n for row in found for n in row]
    assert sum(n not in (12, T) for n in flat) <= 1


@pytest.mark.parametrize(("sparsity", "full"), [(0, 9), (0.25, 7), (0.5, 5), (0.75, 3), (1, 0)])
def test_duo_without_a_budget(sparsity: float, full: int) -> None:
    gates = np.random.default_rng(6).permutation(L * H).reshape(L, H) / 9
    text = f"duo:sink=4,recent=8,sparsity={sparsity}"
    kept = select(text, *tensors(), head_scores=torch.tensor(gates.repeat(Q // H, axis=1)))
    threshold = np.sort(gates.flatten())[::-1][full - 1] if full else np.inf
    for layer, heads in enumerate(kept):
        for head, positions in enumerate(heads):
            streaming = [*range(4), *range(T - 8, T)]
            assert positions.tolist() == (list(range(T)) if gates[layer, head] >= threshold else streaming)
    # With gates from a file the policy knows its mean beforehand.
    assert Policy.parse(text).method.implied_entries(5) == 5


def test_duo_knows_its_entries(tmp_path: Path) -> None:
    gates = np.random.default_rng(7).random((L, H))
    (tmp_path / "full_attention_heads.tsv").write_text("\n".join("\t".join(f"{x:.18e}" for x in row) for row in gates))
    for sparsity in (0.0, 0.3, 0.5, 0.9, 1.0):
        text = f"duo:heads={tmp_path},sink=4,recent=8,sparsity={sparsity}"
        found = counts(text)
        assert Policy.parse(text).method.implied_entries(T) == pytest.approx(np.mean(found), abs=1e-9)


# --- windows by head kind ---------------------------------------------------------------------------------------------------


def literal_window(kind: str, confidence: float, threshold: float, windows: dict[str, int], base: int) -> int:
    return windows.get(kind, base) if confidence >= threshold else base


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_windows_by_kind_and_confidence(threshold: float, toy_heads: Callable[..., Path]) -> None:
    path = toy_heads(L, Q, H)
    heads = json.loads(path.read_text())["kv_heads"]
    windows, base = {"positional": 5, "mixed": 20, "gathering": 60}, 9
    options = ",".join(f"{k}={v}" for k, v in windows.items()) + f",base={base},confidence={threshold},heads={path}"
    kept = select(f"head_windows:{options}", *tensors())
    want = [literal_window(h["kind"], h["confidence"], threshold, windows, base) for h in heads]
    assert len(set(want)) > 1 or threshold == 1
    for (layer, head), window in zip(np.ndindex(L, H), want, strict=True):
        assert kept[layer][head].tolist() == [*range(4), *range(T - window, T)]
    mean = np.mean([4 + w for w in want])
    assert Policy.parse(f"head_windows:{options}").method.implied_entries(T) == pytest.approx(mean)
    # A prompt shorter than some windows, and a budget: the windows are its weights.
    short = counts(f"head_windows:{options}", seq_len=30)
    assert short == by_rows([min(30, 4 + w) for w in want])
    weighed = counts(f"head_windows:budget=40,{options}")
    assert weighed == by_rows(literal_share([Fraction(w) for w in want], 40 * L * H, 4, T))


def test_kinds_that_a_file_does_not_hold(toy_heads: Callable[..., Path]) -> None:
    path = toy_heads(L, Q, H)
    value = json.loads(path.read_text())
    value["kv_heads"][4]["confidence"] = None
    path.write_text(json.dumps(value))
    with pytest.raises(DataError, match=r"has no confidence \(too few prompts\), but confidence=0.7 is asked for"):
        counts(f"head_windows:heads={path}")
    assert counts(f"head_windows:heads={path},confidence=0")
    with pytest.raises(DataError, match="is of 3 KV heads, the model has 6"):
        counts(f"head_windows:heads={path},confidence=0", n_kv=6)
    with pytest.raises(ConfigError, match="add heads=FILE"):
        counts("head_windows")


def test_one_window_for_all_needs_no_file() -> None:
    policy = Policy.parse("K_uniform16_aware")
    q, k, v = tensors()
    views = [TensorView(AttentionInputs(*x, D**-0.5), i, L) for i, x in enumerate(zip(q, k, v, strict=True))]
    same = kept_positions(Policy.parse("streaming:budget=20"), views)
    for found, want in zip(kept_positions(policy, views), same, strict=True):
        assert [p.tolist() for p in found] == [p.tolist() for p in want]
    assert policy.entries(T) == 20
    assert policy.entries(10) == 10
