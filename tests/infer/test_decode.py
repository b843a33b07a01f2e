"""Eviction while decoding and between chunks of a prompt: against literal step-by-step references of the papers, and the
capacity as a hard bound."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvtool.attention import AttentionCall, attention_handler, dense_attention
from kvtool.errors import ConfigError
from kvtool.infer.cache import CompressedCache
from kvtool.infer.chunks import prefill_in_chunks
from kvtool.infer.generate import prefill
from kvtool.infer.present import decoding_needs
from kvtool.models import load_model
from kvtool.policies import Policy, method_classes
from kvtool.policies.when import When

TEXT = (
    "The river ran past the old mill and the children counted boats. The secret number of the calm wizard is 48213. "
    "In the morning the baker opened his shop, and the smell of bread went down the street. Nobody spoke of the storm. "
    "The secret number of the quiet baker is 70952. Two birds sat on the wall and watched the cat, who did not care. "
)


def tokens(row: int, n: int) -> list[int]:
    return torch.randint(3, 250, (n,), generator=torch.Generator().manual_seed(100 + row)).tolist()


#: (carried scores, visible positions, attention rows of the new queries) -> positions that stay
Choose = Callable[[list[float], list[int], list[list[dict[int, float]]]], list[int]]


class Literal:
    """Decoding as the papers write it: everything is kept, and per layer and KV head a list says what is still visible.

    One entry at a time, in float64. `choose(scores, kept, rows)` names what stays, given the carried scores of the visible
    entries and, for each new query and head of the group, its attention by position.
    """

    def __init__(self, model: Any, capacity: int, choose: Choose) -> None:
        from transformers import DynamicCache

        self.model, self.capacity, self.choose = model, capacity, choose
        self.cache = DynamicCache()
        self.kept: dict[tuple[int, int], list[int]] = {}
        self.scores: dict[tuple[int, int], dict[int, list[float]]] = {}

    def feed(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad(), attention_handler(self.model, self._attend):
            return self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True).logits[0]

    def logits_of(self, call: AttentionCall, q: int, i: int, h: int, visible: list[int]) -> torch.Tensor:
        return call.keys[0, h, visible].double() @ call.queries[0, q, i].double() * call.scaling

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        n_new, n_all = call.queries.shape[2], call.keys.shape[2]
        n_kv, group = call.keys.shape[1], call.queries.shape[1] // call.keys.shape[1]
        out = torch.empty_like(call.queries)
        for h in range(n_kv):
            kept = self.kept.setdefault((call.layer, h), [])
            scores = self.scores.setdefault((call.layer, h), {})
            before = list(kept)
            kept += range(n_all - n_new, n_all)
            scores |= {j: [0.0] * group for j in range(n_all - n_new, n_all)}
            rows: list[list[dict[int, float]]] = []
            for i in range(n_new):
                rows.append([])
                visible = before + list(range(n_all - n_new, n_all - n_new + i + 1))
                for g in range(group):
                    q = h * group + g
                    weights = torch.softmax(self.logits_of(call, q, i, h, visible), 0)
                    out[0, q, i] = (weights @ call.values[0, h, visible].double()).to(out.dtype)
                    rows[-1].append(dict(zip(visible, weights.tolist(), strict=True)))
                    for j, weight in rows[-1][-1].items():
                        scores[j][g] += weight
            if len(kept) > self.capacity:
                merged = [sum(scores[j]) / group for j in kept]
                kept[:] = self.choose(merged, kept, rows)
                for j in set(scores) - set(kept):
                    del scores[j]
        return out


class LiteralCachePositions(Literal):
    """The same with keys cached before rotation: they are rotated by their rank among the visible ones, at every step.

    The rotation is written out here; unrotated queries and keys come from the model's own projections.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config = self.model.config
        self.theta, self.width = config.rope_parameters["rope_theta"], config.head_dim
        self.keys: dict[int, torch.Tensor] = {}
        self.queries: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(self.model.model.layers):
            layer.self_attn.k_proj.register_forward_hook(lambda *a, i=i: self._note(self.keys, i, a[-1], keep=True))
            layer.self_attn.q_proj.register_forward_hook(lambda *a, i=i: self._note(self.queries, i, a[-1], keep=False))

    def _note(self, where: dict[int, torch.Tensor], layer: int, out: torch.Tensor, *, keep: bool) -> None:
        new = out[0].view(out.shape[1], -1, self.width).transpose(0, 1).double()
        where[layer] = torch.cat([where[layer], new], 1) if keep and layer in where else new

    def rotated(self, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
        half = self.width // 2
        angles = torch.tensor([[p * self.theta ** (-2 * i / self.width) for i in range(half)] for p in positions]).double()
        first, second = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], -1)

    def logits_of(self, call: AttentionCall, q: int, i: int, h: int, visible: list[int]) -> torch.Tensor:
        keys = self.rotated(self.keys[call.layer][h, visible], list(range(len(visible))))
        query = self.rotated(self.queries[call.layer][q, i][None], [len(visible) - 1])[0]
        return keys @ query * call.scaling


