"""Progress on stderr: one line that is rewritten on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def say(text: str) -> None:
    """Print one line to stderr."""
    print(text, file=sys.stderr, flush=True)


def track(items: Iterable[Item], total: int, label: str, done: int = 0) -> Iterator[Item]:
    """Yield `items` and report how many are done, at what pace and how long the rest will take.

    Parameters
    ----------
    items : iterable
        What is left to do.
    total : int
        All units, those done in an earlier run included.
    label : str
        What is being done.
    done : int
        Units done in an earlier run.
    """
    terminal = sys.stderr.isatty()
    started = last = time.monotonic()
    new = 0
    if done:
        say(f"{label}: {done} of {total} were done by an earlier run")
    for item in items:
        yield item
        new += 1
        now = time.monotonic()
        pace = (now - started) / new
        line = f"{label}: {done + new}/{total}, {pace:.2f} s each, {pace * max(0, total - done - new):.0f} s left"
        if terminal:
            print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)
        elif now - last > 10 or done + new == total:
            say(line)
            last = now
    if terminal and new:
        print(file=sys.stderr)
