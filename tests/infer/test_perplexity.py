"""Perplexity through the cache: chunks against token by token, H2O against its literal loop, and the run as users see it."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtool.analysis.perplexity import effective_contexts, read_perplexity, write_perplexity
from kvtool.attention import AttentionCall, attention_handler
from kvtool.data.texts import Document, load_documents
from kvtool.errors import ConfigError, DataError, MissingDependencyError
from kvtool.executors.execution import Execution, Shard
from kvtool.infer.perplexity import PerplexityRun, run_perplexity
from kvtool.infer.perplexity_bands import Rolling
from kvtool.infer.perplexity_plan import PerplexityConfig, as_it_runs, cut_segments
from kvtool.infer.perplexity_score import CHUNKS, STEPS, position_bins, read_segments, sum_up
from kvtool.models import LoadedModel, load_model
from kvtool.policies import Policy

TEXT = (
    "The river ran past the old mill and the children counted boats. The secret number of the calm wizard is 48213. "
    "In the morning the baker opened his shop, and the smell of bread went down the street. Nobody spoke of the storm. "
)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("tiny", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def ids(tiny: LoadedModel) -> torch.Tensor:
    """Two segments of 64 tokens."""
    text = load_documents(["walden"])[0].text
    return torch.tensor(tiny.tokenizer(text[2000:3000]).input_ids[:128]).view(2, 64)


@pytest.fixture
def heads(tmp_path: Path, tiny: LoadedModel) -> str:
    """A heads file that gives the heads of every layer different kinds and confidences."""
    kinds, sure = ["positional", "mixed", "gathering", "mixed"], [0.9, 0.5, 0.8, 0.95]
    places = [(layer, head) for layer in range(4) for head in range(4)]
    value = {
        "schema": "kvtool.heads/1",
        "model": {"fingerprint": tiny.info.fingerprint, "model_id": "tiny"},
        "n_layers": 4,
        "n_heads": 8,
        "n_kv_heads": 4,
        "heads": [{"layer": layer, "head": head} for layer in range(4) for head in range(8)],
        "kv_heads": [
            {"layer": layer, "head": head, "kind": kinds[(layer + head) % 4], "confidence": sure[head]}
            for layer, head in places
        ],
    }
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(value))
    return str(path)


ROLLING = [
    "B_streaming_16",
    "A_window_32",
    "B_streaming_16",
    "streaming:budget=24,sink=4,decode=evict,interval=7",
    "streaming:budget=9,sink=8,decode=evict",
    "streaming:budget=8,sink=8,decode=evict",
    "window:budget=1entries,decode=evict",
    "B_streaming_16:positions=cache",
    "streaming:budget=30,sink=6,decode=evict,positions=cache,interval=20",
]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of a token's loss, relative to the mean loss."""
    return float((found - expected).abs().max() / expected.mean())


@pytest.mark.parametrize(("text", "prompt"), [(text, 1 if i % 4 else 41) for i, text in enumerate(ROLLING)])
def test_chunks_equal_token_by_token(text: str, prompt: int, tiny: LoadedModel, ids: torch.Tensor) -> None:
    policy = Policy.parse(text)
    fast = read_segments(tiny, policy, ids, prompt=prompt)
    slow = read_segments(tiny, policy, ids, prompt=prompt, chunks=False)
    assert (fast.how, slow.how) == (CHUNKS, STEPS)
    assert torch.equal(fast.nll.isnan(), slow.nll.isnan())
    assert int(fast.nll.isnan().sum()) == 2 * (prompt - 1)
    assert relative(fast.nll[:, prompt - 1 :], slow.nll[:, prompt - 1 :]) <= 1e-5
    assert fast.entries == slow.entries
    assert (fast.kv_bytes, fast.kv_bytes_full) == (slow.kv_bytes, slow.kv_bytes_full)


@pytest.mark.parametrize("name", ["G_conf0.7_base32", "I_pos8_mix30_g12"])
def test_windows_per_head_in_chunks_equal_token_by_token(name: str, heads: str, tiny: LoadedModel, ids: torch.Tensor) -> None:
    policy = Policy.parse(f"{name}:heads={heads}")
    fast, slow = (read_segments(tiny, policy, ids, chunks=chunks) for chunks in (True, False))
    assert (fast.how, slow.how) == (CHUNKS, STEPS)
    assert relative(fast.nll, slow.nll) <= 1e-5
    assert fast.entries == slow.entries
    assert len({n for layer in fast.entries for row in layer for n in row}) > 1


