from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtool.errors import ConfigError
from kvtool.policies import Budget


@pytest.mark.parametrize(
    ("text", "entries", "retention"),
    [
        ("1%", None, "0.01"),
        ("0.01", None, "0.01"),
        (".5", None, "0.5"),
        ("100%", None, "1"),
        ("1.0", None, "1.0"),
        ("0.5 %", None, "0.005"),
        ("64entries", 64, None),
        ("1 entry", 1, None),
        ("1024", 1024, None),
    ],
)
def test_parse(text: str, entries: int | None, retention: str | None) -> None:
    assert Budget.parse(text) == Budget(entries, None if retention is None else Decimal(retention))


@pytest.mark.parametrize("text", ["0", "0%", "0.0", "1.5", "200%", "-1", "-5%", "1", "many", "", "0entries", "1e-2", "nan"])
def test_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "seq_len", "entries"),
    [("1%", 4096, 41), ("0.5%", 4096, 20), ("0.5%", 100, 1), ("0.1%", 10, 1), ("64", 10, 10), ("100%", 7, 7)],
)
def test_resolve(text: str, seq_len: int, entries: int) -> None:
    assert Budget.parse(text).resolve(seq_len) == entries


@given(st.decimals(min_value=Decimal("0.0001"), max_value=1, places=4), st.integers(1, 200_000))
def test_resolve_is_within_half_an_entry_and_in_range(retention: Decimal, seq_len: int) -> None:
    entries = Budget(retention=retention).resolve(seq_len)
    assert 1 <= entries <= seq_len
    assert entries == 1 or abs(entries - retention * seq_len) <= Decimal("0.5")


@given(
    st.one_of(
        st.integers(1, 10**6).map(lambda n: Budget(entries=n)),
        st.integers(1, 10_000).map(lambda n: Budget(retention=Decimal(n) / 10_000)),
    )
)
def test_text_round_trip(budget: Budget) -> None:
    assert Budget.parse(str(budget)) == budget