def heavy_hitters(sink: int, recent: int, capacity: int) -> Choose:
    """H2O: the last `recent` entries and the heaviest of the others (and the first ones, where asked for)."""

    def choose(scores: list[float], kept: list[int], rows: Any) -> list[int]:
        last = kept[len(kept) - recent :]
        first = kept[:sink]
        free = [(-s, j) for s, j in zip(scores, kept, strict=True) if j not in last and j not in first]
        heavy = [j for _, j in sorted(free)[: capacity - recent - sink]]
        return sorted(first + heavy + last)

    return choose


def sinks_and_recent(sink: int, capacity: int) -> Choose:
    """StreamingLLM: the first entries and the last ones."""
    return lambda scores, kept, rows: kept[:sink] + kept[len(kept) - (capacity - sink) :]


def window_attention(window: int, kernel: int, capacity: int) -> Choose:
    """SnapKV: mean attention of the last `window` new queries, merged over the group, max-pooled; and the last entries."""

    def choose(scores: list[float], kept: list[int], rows: list[list[dict[int, float]]]) -> list[int]:
        last, past = kept[len(kept) - window :], kept[: len(kept) - window]
        mean = [sum(row[g].get(j, 0.0) for row in rows[-window:] for g in range(len(row))) for j in past]
        reach = kernel // 2
        pooled = [max(mean[max(0, i - reach) : i + reach + 1]) for i in range(len(past))]
        best = sorted(zip([-x for x in pooled], past, strict=True))[: capacity - window]
        return sorted([j for _, j in best] + last)

    return choose


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The embedded model in float64, and tokens of a text."""
    loaded = load_model("tiny", device="cpu", dtype="float32")
    ids = loaded.tokenizer(TEXT).input_ids
    return loaded.model.double(), ids


def held(cache: CompressedCache) -> list[list[list[int]]]:
    """True positions of the entries held, ``[layer][KV head]`` of a batch of one."""
    return [[p.tolist() for p in layer.held.positions()[0]] for layer in cache.layers]


def forward(model: Any, cache: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=cache, use_cache=True).logits[0]


@pytest.mark.parametrize(
    ("policy", "choose"),
    [
        ("streaming:budget=24,sink=4,decode=evict", sinks_and_recent(4, 24)),
        ("h2o:budget=24,window=12,decode=evict", heavy_hitters(0, 12, 24)),
        ("h2o:budget=30,window=8,sink=4,decode=evict", heavy_hitters(4, 8, 30)),
    ],
)
def test_decoding_on_the_embedded_model_equals_the_papers_step_by_step(policy: str, choose: Any, tiny: Any) -> None:
    model, ids = tiny
    literal = Literal(model, Policy.parse(policy).entries(1000), choose)
    cache = CompressedCache(policy, model, keep_positions=True)
    feeds = [ids[:60], ids[60:63], *([t] for t in ids[63:130])]
    for ids_now in feeds:
        expected, found = literal.feed(ids_now), forward(model, cache, ids_now)
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        for layer, heads in enumerate(held(cache)):
            for head, positions in enumerate(heads):
                assert positions == literal.kept[layer, head]
    assert all(held(cache)[layer][head][-1] == 129 for layer in range(4) for head in range(4))


@pytest.mark.parametrize(
    ("policy", "choose"),
    [
        ("streaming:budget=24,sink=4,decode=evict,positions=cache", sinks_and_recent(4, 24)),
        ("h2o:budget=30,window=8,sink=4,decode=evict,positions=cache", heavy_hitters(4, 8, 30)),
    ],
)
def test_cache_positions_equal_keys_that_are_rotated_anew_at_every_step(policy: str, choose: Any, tiny: Any) -> None:
    model, ids = copy.deepcopy(tiny[0]), tiny[1]
    literal = LiteralCachePositions(model, Policy.parse(policy).entries(1000), choose)
    cache = CompressedCache(policy, tiny[0], keep_positions=True)
    for ids_now in [ids[:60], ids[60:63], *([t] for t in ids[63:130])]:
        expected, found = literal.feed(ids_now), forward(tiny[0], cache, ids_now)
        # The model's own angles are float32: at position 130 they are off by some 1e-5.
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        for layer, heads in enumerate(held(cache)):
            for head, positions in enumerate(heads):
                assert positions == literal.kept[layer, head]
    # It matters: with true positions the last logits are others.
    plain = CompressedCache(policy.removesuffix(",positions=cache"), tiny[0])
    for ids_now in [ids[:60], ids[60:63], *([t] for t in ids[63:130])]:
        true = forward(tiny[0], plain, ids_now)
    assert (true - expected).abs().max() > 1e-2 * expected.abs().max()


def evicting(options: str = "") -> list[Policy]:
    """Every registered method that can rank what is left while decoding, at 20 entries."""
    found = []
    for name, cls in method_classes().items():
        names = {f.name for f in dataclasses.fields(cls)}
        small = "".join(f",{k}={v}" for k, v in {"window": 6, "sink": 2}.items() if k in names)
        if cls.keeps_all or cls.simulate_only or {"heads", "plan", "file"} & names:
            continue  # those that need a file of the heads have a test of their own
        policy = Policy.parse(f"{name}:budget=20{small},decode=evict{options}")
        try:
            decoding_needs(policy)
        except ConfigError as error:
            assert "known of whole prompts only" in str(error)  # noqa: PT017
            continue
        found.append(policy)
    return found


def test_most_methods_can_decode() -> None:
    names = {policy.method.name for policy in evicting()}
    assert names >= {"window", "streaming", "h2o", "snapkv", "tova", "keydiff", "random", "adakv", "cake", "pyramidkv", "lava"}
    assert not names & {"full", "oracle", "expected", "critical", "observed"}


#: A policy of each kind for the longest runs: always the oldest goes, carried sums, similar keys, and window scores with rows that
#: are not equally long. What depends on the number of steps (rings, room, sums, positions) is theirs; a method is a scorer more.
KINDS = ("streaming", "h2o", "keydiff", "adakv")


def steps(name: str) -> int:
    """Tokens to decode: 2,000 for a policy of each kind, and for all of them where KVTOOL_LONG is set (`make test-long`)."""
    return 2000 if name in (*KINDS, "head_windows") or os.environ.get("KVTOOL_LONG") else 150


@pytest.mark.parametrize("policy", evicting(), ids=lambda policy: f"{policy.method.name}-{steps(policy.method.name)}")
def test_capacity_is_never_exceeded_while_decoding(policy: Policy, random_model: Callable[..., Any]) -> None:
    model, n = random_model("llama", num_hidden_layers=1, max_position_embeddings=4096), steps(policy.method.name)
    cache = CompressedCache(policy, model, keep_positions=True)
    forward(model, cache, tokens(0, 70))
    limits, where = cache.layers[0].store.lengths, cache.layers[0].store.keys.data_ptr()
    held_bytes = cache.count_bytes().allocated
    assert sum(limits) == 40
    for i, token in enumerate(tokens(1, n)):
        forward(model, cache, [token])
        assert cache.layers[0].store.lengths == limits, i
        assert cache.count_bytes().allocated == held_bytes
    assert cache.layers[0].store.keys.data_ptr() == where
    assert all(p == sorted(set(p)) and p[-1] < 70 + n for p in held(cache)[0])
    assert cache.get_seq_length() == 70 + n


def test_every_kind_decodes_2000_tokens() -> None:
    found = {policy.method.name for policy in evicting() if steps(policy.method.name) == 2000}
    assert found >= set(KINDS)
    assert "head_windows" in {name for name in by_heads() if steps(name) == 2000}


@pytest.mark.parametrize("interval", [1, 4, 9, 50])
def test_lazy_eviction_stays_below_the_capacity_and_above_the_protected(
    interval: int, random_model: Callable[..., Any]
) -> None:
    model = random_model("llama")
    for policy in evicting(f",interval={interval}" if interval > 1 else ""):
        if interval != 4 and policy.method.name not in (*KINDS, "pyramidkv"):
            continue  # budgets that differ by layer are the fifth kind here; every method at one interval
        cache = CompressedCache(policy, model)
        forward(model, cache, tokens(0, 70))
        limits = [layer.store.lengths for layer in cache.layers]
        least, cuts, before = policy.method.parts().selector.protected, 0, limits[0][0]
        for token in tokens(1, 60):
            forward(model, cache, [token])
            for layer, limit in zip(cache.layers, limits, strict=True):
                assert all(min(m, max(least, 1)) <= n <= m for n, m in zip(layer.store.lengths, limit, strict=True))
            now = cache.layers[0].store.lengths[0]
            cuts, before = cuts + (now <= before), now
        size = limits[0][0] - max(limits[0][0] - (interval - 1), least, 1) + 1
        assert cuts == -(-60 // size), policy


def test_a_lazy_h2o_equals_the_literal_one_that_cuts_deeper(tiny: Any) -> None:
    model, ids = tiny
    shallow, deep = heavy_hitters(0, 8, 24), heavy_hitters(0, 8, 24 - 5)
    literal = Literal(model, 24, shallow)
    cache = CompressedCache("h2o:budget=24,window=8,decode=evict,interval=6", model, keep_positions=True)
    for ids_now in [ids[:60], *([t] for t in ids[60:100])]:
        expected, found = literal.feed(ids_now), forward(model, cache, ids_now)
        literal.choose = deep
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
        assert held(cache)[1] == [literal.kept[1, head] for head in range(4)]


MODELS = {
    "gqa": ("llama", {}),
    "mha": ("llama", {"num_key_value_heads": 4}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "neox": ("gpt_neox", {}),
    "qwen2": ("qwen2", {}),
    "wide-window": ("mistral", {"sliding_window": 72}),
}


def of_kinds(policies: list[Policy], name: str) -> list[Policy]:
    """Every policy on the first model; one of each kind on the others, whose layout is what differs there."""
    return [policy for policy in policies if name == "gqa" or policy.method.name in (*KINDS, "snapkv", "random", "pyramidkv")]


def run_batch(model: Any, cache: CompressedCache, prompts: list[list[int]], fed: list[list[int]]) -> torch.Tensor:
    """Logits of the fed tokens ``[B, N, V]``: prompts with left padding, then three tokens at once, then one by one."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    logits, start, options = [], 0, {"past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), **options)
        for stop in [3, *range(4, len(fed[0]) + 1)]:
            mask = torch.cat([mask, torch.ones(len(fed), stop - start, dtype=mask.dtype)], 1)
            position = (mask.cumsum(1) - 1)[:, start - stop :]
            part = torch.tensor(fed)[:, start:stop]
            logits.append(model(part, attention_mask=mask, position_ids=position, **options).logits)
            start = stop
    return torch.cat(logits, 1)