MODELS = {
    "gqa": ("llama", {}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "neox": ("gpt_neox", {}),
    "wide-window": ("mistral", {"sliding_window": 40}),
    "narrow-window": ("mistral", {"sliding_window": 10}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    "policy", ["streaming:budget=20,sink=4,decode=evict", "streaming:budget=20,decode=evict,positions=cache"]
)
def test_chunks_are_exact_in_float64_on_other_models(kind: str, policy: str, random_model: Callable[..., Any]) -> None:
    name, options = MODELS[kind]
    model = random_model(name, **options).double()
    loaded = LoadedModel(model, None, None)  # type: ignore[arg-type]
    tokens = torch.randint(3, 90, (2, 70), generator=torch.Generator().manual_seed(0))
    for prompt in (23,) if kind in ("gqa", "wide-window") else (1,):
        fast, slow = (read_segments(loaded, Policy.parse(policy), tokens, prompt=prompt, chunks=c) for c in (True, False))
        # Rotation tables are float32 in all models: with cache positions both ways round them differently.
        limit = 1e-5 if "cache" in policy else 1e-12
        assert relative(fast.nll[:, prompt - 1 :], slow.nll[:, prompt - 1 :]) <= limit
        assert fast.entries == slow.entries
        assert fast.how == (STEPS if "window" in kind and "cache" in policy else CHUNKS)


def test_the_full_cache_is_a_plain_forward(tiny: LoadedModel, ids: torch.Tensor) -> None:
    reading = read_segments(tiny, Policy.parse("full"), ids)
    with torch.no_grad():
        losses = tiny.model(ids).logits[:, :-1].double().log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    assert relative(reading.nll, -losses) <= 1e-5
    assert reading.kv_bytes == reading.kv_bytes_full == 63 * 2 * 4 * 4 * 32 * 4
    assert reading.mean_entries == 63


class LiteralH2O:
    """H2O as the paper's algorithm writes it, one token at a time in float64: add up attention, drop the lightest old entry."""

    def __init__(self, model: Any, recent: int, sink: int, capacity: int) -> None:
        from transformers import DynamicCache

        self.model, self.recent, self.sink, self.capacity = model, recent, sink, capacity
        self.cache, self.heavy = DynamicCache(), {}  # type: ignore[var-annotated]

    def loss(self, ids: list[int]) -> list[float]:
        found = []
        for token, successor in itertools.pairwise(ids):
            with torch.no_grad(), attention_handler(self.model, self.attend):
                out = self.model(torch.tensor([[token]]), past_key_values=self.cache, use_cache=True).logits[0, -1]
            found.append(-float(out.double().log_softmax(-1)[successor]))
        return found

    def attend(self, call: AttentionCall) -> torch.Tensor:
        group = call.queries.shape[1] // call.keys.shape[1]
        out = torch.empty_like(call.queries)
        for head in range(call.keys.shape[1]):
            heavy: dict[int, float] = self.heavy.setdefault((call.layer, head), {})
            heavy[call.keys.shape[2] - 1] = 0.0
            visible = sorted(heavy)
            for q in range(head * group, (head + 1) * group):
                logits = call.keys[0, head, visible].double() @ call.queries[0, q, 0].double() * call.scaling
                weights = torch.softmax(logits, 0)
                out[0, q, 0] = (weights @ call.values[0, head, visible].double()).to(out.dtype)
                for j, weight in zip(visible, weights.tolist(), strict=True):
                    heavy[j] += weight / group
            if len(visible) > self.capacity:
                free = visible[self.sink : len(visible) - self.recent]
                del heavy[min(free, key=lambda j: (heavy[j], -j))]
        return out


def test_h2o_equals_its_literal_loop(tiny: LoadedModel, ids: torch.Tensor) -> None:
    model = load_model("tiny", device="cpu", dtype="float32")
    model.model.double()
    expected = LiteralH2O(model.model, recent=8, sink=2, capacity=24).loss(ids[0].tolist())
    found = read_segments(model, Policy.parse("h2o_2_8_24"), ids[:1])
    assert found.how == STEPS
    assert found.nll[0].tolist() == pytest.approx(expected, rel=1e-7)
    # And it is not what another policy of that size would give.
    other = read_segments(model, Policy.parse("streaming:budget=24,sink=2,decode=evict"), ids[:1])
    assert float((other.nll - found.nll).abs().max()) > 0.01


def test_side_by_side_is_one_by_one(tiny: LoadedModel, ids: torch.Tensor) -> None:
    for text in ("h2o_2_8_24", "random:budget=20,window=4,decode=evict"):
        both = read_segments(tiny, Policy.parse(text), ids[:, :40], seeds=[1, 2])
        single = [read_segments(tiny, Policy.parse(text), ids[i : i + 1, :40], seeds=[i + 1]) for i in range(2)]
        assert relative(both.nll, torch.cat([reading.nll for reading in single])) <= 1e-5


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 9), st.integers(0, 20), st.integers(1, 12), st.lists(st.integers(1, 15), min_size=1, max_size=5))
def test_a_rolling_head_holds_what_a_literal_list_holds(sink: int, more: int, interval: int, parts: list[int]) -> None:
    limit = max(1, sink + more)
    target = min(limit, max(limit - (interval - 1), max(1, sink)))
    rolling, held, sizes = Rolling(sink, limit, target), 0, []
    for n in parts:
        attended, held = rolling.advance(held, n)
        sizes += attended
    entries: list[int] = []
    for position in range(sum(parts)):
        entries.append(position)
        assert sizes[position] == len(entries)
        if len(entries) > limit:
            first = entries[: min(sink, target)]
            entries = first + entries[len(entries) - (target - len(first)) :]
    assert held == len(entries)


