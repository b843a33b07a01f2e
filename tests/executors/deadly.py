"""A policy whose worker dies, once by a kill from outside and always on one sample. Travels to workers by value."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from kvtool.policies import LayerView, Method
from kvtool.policies.allocators import Uniform
from kvtool.policies.base import Parts, Scorer, Selector


@dataclass(frozen=True, slots=True)
class DeadlyScorer(Scorer):
    """Scores by position; see `Deadly`."""

    flag: str
    driver: int
    waits_at: int
    dies_at: int

    def needs(self) -> tuple[str, ...]:
        return ()

    def score(self, view: LayerView) -> torch.Tensor:
        if os.getpid() != self.driver and view.seq_len == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.getpid() != self.driver and view.seq_len == self.waits_at and not Path(self.flag).exists():
            Path(f"{self.flag}.new").write_text(str(os.getpid()))
            os.replace(f"{self.flag}.new", self.flag)
            time.sleep(300)  # until it is killed
        return torch.arange(float(view.seq_len)).expand(view.n_kv_heads, -1)


@dataclass(frozen=True, slots=True)
class Deadly(Method):
    """In processes other than `driver`: writes its process id to `flag`, once, and waits at one prompt length; dies at another."""

    flag: str = ""
    driver: int = 0
    waits_at: int = 0
    dies_at: int = 0
    name: ClassVar[str] = "deadly"
    source: ClassVar[str] = "test"
    summary: ClassVar[str] = "test"
    formula: ClassVar[str] = "test"

    def parts(self) -> Parts:
        return Parts(DeadlyScorer(self.flag, self.driver, self.waits_at, self.dies_at), Uniform(), Selector())