@pytest.mark.parametrize(
    ("name", "positions"),
    [*((name, "") for name in MODELS), *((name, ",positions=cache") for name in ("gqa", "neox", "wide-window"))],
)
def test_a_row_of_a_padded_batch_equals_a_single_run(name: str, positions: str, random_model: Callable[..., Any]) -> None:
    architecture, changes = MODELS[name]
    model = random_model(architecture, **changes).double()
    prompts, fed = [tokens(0, 70), tokens(1, 33)], [tokens(50, 16), tokens(51, 16)]
    lazy = [policy for policy in evicting(",interval=5" + positions) if policy.method.name in ("h2o", "snapkv", "adakv")]
    for policy in [*of_kinds(evicting(positions), name), *lazy]:
        together = CompressedCache(policy, model, seeds=[3, 4], keep_positions=True)
        found = run_batch(model, together, prompts, fed)
        for row in range(2):
            alone = CompressedCache(policy, model, seeds=3 + row, keep_positions=True)
            expected = run_batch(model, alone, [prompts[row]], [fed[row]])[0]
            for a, b in zip(together.layers, alone.layers, strict=True):
                assert [p.tolist() for p in a.held.positions()[row]] == [p.tolist() for p in b.held.positions()[0]], policy
            assert (found[row] - expected).abs().max() <= 1e-5 * expected.abs().max(), policy


