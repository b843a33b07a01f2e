"""A method from another package: one file and an entry point, and every stage knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from kvtool.cli import cli
from kvtool.errors import ConfigError
from kvtool.infer.cache import CompressedCache
from kvtool.policies import method_classes, select

PLUGIN = '''
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvtool.policies.allocators import Uniform
from kvtool.policies.base import LayerView, Method, Parts, Scorer, Selector


@dataclass(frozen=True, slots=True)
class Product(Scorer):
    """Norm of the key times norm of the value."""

    def needs(self) -> tuple[str, ...]:
        return ("key_norm", "value_norm")

    def score(self, view: LayerView):
        return view.statistic("key_norm") * view.statistic("value_norm")


@dataclass(frozen=True, slots=True)
class LargeEntries(Method):
    """Keep the entries with the largest product of norms."""

    window: int = 4

    name: ClassVar[str] = "large"
    source: ClassVar[str] = "a test"
    summary: ClassVar[str] = "keeps entries with large keys and values"
    formula: ClassVar[str] = "score_j = |k_j| |v_j|"

    def parts(self) -> Parts:
        return Parts(Product(), Uniform(), Selector(0, self.window))
'''


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution with one method, as pip leaves it."""
    (tmp_path / "large_entries.py").write_text(PLUGIN)
    info = tmp_path / "large_entries-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: large-entries\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvtool.policies]\nlarge = large_entries:LargeEntries\n")
    monkeypatch.syspath_prepend(tmp_path)
    method_classes.cache_clear()
    yield
    method_classes.cache_clear()


@pytest.mark.usefixtures("plugin")
def test_a_method_from_outside(random_model: Callable[..., Any], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, 50, 8, generator=generator) for n in (4, 2, 2))
    kept = select("large:budget=10", [q], [k], [v])[0]
    score = k.norm(dim=-1) * v.norm(dim=-1)
    for head, positions in enumerate(kept):
        want = {46, 47, 48, 49} | set(score[head, :46].topk(6).indices.tolist())
        assert set(positions.tolist()) == want
    # Real inference, with its own scorer, compensation and eviction while decoding.
    model = random_model("llama")
    for text in ("large:budget=10", "large:budget=10,compensate=mean,block=full", "large:budget=10,decode=evict"):
        cache = CompressedCache(text, model)
        out = model.generate(torch.arange(3, 43)[None], past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert out.shape[1] <= 45
        assert all(n >= 10 for layer in cache.entries() for n in layer[0])
    listing = CliRunner().invoke(cli, ["policies"])
    assert "large" in listing.output
    shown = CliRunner().invoke(cli, ["policies", "show", "large"])
    assert "|k_j| |v_j|" in shown.output


def test_it_is_gone_without_its_package() -> None:
    with pytest.raises(ConfigError, match="unknown policy 'large'"):
        select("large:budget=10", [torch.zeros(1, 20, 4)], [torch.zeros(1, 20, 4)], [torch.zeros(1, 20, 4)])


@pytest.mark.parametrize(
    "target", ["no_such_module:LargeEntries", "large_entries:Missing", "large_entries:Product", "json:dumps"]
)
def test_a_broken_one_is_left_out_and_named(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "large_entries.py").write_text(PLUGIN)
    info = tmp_path / "large_entries-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: large-entries\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[kvtool.policies]\nlarge = {target}\n")
    monkeypatch.syspath_prepend(tmp_path)
    method_classes.cache_clear()
    try:
        assert "large" not in method_classes()
        assert "snapkv" in method_classes()
        assert "entry point 'large' of large-entries is left out" in capsys.readouterr().err
    finally:
        method_classes.cache_clear()


def test_what_select_cannot_serve_is_refused_in_one_line() -> None:
    q, k = torch.zeros(2, 20, 4), torch.zeros(1, 20, 4)
    for arguments, match in (
        (([], [], []), "at least one layer"),
        (([q], [k, k], [k]), "1 queries, 2 keys"),
        (([q[:, :0]], [k[:, :0]], [k[:, :0]]), "layer 0: queries"),
        (([q.numpy()], [k.numpy()], [k.numpy()]), "torch tensors"),
    ):
        with pytest.raises(ConfigError, match=match):
            select("window:budget=10", *arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="whole prompt"):
        select("window:budget=10,chunk=5", [q], [k], [k])
    with pytest.raises(ConfigError, match="2 head_scores"):
        select("headkv:budget=10", [q], [k], [k], head_scores=torch.ones(2, 2))
    with pytest.raises(ConfigError, match="found dict"):
        select({"name": "window"}, [q], [k], [k])  # type: ignore[arg-type]
