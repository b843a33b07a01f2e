"""Stress tests: the order of runs, what a run counts and times, endless decoding, out of memory as a row, resuming."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from kvtool.attention import AttentionCall, Handler, watch_attention
from kvtool.cli import cli
from kvtool.errors import ConfigError
from kvtool.infer import stress, stress_memory, stress_report
from kvtool.infer.bandwidth import Bandwidth, measure_bandwidth
from kvtool.infer.generate import prefill, score_answer
from kvtool.infer.stress_memory import PeakMeter, free_bytes, needed_bytes
from kvtool.infer.stress_plan import StressConfig, doubling, endless_policies, rounds, too_long, with_full
from kvtool.infer.stress_prompts import Book
from kvtool.infer.stress_run import ATTENTION_STEPS, WARM_STEPS, Bench, endless, timed_run
from kvtool.models import LoadedModel, load_model
from kvtool.policies import Policy

MODEL = "shape:llama-3m,layers=2,context=4096"
SNAP = Policy.parse("snapkv:window=4,kernel=3,budget=10%")
STREAM = Policy.parse("streaming:budget=16,decode=evict,positions=cache")
SPEED = Bandwidth(1e9, {"sum": 1e9}, 1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def book(loaded: LoadedModel) -> Book:
    return Book.read(loaded)


@pytest.fixture(autouse=True)
def _one_book(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cutting the book into tokens takes longer than these tests' models."""
    monkeypatch.setattr(stress.Book, "read", classmethod(lambda cls, loaded: book))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of records: drawing, and collecting garbage, take longer than measuring here."""
    monkeypatch.setattr(stress_memory.gc, "collect", lambda: 0)
    for name in ("draw_series", "draw_endless"):
        monkeypatch.setattr(stress_report, name, lambda *args: None)


def bench(loaded: LoadedModel, n_new: int = 4) -> Bench:
    return Bench.of(loaded, n_new, "auto", SPEED)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


class TestPlan:
    def test_doubling(self) -> None:
        assert list(doubling(3, 24)) == [3, 6, 12, 24]
        assert list(doubling(3, 23)) == [3, 6, 12]
        assert list(doubling(5, 4)) == []

    def test_rounds(self) -> None:
        config = StressConfig("m", length=64, max_length=128, batch=2, max_batch=8, repeats=2)
        found = list(rounds(config, with_full([SNAP, SNAP])))
        assert [(r[0].series, r[0].length, r[0].batch, r[0].repeat) for r in found] == [
            *(("length", n, 2, k) for n in (64, 128) for k in (0, 1)),
            *(("batch", 64, b, k) for b in (2, 4, 8) for k in (0, 1)),
        ]
        assert {tuple(sorted((str(run.policy), run.again) for run in runs)) for runs in found} == {
            (("full", False), ("full", True), (str(SNAP), False))
        }
        assert [str(runs[0].policy) for runs in found[:2]] == ["full", str(SNAP)]
        keys = [run.key for runs in found for run in runs]
        assert len(set(keys)) == len(keys) == 30

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"length": 1}, "length=1"),
            ({"repeats": 0}, "repeats=0"),
            ({"max_length": 100}, "max_length=100"),
            ({"n_new": 1}, "n_new"),
        ],
    )
    def test_wrong_values(self, options: dict[str, int], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            StressConfig("m", **options)  # type: ignore[arg-type]

    def test_endless_needs_eviction(self) -> None:
        assert endless_policies([SNAP, STREAM]) == [STREAM]
        with pytest.raises(ConfigError, match="decode=evict"):
            endless_policies([SNAP])

    def test_learned_positions_end(self) -> None:
        info = load_model("shape:llama-3m,layers=1,context=64", device="cpu").info
        assert too_long(info, False, 10**6) is None
        assert too_long(info, True, 64) is None
        assert "context=N" in (too_long(info, True, 65) or "")


class TestRun:
    def test_figures(self, loaded: LoadedModel, book: Book) -> None:
        prompt = book.batch(3, 50, 0, CPU)
        found = timed_run(bench(loaded), Policy.parse("full"), prompt)
        per_entry, rows = 2 * 64 * 4, 3 * 2 * 2  # keys and values, float32; sequences x KV heads x layers
        assert found["entries"] == 50
        assert found["retention"] == 1.0
        assert found["kv_bytes_prompt_end"] - found["slack_bytes"] == 50 * rows * per_entry
        assert found["kv_bytes_read"] == (50 + WARM_STEPS + 2) * rows * per_entry
        assert len(found["step_s"]) == 4
        assert found["ttft_s"] == pytest.approx(found["prefill_s"] + found["compress_s"])
        assert 0 < found["compress_s"] < found["ttft_s"]
        assert found["attention_s"] > 0
        assert found["kernel"] == "sdpa-buckets"
        small = timed_run(bench(loaded), SNAP, prompt)
        assert small["entries"] == 5
        assert small["kv_bytes_prompt_end"] - small["slack_bytes"] == 5 * rows * per_entry

    def test_tokens_are_those_of_plain_generation(self, loaded: LoadedModel, book: Book) -> None:
        from kvtool.infer.cache import CompressedCache

        prompt, this = book.batch(2, 40, 0, CPU), bench(loaded)
        for policy in (Policy.parse("full"), SNAP, Policy.parse("snapkv:window=4,budget=8,chunk=16")):
            cache = this.new_cache(policy, 2, 40)
            tokens = [this.prefill(cache, prompt)]
            for _ in range(6):
                tokens.append(this.step(cache, tokens[-1]))
            kept = CompressedCache(policy, loaded.model, seeds=[0, 1])
            plain = loaded.model.generate(
                prompt,
                max_new_tokens=7,
                do_sample=False,
                pad_token_id=0,
                attention_mask=torch.ones_like(prompt),
                past_key_values=None if policy.method.keeps_all else kept,
            )
            assert torch.equal(torch.cat(tokens, 1), plain[:, 40:]), policy

    def test_a_watch_sees_every_call_and_ends(self, loaded: LoadedModel) -> None:
        seen: list[int] = []

        def watch(handler: Handler, call: AttentionCall) -> torch.Tensor:
            seen.append(call.layer)
            return handler(call)

        ids = torch.arange(9)[None]
        before = loaded.model(input_ids=ids).logits
        with watch_attention(watch):
            inside = loaded.model(input_ids=ids).logits
        assert seen == [0, 1]
        assert torch.equal(before, inside)
        with (
            pytest.raises(RuntimeError, match="boom"),
            watch_attention(lambda handler, call: (_ for _ in ()).throw(RuntimeError("boom"))),
        ):
            loaded.model(input_ids=ids)
        loaded.model(input_ids=ids)
        assert seen == [0, 1]

    def test_share_of_the_limit(self, loaded: LoadedModel) -> None:
        import dataclasses

        this = dataclasses.replace(bench(loaded), cache_bytes=1000)
        read = sum(p.numel() * 4 for n, p in loaded.model.named_parameters() if "embed_tokens" not in n)
        assert this.read_bytes == read
        assert this.limit_share(0.5, 1e6) == pytest.approx((read + 1e6) / 1e9 / 0.5)
        assert dataclasses.replace(this, cache_bytes=10**12).limit_share(0.5, 1e6) is None

    def test_prompts_are_the_book(self, loaded: LoadedModel, book: Book) -> None:
        first, second = (book.stretch(200, seed) for seed in (0, 1))
        assert len(first) == len(second) == 200
        assert first[:1] == [0]
        assert first != second
        assert "Walden" in loaded.tokenizer.decode(book.stretch(2000, 0))
        n = len(book.ids)
        assert book.stretch(n + 101, 0)[n + 1 : n + 101] == book.stretch(101, 0)[1:]
        assert (book.copies(n), book.copies(n + 101)) == (1, 2)


class TestEndless:
    def test_memory_stays_and_the_loss_is_that_of_infer(self, loaded: LoadedModel, book: Book) -> None:
        ids = book.stretch(20 + 61, 0)
        found = list(endless(bench(loaded), STREAM, ids[:20], ids[20:], 60, 25))
        assert [(w.start, w.stop, len(w.step_s)) for w in found] == [(0, 25, 25), (25, 50, 25), (50, 60, 10)]
        assert {w.kv_bytes_low for w in found} == {w.kv_bytes_high for w in found}
        assert {w.entries_high for w in found} == {16}
        state = prefill(loaded.model, ids[:20], STREAM.needs(), 0)
        cache = state.fork(STREAM, state.choose(STREAM))
        reference = score_answer(loaded.model, cache, [], ids[20:81]).nll
        losses = [w.nll * len(w.step_s) for w in found if w.nll is not None]
        assert sum(losses) == pytest.approx(sum(reference), rel=1e-4)

    def test_own_tokens_have_no_loss(self, loaded: LoadedModel, book: Book) -> None:
        found = list(endless(bench(loaded), STREAM, book.stretch(20, 0), None, 10, 10))
        assert [w.nll for w in found] == [None]


class TestMemory:
    def test_peak(self) -> None:
        meter = PeakMeter([CPU])
        if meter.peak().why_not:
            pytest.skip(str(meter.peak().why_not))
        held = torch.ones(16 << 20)
        torch.ones(8 << 20)
        first = meter.peak().used_bytes or 0
        assert 90 << 20 < first < 140 << 20
        meter.restart()
        second = meter.peak().used_bytes or 0
        assert 60 << 20 < second < 90 << 20
        del held
        meter.restart()
        assert (meter.peak().used_bytes or 0) < 30 << 20

    def test_no_figure_without_the_kernels_help(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stress_memory, "PROC", tmp_path)
        peak = PeakMeter([CPU]).peak()
        assert peak.used_bytes is None
        assert "cannot be started anew" in (peak.why_not or "")

    def test_free(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(stress_memory, "PROC", tmp_path)
        monkeypatch.setattr(stress_memory, "CGROUP", tmp_path)
        assert free_bytes([CPU]) is None
        (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    5000 kB\n")
        assert free_bytes([CPU]) == 5000 * 1024
        (tmp_path / "memory.max").write_text("max\n")
        (tmp_path / "memory.current").write_text("1000\n")
        assert free_bytes([CPU]) == 5000 * 1024
        (tmp_path / "memory.max").write_text("3000000\n")
        assert free_bytes([CPU]) == 2999000

    @pytest.mark.parametrize("text", ["full", "snapkv:budget=64", "snapkv:budget=64,chunk=128", "cake:budget=64"])
    def test_estimate_holds(self, text: str, loaded: LoadedModel, book: Book) -> None:
        """Neither far below what is taken nor more than three times that."""
        policy = Policy.parse(text)
        found = timed_run(bench(loaded), policy, book.batch(2, 1024, 0, CPU))
        if found["prefill_peak_bytes"] is None:
            pytest.skip(found["why_no_peak"])
        needed, taken = needed_bytes(loaded, policy, 2, 1024, 8), found["prefill_peak_bytes"]
        assert 0.7 * taken < needed + 8e6
        assert needed < 3 * taken

    def test_bandwidth(self) -> None:
        found = measure_bandwidth(CPU, 1 << 20)
        assert set(found.ways) == {"sum", "product", "copy"}
        assert found.bytes_per_s == max(found.ways.values())
        assert found.n_bytes == 1 << 20


CONFIG = StressConfig(MODEL, length=40, max_length=80, max_batch=2, n_new=2, repeats=1, warm_ups=0, endless=20, window=8)


@pytest.fixture(scope="module")
def whole(loaded: LoadedModel, book: Book, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A finished test: lengths, batches and endless decoding."""
    folder = tmp_path_factory.mktemp("stress")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stress.Book, "read", classmethod(lambda cls, loaded: book))
        return folder, stress.run_stress(CONFIG, loaded, [STREAM], folder, SPEED)