def test_forked_caches_decode_like_caches_that_ran_the_prompt_themselves(random_model: Callable[..., Any]) -> None:
    model, prompt, fed = random_model("llama"), tokens(0, 70), tokens(1, 12)
    for policy in [*evicting(), *evicting(",positions=cache")]:
        state = prefill(model, prompt, policy.method.parts().needs(), 5)
        own, fork = CompressedCache(policy, model, seeds=5), state.fork(policy, state.choose(policy))
        forward(model, own, prompt)
        for token in fed:
            assert torch.equal(forward(model, own, [token]), forward(model, fork, [token])), policy
        assert own.entries() == fork.entries()


def test_generation_runs_past_the_trained_context_with_cache_positions(tiny: Any) -> None:
    """A window of real text stays predictable at any distance; with true positions beyond the context it need not."""
    model, ids = tiny[0].float(), tiny[1]
    assert model.config.max_position_embeddings == 4224
    cache = CompressedCache("streaming:budget=64,sink=4,decode=evict,positions=cache", model)
    text, losses = ids[1:] * (4600 // len(ids) + 1), []
    forward(model, cache, ids[:1])
    with torch.no_grad():
        for start in range(0, 4560, 16):
            part = text[start : start + 17]
            logits = model(torch.tensor([part[:-1]]), past_key_values=cache, use_cache=True).logits[0]
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(part[1:]))))
    assert cache.get_seq_length() > 4500
    assert cache.entries() == [[[64] * 4]] * 4
    early, late = sum(losses[8:40]) / 32, sum(losses[-32:]) / 32
    assert late <= 1.1 * early
    model.double()


