"""Files of what is known of heads: three forms read, everything else refused in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtool.errors import ConfigError, DataError
from kvtool.policies import Policy, expand_policies
from kvtool.policies.headfile import check_heads, read_head_file, with_heads

PUBLISHED = Path(os.environ.get("KVTOOL_GOLDENS", "/nonexistent")).parent / "heads"


def info(**changes: Any) -> Any:
    facts = {"model_id": "toy", "fingerprint": "toy", "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}
    return SimpleNamespace(**{**facts, **changes})


def published(n_layers: int = 2, n_heads: int = 4) -> dict[str, list[float]]:
    return {
        f"{layer}-{head}": [layer + head / 10, layer + head / 10 + 2] for layer in range(n_layers) for head in range(n_heads)
    }


def pattern(
    folder: Path, text: str = "0.5\t-0.1\n1.5\t0.25\n", config: str | None = '{"sink_size": 128, "recent_size": 256}'
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "full_attention_heads.tsv").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(config)
    return folder


def test_kvtools_own(toy_heads: Callable[..., Path]) -> None:
    path = toy_heads(2, 4, 2)
    value, table = json.loads(path.read_text()), read_head_file(str(path))
    for layer in range(2):
        row = [h for h in value["heads"] if h["layer"] == layer]
        assert table.query_scores("importance")[layer].tolist() == [h["importance"] for h in row]
        assert table.query_scores("retrieval")[layer].tolist() == [h["retrieval"] for h in row]
        kv = [h for h in value["kv_heads"] if h["layer"] == layer]
        assert table.head_scores("importance", 2)[layer].tolist() == [h["importance"] for h in kv]
        assert table.kinds is not None
        assert table.confidence is not None
        assert list(table.kinds[layer]) == [h["kind"] for h in kv]
        assert table.confidence[layer].tolist() == [h["confidence"] for h in kv]
    # The order of the list does not matter, the layer and head that each names do.
    value["heads"] = value["heads"][::-1]
    value["kv_heads"][0]["confidence"] = None
    value["heads"][0]["retrieval"] = None
    path.write_text(json.dumps(value, indent=1))
    again = read_head_file(str(path))
    np.testing.assert_array_equal(again.query_scores("importance"), table.query_scores("importance"))
    assert again.confidence is None
    with pytest.raises(DataError, match=r"holds no 'retrieval' scores of query heads, only importance, importance of KV heads"):
        again.query_scores("retrieval")


def test_headkvs(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    values = published()
    # Keys in any order: they are parsed. One object on the first line, as HeadKV writes it; what follows is ignored.
    path.write_text(json.dumps(dict(sorted(values.items(), reverse=True))) + "\nmore\n")
    scores = read_head_file(str(path)).query_scores("importance")
    np.testing.assert_allclose(scores, [[1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]])
    np.testing.assert_allclose(read_head_file(str(path)).head_scores("importance", 2), [[1.05, 1.25], [2.05, 2.25]])


def test_duoattentions(tmp_path: Path) -> None:
    folder = pattern(tmp_path / "duo")
    for path in (folder, folder / "full_attention_heads.tsv"):
        table = read_head_file(str(path))
        assert table.kv_scores["gate"].tolist() == [[0.5, 0.0], [1.0, 0.25]]
        assert table.streaming == (128, 256)
    bare = read_head_file(str(pattern(tmp_path / "bare", config=None)))
    assert bare.streaming is None
    one = read_head_file(str(pattern(tmp_path / "one", text="0.5\t0.75\n")))
    assert one.kv_scores["gate"].shape == (1, 2)


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(published()))
    first = read_head_file(str(path))
    assert read_head_file(str(path)) is first
    path.write_text(json.dumps(published(3)))
    assert len(read_head_file(str(path)).query_scores("importance")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read"),
        ("{", "cannot be read"),
        ("not JSON", "cannot be read"),
        ("[]", "is neither kvtool's heads.json"),
        ("{}", "is neither kvtool's heads.json"),
        ('{"schema": "kvtool.heads/2"}', "is neither kvtool's heads.json"),
        ('{"schema": "kvtool.heads/1"}', "is incomplete"),
        ('{"schema": "kvtool.heads/1", "n_heads": 1, "n_kv_heads": 1, "n_layers": 1, "model": {}}', "is incomplete"),
        ('{"0-0": [1], "0-2": [1]}', "names 2 heads, 1 x 3 are needed"),
        ('{"0-0": [1], "1": [1]}', "is neither kvtool's heads.json"),
        ('{"0-0": [], "0-1": [1]}', "head 0-0 has no scores"),
        ('{"0-0": ["x"], "0-1": [1]}', "the scores of head 0-0 are not numbers"),
        ('{"0-0": [NaN], "0-1": [1]}', "head 0-0 has no scores, or some that are not finite"),
    ],
)
def test_damaged_files_are_one_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "heads.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_head_file(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "config"),
    [("a\tb\n", None), ("", None), ("1\t2\n3\n", None), ("1\t2\n", "{"), ("1\tnan\n", None), ("1\t2\n", "[]")],
)
def test_damaged_patterns_are_one_line(text: str, config: str | None, tmp_path: Path) -> None:
    folder = pattern(tmp_path / "duo", text, config)
    with pytest.raises(DataError) as caught:
        read_head_file(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_missing_heads_of_kvtools_own(toy_heads: Callable[..., Path]) -> None:
    path = toy_heads(2, 4, 2)
    value = json.loads(path.read_text())
    for change in ({"heads": value["heads"][1:]}, {"kv_heads": value["kv_heads"][:1] * 4}, {"n_layers": 3}):
        path.write_text(json.dumps({**value, **change}))
        with pytest.raises(DataError, match="is incomplete"):
            read_head_file(str(path))
    with pytest.raises(DataError, match="not found; make one with kvtool classify"):
        read_head_file(str(path.with_name("none.json")))


def test_paths_in_the_text_form(toy_heads: Callable[..., Path], tmp_path: Path) -> None:
    odd = tmp_path / "a=b: c.json"
    odd.write_bytes(toy_heads(2, 4, 2).read_bytes())
    policy = Policy.parse(f"headkv:budget=20,heads={odd}")
    assert Policy.parse(str(policy)) == policy
    assert list(check_heads([policy], info())) == [str(odd)]
    for name in ("headkv", "hace", "hace-head", "duo", "head_windows"):
        with pytest.raises(ConfigError, match="holds a comma, which separates parameters; rename the file"):
            with_heads(Policy.parse(f"{name}:budget=400"), "a,b.json")


def test_the_model_is_checked(toy_heads: Callable[..., Path], tmp_path: Path) -> None:
    path = toy_heads(2, 4, 2)
    policy = Policy.parse(f"hace:budget=40,heads={path}")
    hashes = check_heads([policy, policy, Policy.parse("snapkv:budget=40")], info())
    assert list(hashes) == [str(path)]
    known = json.loads(path.read_text())["model"]["fingerprint"]
    with pytest.raises(DataError, match=rf"is of toy \({known}\), not of other \(x\); classify a capture"):
        check_heads([policy], info(model_id="other", fingerprint="x"))
    # Other weights under the same name: only the fingerprints tell them apart.
    with pytest.raises(DataError, match=rf"is of toy \({known}\), not of toy \(x\)"):
        check_heads([policy], info(fingerprint="x"))
    path.write_text(path.read_text() + " ")
    assert check_heads([policy], info()) != hashes
    # Files of others name no model: their shape has to do.
    (tmp_path / "h.json").write_text(json.dumps(published()))
    (folder := tmp_path / "duo").mkdir()
    pattern(folder)
    for text in (f"headkv:budget=40,heads={tmp_path / 'h.json'}", f"duo:budget=400,heads={folder}"):
        assert len(check_heads([Policy.parse(text)], info(fingerprint="any"))) == 1
        with pytest.raises(DataError, match=r"is of 2 layers with . .* heads, toy has 3 with"):
            check_heads([Policy.parse(text)], info(n_layers=3))
        with pytest.raises(DataError, match="toy has 2 with 8"):
            check_heads([Policy.parse(text)], info(n_heads=8, n_kv_heads=8))


def test_policies_without_their_file(
    toy_heads: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needy = {"headkv", "hace", "hace-head", "duo", "head_windows"}
    names = {p.method.name for p in expand_policies((), ["50%"])}
    assert not needy & names
    assert "hace-layer" in names
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 3
    assert said[1].startswith("policies: without optimal: ")
    assert said[2].startswith("policies: without plan: ")
    assert "--heads FILE (kvtool classify makes one)" in said[0]
    assert set(said[0].rpartition(": a file")[0].removeprefix("policies: without ").split(", ")) == needy
    for name in needy:
        with pytest.raises(ConfigError, match=f"policy {name}:budget=50%: a file of the model.s heads is needed"):
            expand_policies([name], ["50%"])
    # With a file all are there; one that lacks something is left out by default and refused when it is asked for by name.
    path = str(toy_heads(2, 4, 2))
    with_file = {p.method.name: p for p in expand_policies((), ["50%"], heads=path)}
    assert with_file.keys() == names | needy
    assert all(with_file[name].method.parameters()["heads"] == path for name in needy)
    assert "heads=FILE" not in capsys.readouterr().err
    (tmp_path / "h.json").write_text(json.dumps(published()))
    found = {p.method.name for p in expand_policies((), ["50%"], heads=str(tmp_path / "h.json"))}
    assert found == names | needy - {"duo", "head_windows"}
    # One line per reason: no scores for duo, no kinds for head_windows, no file for optimal and for plan.
    assert len(capsys.readouterr().err.strip().splitlines()) == 4
    with pytest.raises(DataError, match="holds no kinds of heads"):
        expand_policies(["head_windows"], ["50%"], heads=str(tmp_path / "h.json"))
    # A file of its own is left alone.
    assert with_heads(with_file["hace"], "other.json") == with_file["hace"]
    # Where no weight is given to heads, or all windows are equal, no file is needed.
    for text in ("hace:head_power=0", "K_uniform64_aware"):
        assert expand_policies([text], ["50%"])


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published head scores lie beside the folder that KVTOOL_GOLDENS names")
def test_published_files() -> None:
    means = json.loads((PUBLISHED / "head_score_means.json").read_text())
    found = 0
    for path in PUBLISHED.glob("*_heads.json"):
        table = read_head_file(str(path))
        np.testing.assert_allclose(table.query_scores("importance"), means[path.stem], rtol=1e-12)
        assert table.head_scores("importance", 8).shape == (32, 8)
        np.testing.assert_allclose(table.head_scores("importance", 8).sum() * 4, table.query_scores("importance").sum())
        found += 1
    assert found