class TestRunner:
    def test_records(self, whole: tuple[Path, Any]) -> None:
        folder, summary = whole
        found = records(folder)
        assert {r["status"] for r in found} == {"ok"}
        assert len({r["unit"] for r in found}) == len(found) == 2 * 3 + 2 * 3 + 3
        assert len(summary.rows) == 2 * 3 + 2 * 3
        assert [(r.policy, r.source, r.tokens) for r in summary.endless] == [(str(STREAM), "own", 20)]
        assert all(r["weights"] == "random, seed 0" for r in found if r["status"] == "ok")
        for name in ("length", "batch", "endless"):
            assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
            assert "<svg" in (folder / f"{name}.svg").read_text()
            assert (folder / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
            assert len((folder / f"{name}.csv").read_text().splitlines()) > 2
        text = summary.text()
        assert "weights are random, seed 0" in text
        assert "noise floor" in text
        assert json.loads((folder / "stress.json").read_text())["model"]["weights"] == "random, seed 0"

    @pytest.mark.usefixtures("quick")
    def test_steps_with_fixed_shapes(self, loaded: LoadedModel, book: Book, tmp_path: Path) -> None:
        config = StressConfig(MODEL, length=48, max_length=48, n_new=3, repeats=1, warm_ups=0, graphs=True)
        grown = Policy.parse("adakv:budget=40,window=8")
        summary = stress.run_stress(config, loaded, [grown, STREAM], tmp_path, SPEED)
        found = {r["policy"]: r for r in records(tmp_path) if not r["again"]}
        assert [len(found[name]["fixed_step_s"]) for name in ("full", str(grown))] == [3, 3]
        assert found[str(grown)]["fixed_tpot_s"] > 0
        assert found[str(STREAM)]["fixed_step_s"] is None
        assert "evicts while decoding" in found[str(STREAM)]["fixed_why_not"]
        assert {r["graphs_replayed"] for r in found.values()} == {0}  # there is no CUDA here
        text = summary.text()
        assert "TPOT ms fixed" in text
        assert f"fixed: shapes are fixed, but graphs need CUDA (full; {grown})" in text
        plain = dataclasses.replace(config, graphs=False)
        assert "graphs" not in stress.identity(plain, loaded, [grown])

    @pytest.mark.usefixtures("quick")
    def test_again_adds_nothing(self, whole: tuple[Path, Any], loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        folder, _ = whole
        before = (folder / "records.jsonl").read_bytes()
        monkeypatch.setattr(stress, "timed_run", lambda *a: pytest.fail("measured again"))
        monkeypatch.setattr(stress, "endless", lambda *a: pytest.fail("decoded again"))
        stress.run_stress(CONFIG, loaded, [STREAM], folder, SPEED)
        assert (folder / "records.jsonl").read_bytes() == before

    def test_another_test_is_refused(self, whole: tuple[Path, Any], loaded: LoadedModel) -> None:
        import dataclasses

        with pytest.raises(ConfigError, match="n_new: 2 there, 3 now"):
            stress.run_stress(dataclasses.replace(CONFIG, n_new=3), loaded, [STREAM], whole[0], SPEED)

    @pytest.mark.usefixtures("quick")
    def test_interrupted_and_torn_it_continues(
        self, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, calls = stress.timed_run, 0

        def stop(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 6:
                raise KeyboardInterrupt
            return real(*args)

        monkeypatch.setattr(stress, "timed_run", stop)
        with pytest.raises(KeyboardInterrupt):
            stress.run_stress(CONFIG, loaded, [STREAM], tmp_path, SPEED)
        file = tmp_path / "records.jsonl"
        before = file.read_bytes()
        assert len(records(tmp_path)) == 5
        with file.open("ab") as torn:
            torn.write(b'{"unit": "half of a')
        stress.run_stress(CONFIG, loaded, [STREAM], tmp_path, SPEED)
        assert file.read_bytes().startswith(before)
        found = records(tmp_path)
        assert len({r["unit"] for r in found}) == len(found) == 15

    @pytest.mark.usefixtures("quick")
    def test_endless_goes_on_with_the_same_tokens(
        self, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = StressConfig(MODEL, length=20, n_new=2, endless=20, window=8)
        real = stress.append_records

        def once(path: Path, rows: list[dict[str, Any]]) -> None:
            real(path, rows)
            raise KeyboardInterrupt

        monkeypatch.setattr(stress, "append_records", once)
        with pytest.raises(KeyboardInterrupt):
            stress.run_stress(config, loaded, [STREAM], tmp_path, SPEED)
        monkeypatch.setattr(stress, "append_records", real)
        before = (tmp_path / "records.jsonl").read_bytes()
        summary = stress.run_stress(config, loaded, [STREAM], tmp_path, SPEED)
        assert (tmp_path / "records.jsonl").read_bytes().startswith(before)
        assert [(r["start"], r["stop"]) for r in records(tmp_path)] == [(0, 8), (8, 16), (16, 20)]
        assert summary.endless[0].tokens == 20

    @pytest.mark.usefixtures("quick")
    def test_out_of_memory_is_a_row(self, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The full cache runs out at 80 tokens: the policy goes on, the full cache does not."""
        real = stress.timed_run
        tried: list[tuple[str, int]] = []

        def limited(this: Bench, policy: Policy, prompt: torch.Tensor) -> dict[str, Any]:
            tried.append((str(policy), int(prompt.shape[1])))
            if policy.method.keeps_all and prompt.shape[1] >= 80:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return real(this, policy, prompt)

        monkeypatch.setattr(stress, "timed_run", limited)
        config = StressConfig(MODEL, length=40, max_length=160, n_new=2, repeats=2, warm_ups=0)
        summary = stress.run_stress(config, loaded, [SNAP], tmp_path, SPEED)
        rows = {(r.policy, r.again, r.length): r for r in summary.rows}
        assert {k: r.status for k, r in rows.items()} == {
            ("full", False, 40): "ok",
            ("full", True, 40): "ok",
            (str(SNAP), False, 40): "ok",
            ("full", False, 80): "oom",
            (str(SNAP), False, 80): "ok",
            (str(SNAP), False, 160): "ok",
        }
        assert tried.count(("full", 80)) == 1
        assert ("full", 160) not in tried
        assert rows[str(SNAP), False, 160].speedup is None
        assert "oom: CUDA out of memory" in summary.text()

    @pytest.mark.usefixtures("quick")
    def test_what_would_not_fit_is_not_tried(
        self, loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(stress, "free_bytes", lambda devices: 10_000_000)
        config = StressConfig(MODEL, length=256, max_length=4096, n_new=2, repeats=1, warm_ups=0)
        summary = stress.run_stress(config, loaded, [SNAP], tmp_path, SPEED)
        last = summary.rows[-1]
        assert last.status == "would not fit"
        assert "10" not in (last.message or "").split(" GB are needed")[0]
        assert max(r.length for r in summary.rows) < 4096
        assert all(r["estimate_bytes"] > 9_000_000 for r in records(tmp_path) if r["status"] == "would not fit")

    @pytest.mark.usefixtures("quick")
    def test_learned_positions_are_a_row(self, tmp_path: Path, random_model: Callable[..., Any], loaded: LoadedModel) -> None:
        from kvtool.models import describe

        model = random_model("opt", max_position_embeddings=128, vocab_size=512)
        config = StressConfig("m", length=64, max_length=256, n_new=2, repeats=1, warm_ups=0)
        summary = stress.run_stress(config, LoadedModel(model, loaded.tokenizer, describe(model, "m")), [SNAP], tmp_path, SPEED)
        assert [(r.length, r.status) for r in summary.rows if r.policy == "full"] == [(64, "ok"), (64, "ok"), (128, "too long")]

    def test_nothing_to_do(self, loaded: LoadedModel, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="nothing to measure"):
            stress.run_stress(StressConfig(MODEL), loaded, [SNAP], tmp_path, SPEED)


class TestCommand:
    @staticmethod
    def run(*args: object) -> Result:
        return CliRunner().invoke(cli, ["stress", "-m", MODEL, "--device", "cpu", *map(str, args)], catch_exceptions=False)

    @pytest.mark.usefixtures("quick")
    def test_whole(self, tmp_path: Path) -> None:
        sizes = ("--length", 64, "--max-length", 128, "--new", 2, "--repeats", 1, "--warm-ups", 0)
        result = self.run("-p", "snapkv:window=4", "-r", "20%", *sizes, "-o", tmp_path / "s")
        assert result.exit_code == 0, result.output
        assert "snapkv:budget=20%,window=4" in result.stdout
        assert "scores mean nothing" in result.stderr
        found = json.loads(self.run("-p", "snapkv:window=4", "-r", "20%", *sizes, "-o", tmp_path / "s", "--json").stdout)
        assert [r["length"] for r in found["rows"]] == [64] * 3 + [128] * 3

    def test_dry_run(self, tmp_path: Path) -> None:
        result = self.run("-p", "snapkv:window=4", "-r", "20%", "--max-batch", "8", "--dry-run", "-o", tmp_path / "s")
        assert (result.exit_code, "12 points" in result.stdout) == (0, True)
        assert not (tmp_path / "s").exists()

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (("--max-length", "many"), "neither a whole number"),
            (("--max-length", "100"), "below the 512"),
            (("--endless", "50"), "decode=evict"),
            (("-p", "snapkvv"), "Did you mean 'snapkv'"),
            (("--kernel", "fast"), "unknown kernel"),
        ],
    )
    def test_wrong_input(self, args: tuple[str, ...], said: str, tmp_path: Path) -> None:
        result = self.run(*args, "-o", tmp_path / "s")
        assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


def test_attention_steps_are_counted_in_the_tokens(loaded: LoadedModel) -> None:
    assert bench(loaded, 5).n_tokens == WARM_STEPS + 5 + ATTENTION_STEPS