def test_sliding_window_layers_are_left_alone(random_model: Callable[..., Any]) -> None:
    model = random_model("mistral")
    for options in ("", ",positions=cache"):
        plain, cache = CompressedCache("full", model), CompressedCache(f"h2o:budget=20,window=6,decode=evict{options}", model)
        forward(model, plain, tokens(0, 70))
        forward(model, cache, tokens(0, 70))
        for token in tokens(1, 40):
            expected, found = forward(model, plain, [token]), forward(model, cache, [token])
            assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_one_row_of_a_batch_may_have_outgrown_its_sliding_window(random_model: Callable[..., Any]) -> None:
    model = random_model("mistral", sliding_window=60).double()
    prompts, fed = [tokens(0, 70), tokens(1, 33)], [tokens(50, 60), tokens(51, 60)]
    for policy in ("snapkv:budget=20,window=6,decode=evict", "h2o:budget=20,window=6,decode=evict,positions=cache"):
        cache = CompressedCache(policy, model)
        found = run_batch(model, cache, prompts, fed)
        assert all(max(layer.store.lengths[:2]) <= 60 and layer.store.lengths[2:] == [20, 20] for layer in cache.layers)
        for row in range(2):
            expected = run_batch(model, CompressedCache(policy, model), [prompts[row]], [fed[row]])[0]
            assert (found[row] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_budget_in_entries_is_a_capacity_that_a_short_prompt_grows_into(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    for policy in evicting():
        cache, plain = CompressedCache(policy, model), CompressedCache("full", model)
        expected, found = forward(model, plain, tokens(0, 12)), forward(model, cache, tokens(0, 12))
        for i, token in enumerate(tokens(1, 20)):
            if i < 9:  # 12 + 8 entries fit, and the ninth token still sees them
                assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
            expected, found = forward(model, plain, [token]), forward(model, cache, [token])
            assert cache.entries() == [[[min(20, 13 + i)] * 2]] * 2
    relative = CompressedCache("streaming:budget=50%,sink=2,decode=evict", model)
    forward(model, relative, tokens(0, 12))
    forward(model, relative, tokens(1, 3))
    assert relative.entries() == [[[6, 6]]] * 2


def test_a_wide_forward_is_cut_back_and_gives_its_room_back(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    cache = CompressedCache("h2o:budget=20,window=6,decode=evict", model)
    forward(model, cache, tokens(0, 70))
    before = cache.count_bytes()
    forward(model, cache, tokens(1, 100))
    assert cache.count_bytes() == before
    assert cache.entries() == [[[20, 20]]] * 2


def test_generate_honours_it(random_model: Callable[..., Any]) -> None:
    model, ids = random_model("llama"), torch.tensor([tokens(0, 70)])
    options = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cache = CompressedCache("tova:budget=24,decode=evict", model)
    text = model.generate(ids, past_key_values=cache, **options)[0, 70:].tolist()
    assert cache.entries() == [[[24, 24]]] * 2
    step, expected = CompressedCache("tova:budget=24,decode=evict", model), []
    logits = forward(model, step, tokens(0, 70))
    for _ in range(30):
        expected.append(int(logits[-1].argmax()))
        logits = forward(model, step, expected[-1:])
    assert text == expected


def test_what_cannot_be_done_is_one_clear_line(random_model: Callable[..., Any]) -> None:
    llama, opt = random_model("llama"), random_model("opt")
    for name in ("expected", "critical", "observed"):
        with pytest.raises(ConfigError, match="whole prompts only; remove decode=evict"):
            CompressedCache(f"{name}:budget=64,decode=evict", llama)
    with pytest.raises(ConfigError, match="the model has none; use positions=true"):
        CompressedCache("streaming:budget=24,positions=cache", opt)
    with pytest.raises(ConfigError, match="compensate=mean stands for one cut"):
        CompressedCache("h2o:budget=64,decode=evict,compensate=mean", llama)
    late = CompressedCache("streaming:budget=24,positions=cache")
    llama.set_attn_implementation("kvtool")
    forward(llama, late, tokens(0, 40))
    with pytest.raises(ConfigError, match="the model itself as CompressedCache"):
        forward(llama, late, [5])


CHUNKED = [
    ("streaming:budget=24,sink=4", sinks_and_recent(4, 24)),
    ("h2o:budget=24,window=12", heavy_hitters(0, 12, 24)),
    ("snapkv:budget=24,window=8,kernel=5", window_attention(8, 5, 24)),
]


@pytest.mark.parametrize("decode", ["", ",decode=evict"])
@pytest.mark.parametrize(("policy", "choose"), CHUNKED)
def test_prompts_in_chunks_equal_a_literal_chunk_by_chunk_reference(policy: str, choose: Any, decode: str, tiny: Any) -> None:
    # The last chunk has 10 tokens, more than the window: the literal SnapKV has no queries of earlier chunks.
    model, ids = tiny
    literal = Literal(model, 24, choose)
    for start in range(0, 106, 16):
        expected = literal.feed(ids[start : min(106, start + 16)])
    text = policy + decode + ",chunk=16"
    whole = CompressedCache(text, model, keep_positions=True)
    parts = CompressedCache(text, model, keep_positions=True)
    logits = [forward(model, whole, ids[:106])[-1], prefill_in_chunks(model, ids[:106], parts)]
    assert all((found - expected[-1]).abs().max() <= 1e-6 * expected.abs().max() for found in logits)
    want = [[literal.kept[layer, head] for head in range(4)] for layer in range(4)]
    assert held(whole) == held(parts) == want
    assert [[p.tolist() for p in whole.kept[layer][0]] for layer in range(4)] == want
    if not decode:
        literal.capacity = 10**6
    elif policy.startswith("snapkv"):
        return  # the literal one forgets the queries of earlier steps; see test_decode_views_equal_brute_force
    for token in ids[106:120]:
        expected = literal.feed([token])
        for cache in (whole, parts):
            assert (forward(model, cache, [token]) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert held(whole) == held(parts) == [[literal.kept[layer, head] for head in range(4)] for layer in range(4)]


def test_chunks_with_cache_positions_equal_the_literal_reference(tiny: Any) -> None:
    model, ids = copy.deepcopy(tiny[0]), tiny[1]
    literal = LiteralCachePositions(model, 24, heavy_hitters(4, 8, 24))
    cache = CompressedCache("h2o:budget=24,window=8,sink=4,decode=evict,positions=cache,chunk=16", tiny[0], keep_positions=True)
    for start in range(0, 90, 16):
        expected = literal.feed(ids[start : min(90, start + 16)])
    found = forward(tiny[0], cache, ids[:90])
    assert (found[-1] - expected[-1]).abs().max() <= 1e-4 * expected.abs().max()
    for token in ids[90:110]:
        expected, found = literal.feed([token]), forward(tiny[0], cache, [token])
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert held(cache) == [[literal.kept[layer, head] for head in range(4)] for layer in range(4)]


def chunkable(options: str) -> list[Policy]:
    return [policy for policy in evicting(options) if policy.method.parts().allocator.layer_local]


@pytest.mark.parametrize("name", MODELS)
def test_chunks_of_a_padded_batch_equal_single_runs_and_keep_the_budget(name: str, random_model: Callable[..., Any]) -> None:
    architecture, changes = MODELS[name]
    model = random_model(architecture, **changes).double()
    prompts, fed = [tokens(0, 70), tokens(1, 33)], [tokens(50, 12), tokens(51, 12)]
    policies = chunkable(",chunk=16")
    assert {policy.method.name for policy in policies} >= {"streaming", "h2o", "snapkv", "adakv", "tova", "keydiff", "random"}
    for policy in of_kinds(policies, name):
        together = CompressedCache(policy, model, seeds=[3, 4], keep_positions=True)
        found = run_batch(model, together, prompts, fed)
        for layer in together.layers:
            n_kv = layer.store.n_kv_heads
            assert [sum(layer.store.lengths[:n_kv]), sum(layer.store.lengths[n_kv:])] == [20 * n_kv] * 2, policy
        for row in range(2):
            alone = CompressedCache(policy, model, seeds=3 + row, keep_positions=True)
            expected = run_batch(model, alone, [prompts[row]], [fed[row]])[0]
            for a, b in zip(together.layers, alone.layers, strict=True):
                assert [p.tolist() for p in a.held.positions()[row]] == [p.tolist() for p in b.held.positions()[0]], policy
            assert (found[row] - expected).abs().max() <= 1e-5 * expected.abs().max(), policy


def test_one_chunk_as_long_as_the_prompt_is_the_plain_policy(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    for policy in chunkable(",chunk=500"):
        if policy.method.name == "random":
            continue  # draws anew at every cut
        cache = CompressedCache(policy, model, keep_positions=True)
        plain = CompressedCache(dataclasses.replace(policy, when=When()), model, keep_positions=True)
        assert torch.equal(forward(model, cache, tokens(0, 70)), forward(model, plain, tokens(0, 70)))
        assert held(cache) == [[p.tolist() for p in plain.kept[layer][0]] for layer in range(2)], policy


def test_the_prefill_peak_is_the_budget_and_a_chunk(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    cache = CompressedCache("h2o:budget=20,window=6,chunk=16", model)
    peak, ids = 0, torch.tensor([tokens(0, 300)])
    cache.prompt_length = 300
    with torch.no_grad():
        for start in range(0, 300, 16):
            model(ids[:, start : start + 16], past_key_values=cache, use_cache=True)
            stores = [row.held.store for layer in cache.layers if layer.chunks for row in layer.chunks.rows]
            peak = max(peak, sum(store.keys.shape[0] for store in stores))
    assert 0 < peak <= 2 * 2 * (20 + 16)  # layers, heads
    assert cache.entries() == [[[20, 20]]] * 2


def test_a_sliding_window_comes_through_chunks_unchanged(random_model: Callable[..., Any]) -> None:
    model = random_model("mistral")
    plain, cache = CompressedCache("full", model), CompressedCache("h2o:budget=20,window=6,chunk=24,decode=evict", model)
    expected, found = forward(model, plain, tokens(0, 70)), forward(model, cache, tokens(0, 70))
    for token in [None, *tokens(1, 30)]:
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
        if token is not None:
            expected, found = forward(model, plain, [token]), forward(model, cache, [token])


def test_generate_honours_chunks_and_a_question_after_them(random_model: Callable[..., Any]) -> None:
    model, prompt = random_model("llama"), tokens(0, 70)
    options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = "snapkv:budget=30%,window=6,chunk=16"
    cache = CompressedCache(text, model)
    made = model.generate(torch.tensor([prompt]), past_key_values=cache, **options)[0, 70:].tolist()
    assert cache.entries() == [[[21 + 9] * 2]] * 2
    step = CompressedCache(text, model)
    logits, expected = prefill_in_chunks(model, prompt, step), []
    for _ in range(10):
        expected.append(int(logits.argmax()))
        logits = forward(model, step, expected[-1:])[-1]
    assert made == expected
    one, two = CompressedCache(text, model, compress_at_length=60), CompressedCache(text, model)
    forward(model, two, prompt[:60])
    assert torch.allclose(forward(model, one, prompt)[-1], forward(model, two, prompt[60:])[-1], rtol=1e-4, atol=1e-4)
    assert one.entries() == two.entries() == [[[18 + 10] * 2]] * 2


def test_what_chunks_cannot_do_is_one_clear_line(random_model: Callable[..., Any]) -> None:
    model = random_model("llama")
    with pytest.raises(ConfigError, match="budgets depend on one layer only"):
        CompressedCache("pyramidkv:budget=40,window=6,chunk=16", model)
    with pytest.raises(ConfigError, match="needs the model"):
        CompressedCache("snapkv:budget=40,window=6,chunk=16")
    with pytest.raises(ConfigError, match="whole prompts only; remove chunk="):
        CompressedCache("expected:budget=40,chunk=16", model)
    with pytest.raises(ConfigError, match="has no chunk size"):
        prefill_in_chunks(model, [5, 6], CompressedCache("window:budget=40", model))
    used = CompressedCache("window:budget=40,chunk=16", model)
    forward(model, used, tokens(0, 20))
    with pytest.raises(ConfigError, match="has seen 20 tokens"):
        prefill_in_chunks(model, [5, 6], used)
    padded = CompressedCache("window:budget=40,chunk=16", model, prompt_length=60)
    mask, ids = torch.tensor([[0] * 5 + [1] * 15, [1] * 20]), torch.tensor([tokens(0, 20), tokens(1, 20)])
    with pytest.raises(ConfigError, match="without padding only"):
        model(ids, attention_mask=mask, past_key_values=padded, use_cache=True)


def test_decode_views_equal_brute_force(random_model: Callable[..., Any]) -> None:
    """Statistics of ragged rows while decoding, against loops over the queries and keys that went in."""
    model = random_model("llama").double()
    cache = CompressedCache("adakv:budget=24,window=6,decode=evict", model, keep_positions=True)
    # The first layer's queries do not depend on what is kept: the plain model has the same ones.
    ids, asked = [*tokens(0, 50), *tokens(1, 12)], []

    def spy(call: AttentionCall) -> torch.Tensor:
        asked.append(call.queries[0])
        return dense_attention(call)

    with torch.no_grad(), attention_handler(model, spy):
        model(torch.tensor([ids]), use_cache=False)
    for part in [ids[:50], ids[50:53], *([t] for t in ids[53:])]:
        forward(model, cache, part)
    held_layer = cache.layers[0].held
    assert torch.allclose(held_layer.eviction.queries[0], asked[0][:, -6:], atol=1e-9)
    assert len(set(held_layer.store.lengths)) == 2  # ragged: one view per head
    present = held_layer.present(0.25)
    for view in held_layer.eviction.views(present, [0, 0]):
        head = view.rows[0]
        row = list(held_layer.store.dense_rows())[head]
        queries, where = asked[0][head * 2 : head * 2 + 2, -6:], row.positions.tolist()
        assert (view.n_kv_heads, view.n_heads, view.seq_len) == (1, 2, len(where))
        for g in range(2):
            weights = torch.zeros(6, len(where)).double()
            for i in range(6):
                own = 62 - 6 + i
                logits = torch.tensor([float(k @ queries[g, i]) * 0.25 for k in row.keys])
                logits[[p > own for p in where]] = float("-inf")
                weights[i] = logits.softmax(0)
            expected = {"window_mean/6": weights.mean(0), "window_var/6": weights.var(0, correction=0)}
            expected |= {"window_max/6": weights.amax(0), "last": weights[-1], "window_mean/2": weights[-2:].mean(0)}
            for name, value in expected.items():
                assert torch.allclose(view.statistic(name)[g].double(), value, atol=1e-5), name
        assert torch.allclose(view.statistic("key_norm")[0].double(), row.keys.norm(dim=-1), atol=1e-5)
        with pytest.raises(ConfigError, match="without declaring it"):
            view.statistic("output_norm")


def heads_file(folder: Path, n_layers: int = 2) -> str:
    """Kinds and gates of a model of up to 2 layers with 4 query and 2 KV heads."""
    heads = [
        {"layer": layer, "head": h, "importance": 1.0 + h, "retrieval": 0.5 + h} for layer in range(n_layers) for h in range(4)
    ]
    kinds = ["positional", "gathering", "mixed", "gathering"]
    gates = [0.1, 0.9, 0.2, 0.8]
    kv_heads = [
        {"layer": i // 2, "head": i % 2, "kind": kinds[i], "confidence": 1.0, "importance": 1.0, "retrieval": gates[i]}
        for i in range(2 * n_layers)
    ]
    value = {
        "schema": "kvtool.heads/1",
        "model": {"fingerprint": "0", "model_id": "random"},
        "n_layers": n_layers,
        "n_heads": 4,
    }
    path = folder / "heads.json"
    path.write_text(json.dumps({**value, "n_kv_heads": 2, "heads": heads, "kv_heads": kv_heads}))
    return str(path)


def by_heads() -> list[str]:
    """Methods that read a heads file; ``optimal`` needs a plan beside it."""
    return [name for name, cls in method_classes().items() if "heads" in cls.__dataclass_fields__ and name != "optimal"]


@pytest.mark.parametrize("budget", ["own", "20"])
def test_capacity_is_never_exceeded_with_a_plan(
    budget: str, random_model: Callable[..., Any], toy_budgets: Callable[..., Path]
) -> None:
    model = random_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    cache = CompressedCache(f"plan:file={toy_budgets(1, 4, 2)},budget={budget},decode=evict", model)
    forward(model, cache, tokens(0, 100))
    limits = cache.entries()
    # At the plan's own length its entries are the limits, however many tokens follow.
    assert sum(n for layer in limits for n in layer[0]) == 40
    for token in tokens(1, 300):
        forward(model, cache, [token])
        assert cache.entries() == limits


@pytest.mark.parametrize("name", by_heads(), ids=lambda name: f"{name}-{steps(name)}")
def test_capacity_is_never_exceeded_with_head_budgets(name: str, random_model: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("llama", num_hidden_layers=1, max_position_embeddings=4096)
    names = method_classes()[name].__dataclass_fields__
    small = "".join(f",{k}={v}" for k, v in {"window": 6, "sink": 2, "recent": 6}.items() if k in names)
    cache = CompressedCache(f"{name}:budget=20,heads={heads_file(tmp_path, 1)}{small},decode=evict", model)
    forward(model, cache, tokens(0, 70))
    limits, where = cache.entries(), [layer.store.keys.data_ptr() for layer in cache.layers]
    assert sum(n for layer in limits for n in layer[0]) <= 40
    for token in tokens(1, steps(name)):
        forward(model, cache, [token])
        assert cache.entries() == limits
    assert [layer.store.keys.data_ptr() for layer in cache.layers] == where


def test_windows_of_head_kinds_roll_and_short_prompts_grow_into_them(random_model: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("llama")
    text = f"head_windows:heads={heads_file(tmp_path)},positional=6,mixed=12,gathering=30,sink=2,decode=evict"
    for n_prompt in (10, 70):
        cache = CompressedCache(text, model, keep_positions=True)
        forward(model, cache, tokens(0, n_prompt))
        for i, token in enumerate(tokens(1, 50)):
            forward(model, cache, [token])
            seen = n_prompt + i + 1
            for layer, sizes in enumerate([(8, 32), (14, 32)]):
                for head, size in enumerate(sizes):
                    size = min(size, seen)
                    expected = [*range(2), *range(seen - size + 2, seen)] if size < seen else list(range(seen))
                    assert held(cache)[layer][head] == expected


def test_retrieval_heads_grow_while_streaming_heads_roll(random_model: Callable[..., Any], tmp_path: Path) -> None:
    model = random_model("llama")
    cache = CompressedCache(f"duo:heads={heads_file(tmp_path)},sink=2,recent=10,decode=evict", model)
    forward(model, cache, tokens(0, 70))
    for i, token in enumerate(tokens(1, 60)):
        forward(model, cache, [token])
        assert cache.entries() == [[[12, 71 + i]]] * 2
    plain = CompressedCache("duo:heads=" + heads_file(tmp_path) + ",sink=500,recent=500,decode=evict", model)
    full = CompressedCache("full", model)
    for ids in [tokens(0, 70), *([t] for t in tokens(1, 60))]:
        expected, found = forward(model, full, ids), forward(model, plain, ids)
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
