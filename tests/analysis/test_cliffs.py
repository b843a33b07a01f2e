"""Performance cliffs: the critical retention, the largest drop, where to look closer, and the reason."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from kvtool.analysis.cliffs import Cliff, between, fewest_lost, find_cliffs
from kvtool.analysis.cliffs_report import cliff_figures, cliff_table, run_cliffs, too_few
from kvtool.analysis.families import family_name
from kvtool.analysis.points import Place, make_place
from kvtool.analysis.reading import text_place
from kvtool.analysis.resampling import change_interval
from kvtool.cli import cli
from kvtool.errors import DataError
from tests.analysis.conftest import make_record

SAMPLES = [f"s{i}" for i in range(24)]


def place_of(right: dict[str, int], n: int = 24, named: dict[str, str] | None = None, length: int = 1000) -> Place:
    """Policy -> how many of the n prompts it answers, always the first ones."""
    records = [
        make_record(f"s{i}", policy, ("x", float(i < count)), own_entries(policy))
        for policy, count in right.items()
        for i in range(n)
    ]
    place = make_place(records, "toy", {p: (label, "g") for p, label in (named or {}).items()}, task="t", length=length)
    assert place is not None
    return place


def own_entries(policy: str) -> dict[str, Any]:
    """A budget in entries is kept as it is, of prompts of 1000 tokens."""
    budget = policy.partition("budget=")[2]
    return {} if not budget or budget.endswith("%") else {"retention": int(budget) / 1000, "entries": float(budget)}


def only(right: dict[str, int]) -> Cliff:
    found = find_cliffs(place_of(right))
    assert len(found) == 1
    return found[0]


def test_critical_is_the_first_clear_loss_from_above() -> None:
    cliff = only({"full": 24, "m:budget=1%": 2, "m:budget=2%": 6, "m:budget=5%": 24, "m:budget=10%": 24})
    assert (cliff.critical, cliff.safe, cliff.back) == (0.02, 0.05, False)
    assert cliff.drop is not None
    assert (cliff.drop.above, cliff.drop.below) == (0.05, 0.02)
    assert cliff.drop.loss.mean == pytest.approx(18 / 24)


def test_one_lost_prompt_is_no_clear_loss() -> None:
    # 1 of 24 is more than 3 %, but its interval reaches 0.
    cliff = only({"full": 24, "m:budget=1%": 23, "m:budget=5%": 24})
    assert cliff.critical is None
    assert cliff.safe == 0.01
    assert cliff.where() == "none seen down to 1%"


def test_lost_everywhere_and_back_again() -> None:
    cliff = only({"full": 24, "m:budget=1%": 24, "m:budget=5%": 10})
    assert (cliff.critical, cliff.safe, cliff.back) == (0.05, None, True)
    assert cliff.drop is None
    assert all(0.05 < value < 1 for value in between(cliff))


def test_nothing_to_lose() -> None:
    assert find_cliffs(place_of({"full": 0, "m:budget=1%": 0, "m:budget=5%": 0})) == []
    assert find_cliffs(place_of({"m:budget=1%": 3, "m:budget=5%": 4})) == []


def test_losses_are_paired_differences_in_units_of_the_full_cache() -> None:
    place = place_of({"full": 18, "m:budget=1%": 9, "m:budget=5%": 18})
    full, point = place.points[0], place.points[1]
    change = change_interval(point.values["score"], full.values["score"])
    loss = place.loss(point, "score")
    assert loss is not None
    assert (loss.mean, loss.low, loss.high) == pytest.approx((0.5, -change.high / 0.75, min(1, -change.low / 0.75)))


def test_what_so_few_prompts_could_have_shown() -> None:
    """Twelve prompts show four lost ones no more than none: by brute force over all numbers of lost prompts."""
    for n, right in ((12, 12), (12, 10), (48, 48), (100, 80)):
        full = np.asarray([1.0] * right + [0.0] * (n - right))
        shown = [k for k in range(right + 1) if change_interval(full, full * (np.arange(n) >= k)).low > 0]
        assert fewest_lost(n, right) == pytest.approx(min(shown) / right)
    assert fewest_lost(12, 12) == pytest.approx(5 / 12)
    assert fewest_lost(3, 3) is None
    cliff = find_cliffs(place_of({"full": 12, "m:budget=1%": 2, "m:budget=5%": 11}, 12))[0]
    assert (cliff.critical, cliff.safe, cliff.shows) == (0.01, 0.05, pytest.approx(5 / 12))
    assert cliff.held is not None
    assert cliff.held.low < 0 < 0.03 < cliff.held.high  # "no clear loss" where 8 % are missing
    table = cliff_table([cliff])
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["no clear loss at"].text == "5%"
    assert cells["smallest loss that shows, %"].text == "42 (12 prompts)"
    assert "does not say that there is none" in table.how.replace("which does not", "does not")
    (line,) = too_few([cliff])
    assert "12 prompts show no loss below 42 %" in line
    assert re.search(r"about 20\d prompts", line)  # six lost of 200 are 3 %
    assert (fewest_lost(199, 199) or 0) > 0.03 >= (fewest_lost(200, 200) or 1)


def test_the_bracket_holds_only_what_is_shown() -> None:
    few = only({"full": 24, "m:budget=1%": 2, "m:budget=5%": 24, "m:budget=10%": 24})
    assert few.surely == (0.01, None)
    assert few.between_words() == "above 1%"
    many = find_cliffs(
        place_of({"full": 300, "m:budget=1%": 20, "m:budget=2%": 290, "m:budget=5%": 300, "m:budget=10%": 300}, 300)
    )[0]
    assert many.surely == (0.01, 0.05)  # 2 % loses 3.3 %: neither surely more nor surely less
    assert many.between_words() == "1% to 5%"
    assert too_few([many]) == []
    fine = find_cliffs(place_of({"full": 300, "m:budget=1%": 300, "m:budget=5%": 300}, 300))[0]
    assert (fine.critical, fine.between_words()) == (None, "at or below 1%")
    unclear = find_cliffs(place_of({"full": 12, "m:budget=1%": 11, "m:budget=5%": 12}, 12))[0]
    assert unclear.between_words() == "not shown"


def test_policies_with_their_own_entries_are_a_family() -> None:
    right = {"full": 24, "m:budget=48": 2, "m:budget=128": 20, "m:budget=256": 24, "other:budget=64": 24, "m:budget=80%": 24}
    names = {f"m:budget={n}": f"ablation_c{n}_w16" for n in (48, 128, 256)}
    (cliff,) = find_cliffs(place_of(right, named=names))
    assert cliff.label == "ablation_c*_w16"
    assert [point.policy for point, _ in cliff.curve] == ["m:budget=80%", "m:budget=256", "m:budget=128", "m:budget=48"]
    assert cliff.at(cliff.critical) == "4.8% (48)"
    assert all(0.048 < value < 0.128 for value in between(cliff))
    alone = {p: n for p, n in right.items() if p in ("full", "m:budget=48", "other:budget=64")}
    assert find_cliffs(place_of(alone)) == []


def test_what_was_added_to_a_family_counts_for_its_cliff_alone() -> None:
    whole = place_of({"full": 24, "m:budget=48": 2, "m:budget=256": 24, "m:budget=10%": 24})
    place = dataclasses.replace(whole, points=whole.points[:3], finer=whole.points[3:])
    (cliff,) = find_cliffs(place)
    assert (cliff.critical, cliff.safe) == (pytest.approx(0.048), 0.1)
    assert len(place.points) == 3


def test_one_window_for_all_kinds_of_heads_is_a_family() -> None:
    def windows(*sizes: int) -> str:
        return "head_windows:budget=own,positional={},mixed={},gathering={},base={},confidence=0.0".format(*sizes)

    names = {n: windows(n, n, n, n) for n in (64, 128)}
    asked = (("full", 24, 1.0), (names[64], 3, 0.068), (names[128], 24, 0.132), (windows(256, 64, 128, 64), 24, 0.2))
    records = [
        make_record(
            f"s{i}", "x", ("x", float(i < count)), {"policy": p, "method": p, "retention": kept, "entries": 1000 * kept}
        )
        for p, count, kept in asked
        for i in range(24)
    ]
    place = make_place(
        records, "toy", {names[64]: ("K_uniform64_aware", "K"), names[128]: ("K_uniform128_aware", "K")}, length=1000
    )
    assert place is not None
    (cliff,) = find_cliffs(place)
    assert (cliff.label, cliff.critical, cliff.safe) == ("K_uniform*_aware", 0.068, 0.132)
    assert between(cliff) == []  # it takes no share of the prompt


def test_names_of_families() -> None:
    def name(*labels: str) -> str:
        points = place_of(
            {f"m:budget={i + 1}": 1 for i in range(len(labels))}, 1, {f"m:budget={i + 1}": x for i, x in enumerate(labels)}
        )
        return family_name(points.points)

    assert name("h2o_8_64_128", "h2o_8_64_512") == "h2o_8_64_*"
    assert name("c128_w8", "c48_w8") == "c*_w8"
    assert name("one", "one") == "one"
    assert name("abc", "xyz") == "m"


def test_texts_have_cliffs_by_perplexity() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(2.5, 0.2, 8)
    rise = {"full": 0.0, "w:budget=64": 0.8, "w:budget=128": 0.01, "w:budget=512": 0.001}
    records = [
        {
            "policy": policy, "sample": f"s{i}", "document": "book", "method": policy.partition(":")[0], "status": "ok",
            "degenerate": False, "budget": policy.partition("budget=")[2] or None, "n": 999,
            "nll": 999 * (base[i] + more * (1 + 0.1 * rng.random())),
            "entries": float(policy.partition("budget=")[2] or 999),
        }
        for policy, more in rise.items()
        for i in range(8)
    ]  # fmt: skip
    place = text_place(records, "toy", {f"w:budget={n}": (f"A_window_{n}", "A") for n in (64, 128, 512)}, "book", 1000)
    assert place is not None
    (cliff,) = find_cliffs(place)
    assert (cliff.label, cliff.critical, cliff.safe, cliff.surely) == ("A_window_*", 0.064, 0.128, (0.064, 0.128))
    # By hand: perplexity over the full cache's - 1.
    nll = {p: [r["nll"] / r["n"] for r in records if r["policy"] == p] for p in rise}
    ratio = np.exp(np.mean(nll["w:budget=64"]) - np.mean(nll["full"])) - 1
    assert cliff.curve[-1][1].mean == pytest.approx(ratio)
    (figure,) = cliff_figures([cliff])
    assert figure.name == "cliff_texts"
    assert cliff_table([cliff]).rows[0][1].text.startswith("6.4% (64)")


def test_points_between_are_of_different_entries() -> None:
    cliff = only({"full": 24, "m:budget=1%": 2, "m:budget=5%": 24})
    values = between(cliff, 3)
    assert values == sorted(values)
    assert len({round(1000 * v) for v in (0.01, 0.05, *values)}) == 5
    assert values[1] == pytest.approx((0.01 * 0.05) ** 0.5, rel=0.05)
    narrow = only({"full": 24, "m:budget=1%": 2, "m:budget=1.1%": 24})
    assert between(narrow, 3) == []


def test_reason_comes_from_the_simulation() -> None:
    place = place_of({"full": 24, "m:budget=1%": 2, "m:budget=5%": 24})
    row = {"status": "ok", "recall": 0.9, "missing": 0.1, "evidence": 0.02}
    predicted = {"m:budget=5%": row, "m:budget=1%": {**row, "recall": 0.8, "evidence": 0.7}}
    (cliff,) = find_cliffs(place, predicted)
    assert cliff.reason is not None
    assert cliff.reason.text().startswith("attention to the evidence kept 0.98 → 0.30")
    assert find_cliffs(place)[0].reason is None


def test_command_joins_runs_and_proposes(make_run: Callable[..., Path], tmp_path: Path) -> None:
    def answers(right: dict[str, int]) -> dict[str, dict[str, tuple[str, float]]]:
        return {p: {s: ("x", float(i < n)) for i, s in enumerate(SAMPLES)} for p, n in right.items()}

    facts = {"model": "toy", "length": 1000, "n": 24}
    first = make_run("run", answers({"full": 24, "m:budget=1%": 2, "m:budget=5%": 24}), facts)
    second = make_run("run-refined", answers({"full": 24, "m:budget=2%": 24}), facts)
    done = CliRunner().invoke(cli, ["analyze", "cliffs", str(first), "--refine", "2", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "no clear loss at" in done.output
    assert "-p m:budget=" in done.output
    summary = run_cliffs([first, second], [], tmp_path / "both")
    assert summary.cliffs[0].safe == 0.02
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names == {f"cliffs.{ending}" for ending in ("md", "csv", "tex")} | {
        f"cliff_curves.{ending}" for ending in ("csv", "png", "svg", "pdf")
    }
    with pytest.raises(DataError, match="no curve"):
        run_cliffs([second], [], tmp_path / "none")


def test_figures_show_the_intervals() -> None:
    """The bars of each curve, as drawn: from the lower to the upper end of every loss."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    from kvtool.analysis.cliffs_report import _panel

    cliff = only({"full": 24, "m:budget=1%": 2, "m:budget=5%": 20})
    axes = Figure().subplots()
    _panel(axes, [cliff], [cliff.label])
    (bars,) = [each for each in axes.collections if isinstance(each, LineCollection)]
    drawn = [(float(line[0][1]), float(line[1][1])) for line in np.asarray(bars.get_segments())]
    assert drawn == [pytest.approx((100 * loss.low, 100 * loss.high)) for _, loss in cliff.curve]