def test_sums_and_bins_cover_every_token_once() -> None:
    assert position_bins(10) == [(1, 2), (2, 4), (4, 8), (8, 10)]
    assert position_bins(9) == [(1, 2), (2, 4), (4, 8), (8, 9)]
    nll = torch.arange(1.0, 10.0, dtype=torch.float64)  # token i has i tokens before it, and the loss i
    hits = nll > 5
    scores = sum_up(nll, hits, 1)
    assert (scores.n, scores.nll, scores.hits) == (9, 45.0, 4)
    assert scores.bins == [[1, 2, 1, 1.0, 0], [2, 4, 2, 5.0, 0], [4, 8, 4, 22.0, 2], [8, 10, 2, 17.0, 2]]
    late = sum_up(nll, hits, 3)
    assert (late.n, late.nll) == (7, 42.0)
    assert late.bins[0] == [2, 4, 1, 3.0, 0]


def config(**options: Any) -> PerplexityConfig:
    return PerplexityConfig(**{"text": ("toy",), "model": "tiny", "length": 60, "segments": 3, "batch": 2, **options})


DOCUMENTS = [Document("toy", TEXT * 6)]


def run(tiny: LoadedModel, out: Path, policies: list[str], execution: Execution | None = None, **options: Any) -> PerplexityRun:
    chosen = [Policy.parse(text) for text in policies]
    return run_perplexity(config(**options), tiny, DOCUMENTS, chosen, out, *([execution] if execution else []))


def records(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in found]


POLICIES = ["B_streaming_8", "h2o_2_8_24", "window:budget=20%"]
FEW = ["B_streaming_8", "window:budget=20%", "tova:budget=30"]


