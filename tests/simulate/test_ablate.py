"""Ablation and gains under masks against whole-model forwards in float64, one head and one token at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kvtool.attention import AttentionCall, attention_handler
from kvtool.capture.reader import open_capture
from kvtool.errors import ConfigError, DataError
from kvtool.files import read_records
from kvtool.models import LoadedModel
from kvtool.policies import Policy, expand_policies, kept_positions
from kvtool.simulate.ablate import Prompt, ablate_sample, compress_sample, cut_each, head_gains
from kvtool.simulate.importance import ABLATION, COMPRESSED, RECORDS, CutConfig, run_ablation, run_compressed
from kvtool.simulate.refine import Shown, refine_sample

Hide = dict[tuple[int, int], torch.Tensor]


def float64(loaded: LoadedModel) -> Any:
    """A float64 copy whose RMS norms do not fall back to float32."""
    model = copy.deepcopy(loaded.model).double()
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            eps, weight = module.variance_epsilon, module.weight
            module.forward = lambda x, w=weight, e=eps: w * x / (x.pow(2).mean(-1, keepdim=True) + e).sqrt()
    return model


def literal(
    model: Any, sample: Any, hidden: Hide, scaled: tuple[int, int, int, float] | None = None
) -> tuple[float, list[float]]:
    """Mean loss and margins of the answer from one forward over all tokens.

    `hidden` has the prompt positions that a (layer, query head) hides from the fed tokens; `scaled` multiplies the output of one
    (layer, query head) at one fed token.
    """
    seq_len, answer = sample.seq_len, sample.answer_ids
    ids = sample.prompt_ids + answer[:-1]
    n = len(ids)

    def handler(call: AttentionCall) -> torch.Tensor:
        group = call.queries.shape[1] // call.keys.shape[1]
        outputs = []
        for q in range(call.queries.shape[1]):
            i, j = torch.arange(n)[:, None], torch.arange(n)
            visible = j <= i
            if call.window is not None:
                visible = visible & (j > i - call.window)
            if (call.layer, q) in hidden:
                visible[seq_len:, hidden[call.layer, q]] = False
            logits = call.queries[0, q] @ call.keys[0, q // group].T * call.scaling
            output = logits.masked_fill(~visible, float("-inf")).softmax(-1) @ call.values[0, q // group]
            if scaled is not None and scaled[:2] == (call.layer, q):
                output = output.clone()
                output[seq_len + scaled[2]] *= scaled[3]
            outputs.append(output)
        return torch.stack(outputs)[None]

    with torch.no_grad(), attention_handler(model, handler):
        logits = model(torch.tensor([ids])).logits[0]
    first = max(seq_len, len(sample.prompt_ids) - 1)
    gold = answer[len(answer) - (n - first) :]
    nll, margins = [], []
    for row, g in zip(logits[first:], gold, strict=True):
        nll.append(-float(row.log_softmax(-1)[g]))
        margins.append(float(row[g] - torch.cat([row[:g], row[g + 1 :]]).logsumexp(-1)))
    return float(np.mean(nll)), margins


def cut(sample: Any, sink: int, window: int) -> torch.Tensor:
    return torch.arange(sink, sample.seq_len - window)


@pytest.mark.parametrize(
    ("architecture", "compress_at", "changes"),
    [
        ("llama", "prompt", {}),
        ("opt", "context", {}),
        # The second layer slides over less than the prompt: no policy touches it, its heads are not cut.
        ("qwen2", "context", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    ],
)
def test_ablation_equals_a_float64_forward(
    architecture: str, compress_at: str, changes: dict[str, Any], tmp_path: Path, make_capture: Callable[..., LoadedModel]
) -> None:
    loaded = make_capture(tmp_path / "c.h5", architecture, n=1, compress_at=compress_at, length=200, **changes)
    model = float64(loaded)
    group = loaded.info.n_heads // loaded.info.n_kv_heads
    with open_capture(tmp_path / "c.h5") as capture:
        sample = capture.samples[0]
        record = ablate_sample(loaded, sample, 3, 20)
        assert record["layers"] == ([0] if changes else [0, 1])
        nll, margins = literal(model, sample, {})
        assert record["full"]["nll"] == pytest.approx(nll, rel=1e-4)
        sizes = []
        for row, layer in enumerate(record["layers"]):
            for level, heads in (("kv_heads", 1), ("heads", 3 if group > 1 else 1)):
                head = heads
                queries = range(head * group, (head + 1) * group) if level == "kv_heads" else [head]
                cut_nll, cut_margins = literal(model, sample, {(layer, q): cut(sample, 3, 20) for q in queries})
                got = {name: record["measures"][name][level][row][head] for name in ("ablation", "ablation_margin")}
                assert got["ablation"] == pytest.approx(cut_nll - nll, abs=2e-4)
                assert got["ablation_margin"] == pytest.approx(np.mean(margins) - np.mean(cut_margins), abs=2e-4)
                sizes.append(abs(cut_nll - nll))
        # Far above the tolerance: there is something to find.
        assert max(sizes) > 1e-2
    assert np.asarray(record["measures"]["ablation"]["heads"]).shape == (len(record["layers"]), loaded.info.n_heads)


def test_gains_under_a_mask_are_derivatives(llama_capture: tuple[Path, LoadedModel]) -> None:
    """g . o of a head at a fed token is the change of the margins per relative change of its output there."""
    path, loaded = llama_capture
    model = float64(loaded)
    with open_capture(path) as capture:
        sample = capture.samples[0]
        policy = expand_policies(("snapkv:window=8,kernel=3",), ["20%"])[0]
        views, masks, hidden = sample.views(), [], Hide()
        for view, heads in zip(views, kept_positions(policy, views), strict=True):
            mask = torch.zeros(1, view.n_kv_heads, sample.seq_len, dtype=torch.bool)
            for h, kept in enumerate(heads):
                mask[0, h, kept] = True
                hidden |= {(view.layer, q): (~mask[0, h]).nonzero()[:, 0] for q in (2 * h, 2 * h + 1)}
            masks.append(Shown(mask, None, {}, []))
        prompt = Prompt.of(loaded, sample)
        _, gains = head_gains(prompt, masks)
        for layer, q in ((0, 1), (1, 2)):
            slopes = []
            for token in range(len(prompt.fed)):
                up, down = (sum(literal(model, sample, hidden, (layer, q, token, 1 + s * 1e-4))[1]) for s in (1, -1))
                slopes.append(abs(up - down) / 2e-4)
            assert gains[0, layer, q] == pytest.approx(np.mean(slopes), rel=1e-3)
            assert np.mean(slopes) > 1e-3


def test_full_cache_gives_the_captured_gains_and_refined_figures(llama_capture: tuple[Path, LoadedModel]) -> None:
    path, loaded = llama_capture
    policies = expand_policies(("snapkv:window=8", "snapkv:window=8,compensate=mean,block=32", "random"), ["30%"])
    with open_capture(path) as capture:
        sample = capture.samples[1]
        probes = sample.probes()
        found = compress_sample(loaded, sample, policies, 4, 16, ablate=True)["policies"]
        captured = np.abs(probes.gain.sum(-1, dtype=np.float64) + probes.gain_own).mean(-1)
        np.testing.assert_allclose(found[0]["measures"]["gain"]["heads"], captured, rtol=5e-3, atol=1e-5)
        for record, refined in zip(found, refine_sample(loaded, sample, [Policy.parse("full"), *policies]), strict=True):
            assert record["refined"]["nll"] == pytest.approx(refined.nll, abs=1e-5)
            assert record["refined"]["kl"] == pytest.approx(refined.kl, abs=1e-5)
    assert [record["retention"] for record in found] == pytest.approx([1, 0.3, 0.3, 0.3], abs=0.005)
    # Representatives are no prompt entries that a mask could hide: no ablation, the others have one.
    assert ["ablation" in record["measures"] for record in found] == [True, True, False, True]
    change = np.abs(np.asarray(found[1]["measures"]["gain"]["heads"]) - captured)
    assert change.max() > 1e-2


def test_ablation_under_a_policy_cuts_what_it_kept(llama_capture: tuple[Path, LoadedModel]) -> None:
    path, loaded = llama_capture
    policy = expand_policies(("h2o:window=8,sink=2",), ["20%"])[0]
    with open_capture(path) as capture:
        sample = capture.samples[0]
        found = compress_sample(loaded, sample, [policy], 4, 16, ablate=True)["policies"][1]
        model, hidden = float64(loaded), Hide()
        for view, heads in zip(sample.views(), kept_positions(policy, sample.views()), strict=True):
            for h, kept in enumerate(heads):
                gone = np.setdiff1d(np.arange(sample.seq_len), kept.numpy())
                hidden |= {(view.layer, q): torch.from_numpy(gone) for q in (2 * h, 2 * h + 1)}
        before, _ = literal(model, sample, hidden)
        also = torch.cat([hidden[1, 2], cut(sample, 4, 16)]).unique()
        after, _ = literal(model, sample, {**hidden, (1, 2): also, (1, 3): also})
        assert found["measures"]["ablation"]["kv_heads"][1][1] == pytest.approx(after - before, abs=2e-4)
        assert abs(after - before) > 1e-3


def test_batches_do_not_matter(llama_capture: tuple[Path, LoadedModel], monkeypatch: pytest.MonkeyPatch) -> None:
    path, loaded = llama_capture
    policies = expand_policies(("snapkv:window=8", "h2o:window=8"), ["20%", "50%"])
    with open_capture(path) as capture:
        whole = compress_sample(loaded, capture.samples[0], policies, 4, 16, ablate=True)
        monkeypatch.setattr("kvtool.simulate.ablate.BATCH_ELEMENTS", 1)
        single = compress_sample(loaded, capture.samples[0], policies, 4, 16, ablate=True)
    for a, b in zip(whole["policies"], single["policies"], strict=True):
        for measure, levels in a["measures"].items():
            for level, table in levels.items():
                np.testing.assert_allclose(table, b["measures"][measure][level], atol=1e-4)


def test_nothing_to_cut_changes_nothing(llama_capture: tuple[Path, LoadedModel]) -> None:
    path, loaded = llama_capture
    with open_capture(path) as capture:
        prompt = Prompt.of(loaded, capture.samples[0])
        whole = [torch.ones(2, prompt.seq_len, dtype=torch.bool) for _ in prompt.layers]
        full, found = cut_each(prompt, whole, prompt.seq_len - 16, 16)
    assert all(one.nll == pytest.approx(full.nll, abs=1e-6) for row in found for one in row)


def ids(records: Sequence[dict[str, Any]]) -> list[str]:
    return [record["sample"] for record in records]


def test_runs_resume_and_keep_apart(
    llama_capture: tuple[Path, LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_capture: Callable[..., LoadedModel],
) -> None:
    path, loaded = llama_capture
    config, file = CutConfig(str(path), 4, 16), tmp_path / ABLATION / RECORDS
    run_ablation(config, loaded, tmp_path)
    whole = file.read_text()
    # A kill in the middle of the third record.
    file.write_text(whole[: len(whole) - 50])
    calls: list[str] = []
    monkeypatch.setattr(
        "kvtool.simulate.importance.ablate_sample", lambda m, s, *c: calls.append(s.id) or ablate_sample(m, s, *c)
    )
    run_ablation(config, loaded, tmp_path)
    assert file.read_text() == whole
    assert calls == ids(read_records(file))[2:]
    with pytest.raises(ConfigError, match="window: 16 there, 17 now"):
        run_ablation(CutConfig(str(path), 4, 17), loaded, tmp_path)
    run_compressed(config, loaded, tmp_path, ("snapkv:window=8", "h2o"), ("10%",))
    records = read_records(tmp_path / COMPRESSED / RECORDS)
    assert ids(records) == ids(read_records(file))
    # 10 % of 230 entries are fewer than h2o protects: a row with the reason, no figures.
    assert [p["policy"].split(":")[0] for p in records[0]["policies"]] == ["full", "snapkv", "h2o"]
    assert "32 protected entries" in records[0]["policies"][2]["message"]
    assert "measures" not in records[0]["policies"][2]
    with pytest.raises(ConfigError, match="policies"):
        run_compressed(config, loaded, tmp_path, ("snapkv:window=8",), ("10%",))
    with pytest.raises(ConfigError, match="32 protected entries"):
        run_compressed(config, loaded, tmp_path / "x", ("h2o",), ("10%",))
    other = make_capture(tmp_path / "o.h5", n=1, seed=3)
    with pytest.raises(DataError, match="use that model"):
        run_ablation(config, other, tmp_path / "y")