def test_a_run_its_table_and_its_files(tiny: LoadedModel, tmp_path: Path) -> None:
    made = run(tiny, tmp_path, POLICIES)
    assert (made.n_segments, made.n_units, made.n_reused, made.n_missing) == (3, 12, 0, 0)
    result = read_perplexity(tmp_path, within=5.0)
    write_perplexity(result)
    rows = {row.policy: row for row in result.rows}
    assert next(iter(rows)) == "full"
    mine = [r for r in records(tmp_path) if r["policy"] == "window:budget=20%"]
    assert {r["ran"] for r in mine} == {"window:budget=12,decode=evict"}
    row = rows["window:budget=20%"]
    assert row.perplexity is not None
    assert row.ratio is not None
    total, n = sum(r["nll"] for r in mine), sum(r["n"] for r in mine)
    assert (row.n_tokens, row.entries) == (n, 12.0)
    assert n == 3 * 59
    assert row.perplexity.mean == pytest.approx(math.exp(total / n))
    base = sum(r["nll"] for r in records(tmp_path) if r["policy"] == "full")
    assert row.ratio.mean == pytest.approx(math.exp((total - base) / n))
    assert row.ratio.low <= row.ratio.mean <= row.ratio.high
    assert rows["streaming:budget=12,decode=evict"].study == "streaming_4_8, B_streaming_8"
    assert "h2o_2_8_24" in result.text()
    assert "retentions are of the 60 tokens" in result.text()
    assert {path.name for path in tmp_path.iterdir()} >= {
        *(
            "perplexity.md",
            "perplexity.json",
            "perplexity.csv",
            "perplexity_by_position.csv",
            "perplexity.png",
            "perplexity.svg",
            "perplexity.pdf",
        )
    }
    json.loads((tmp_path / "perplexity.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    early = [b for b in result.bins if b.policy == "streaming:budget=12,decode=evict" and b.stop <= 13]
    assert early
    assert all(b.ratio.mean == pytest.approx(1.0, abs=1e-5) for b in early)


def test_a_stopped_run_and_shards_give_the_same_records(tiny: LoadedModel, tmp_path: Path) -> None:
    whole, again, shards = (tmp_path / name for name in ("whole", "again", "shards"))
    run(tiny, whole, FEW, length=24)
    run(tiny, again, FEW, length=24)
    assert records(whole) == records(again)
    lines = (again / "records.jsonl").read_text().splitlines(keepends=True)
    (again / "records.jsonl").write_text("".join(lines[:5]) + lines[5][:40])  # a kill in the middle of a write
    assert run(tiny, again, FEW, length=24).n_reused == 5
    assert records(whole) == records(again)
    for i in range(2):
        left = run(tiny, shards, FEW, Execution(Shard(i, 2)), length=24)
    assert left.n_missing == 0
    assert records(whole) == records(shards)
    with pytest.raises(ConfigError, match="another configuration"):
        run(tiny, again, FEW, length=50)


def test_segments_overlap_without_counting_twice(tiny: LoadedModel) -> None:
    whole = tiny.tokenizer(TEXT * 6, add_special_tokens=False).input_ids
    cut = cut_segments(DOCUMENTS, tiny.tokenizer, config(stride=20, segments=0))
    n_own = next(i for i in range(3) if list(cut.segments[0].ids[i:]) == whole[: 60 - i])
    counted: list[int] = []
    for segment in cut.segments:
        assert list(segment.ids[n_own:]) == whole[segment.start : segment.start + 60 - n_own]
        counted += range(segment.start + segment.first - n_own, segment.start + 60 - n_own)
    assert counted == list(range(1 - n_own, counted[-1] + 1))
    few = cut_segments(DOCUMENTS, tiny.tokenizer, config(segments=2))
    assert len(few.segments) == 2 < few.n_available
    with pytest.raises(DataError, match="a segment needs"):
        cut_segments(DOCUMENTS, tiny.tokenizer, config(length=100_000))


def test_policies_as_they_run() -> None:
    assert str(as_it_runs(Policy.parse("h2o:budget=50%,window=4"), config()).policy) == "h2o:budget=30,window=4,decode=evict"
    assert str(as_it_runs(Policy.parse("h2o:budget=50%,window=4"), config(prompt=20)).policy) == "h2o:budget=50%,window=4"
    cached = as_it_runs(Policy.parse("B_streaming_8"), config(positions="cache"))
    assert cached.policy.when.positions == "cache"
    assert as_it_runs(Policy.parse("h2o:budget=10"), config()).impossible is not None
    for text, why in (
        ("snapkv:budget=20,window=8,compensate=mean,block=4", "stands for one cut"),
        ("snapkv:budget=20,window=8,quant=int8", "quant=int8"),
        ("snapkv:budget=20,window=8,chunk=16", "about prompts"),
        ("expected:budget=20", "whole prompts only"),
    ):
        with pytest.raises(ConfigError, match=why):
            as_it_runs(Policy.parse(text), config())
    for options in ({"prompt": 60}, {"skip": 60}, {"length": 2}, {"batch": 0}):
        with pytest.raises(ConfigError, match="perplexity"):
            config(**options)


def test_a_prompt_is_compressed_and_the_rest_grows(tiny: LoadedModel, ids: torch.Tensor, tmp_path: Path) -> None:
    from kvtool.infer.generate import feed, prefill, score_logits

    policy = Policy.parse("snapkv:budget=10,window=4")
    row = ids[0, :60].tolist()
    reading = read_segments(tiny, policy, ids[:1, :60], prompt=40)
    state = prefill(tiny.model, row[:40], policy.needs(), 0)
    logits = feed(tiny.model, state.fork(policy, state.choose(policy)), row[40:59])
    expected = score_logits(torch.cat([state.logits[None], logits]), row[40:])
    assert reading.nll[0, 39:].tolist() == pytest.approx(expected.nll, rel=1e-4)
    assert reading.entries[0][0] == [29] * 4
    run(tiny, tmp_path, ["snapkv:budget=10,window=4"], prompt=40)
    assert {r["n"] for r in records(tmp_path)} == {20}


def test_what_never_evicts_is_said(tiny: LoadedModel, tmp_path: Path) -> None:
    run(tiny, tmp_path, ["h2o_2_8_64", "window:budget=2"])
    result = read_perplexity(tmp_path)
    assert "never evicts, so equals the full cache: h2o:budget=64,window=8,sink=2,decode=evict" in result.text()
    assert result.enough["window:decode=evict"] is None if "window:decode=evict" in result.enough else True


def test_longer_than_the_model_was_made_for(tiny: LoadedModel, tmp_path: Path) -> None:
    import dataclasses

    short = dataclasses.replace(tiny, info=dataclasses.replace(tiny.info, max_positions=40))
    made = run(short, tmp_path, ["B_streaming_8"], positions="cache")
    assert "go beyond the 40 positions" in made.notes[0]
    assert "go beyond the 40 positions" in read_perplexity(tmp_path).text()


def test_effective_context_is_the_size_from_which_on_nothing_is_lost() -> None:
    from kvtool.analysis.perplexity import PerplexityRow
    from kvtool.analysis.statistics import Interval

    one = Interval(1.0, 1.0, 1.0)

    def row(method: str, entries: float, excess: float) -> PerplexityRow:
        return PerplexityRow(
            method, method, "", "ok", None, 1, 9, entries, one, one, one, one, excess, 1.0, "chunks", False, False
        )

    rows = [row("a", 16, 0.01), row("a", 32, 0.2), row("a", 64, 0.02), row("a", 128, 0.0), row("b", 8, 1.0), row("b", 16, 0.9)]
    assert effective_contexts(rows, 0.05) == {"a": 64, "b": None}


def test_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("Hello", encoding="utf-8")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9 au lait")
    (tmp_path / "c.txt").write_text(" \n")
    assert load_documents([str(tmp_path / "a.txt")])[0].text == "Hello"
    assert load_documents(["walden"])[0].name == "walden"
    for name, message in (("b.txt", "not UTF-8 .byte 3"), ("c.txt", "is empty"), ("no.txt", "cannot be read")):
        with pytest.raises(DataError, match=message):
            load_documents([str(tmp_path / name)])
    with pytest.raises(ConfigError, match="Did you mean 'walden'"):
        load_documents(["waldenn"])
    with pytest.raises(ConfigError, match="given twice"):
        load_documents(["walden", "walden"])
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"kvtool\[hub\]"):
        load_documents(["wikitext"])


def test_the_hub_is_asked_for_the_right_data_and_its_trouble_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is not needed to test what is asked of it."""
    import types

    def load(name: str, part: str | None, *, split: str) -> list[dict[str, str]]:
        if name == "emozilla/pg19-test":
            return [{"short_book_title": t, "text": f"Book {t}"} for t in "ABC"]
        raise ConnectionError("offline\nmode")

    monkeypatch.setitem(__import__("sys").modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert [(d.name, d.text) for d in load_documents(["pg19:2"])] == [("pg19-000 A", "Book A"), ("pg19-001 B", "Book B")]
    with pytest.raises(DataError, match="offline mode") as caught:
        load_documents(["wikitext"])
    assert "\n" not in str(caught.value)
