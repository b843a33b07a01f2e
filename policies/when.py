"""When entries are dropped: after the prompt, between chunks of it, and while decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvtool.errors import ConfigError


@dataclass(frozen=True, slots=True)
class When:
    """Moments at which entries are dropped; part of every policy, whatever its method.

    Attributes
    ----------
    decode : str
        ``"grow"``: new tokens are always kept. ``"evict"``: what each head kept of the prompt is its capacity from then on.
        Whenever a forward leaves a head with more, the method ranks what is there again and drops the rest.
    interval : int
        With ``evict``: drop so many entries at once that the next ``interval - 1`` tokens fit without dropping (lazy
        eviction). The capacity holds at every step, so the mean fill is lower by about half the interval.
    positions : str
        ``"true"``: entries keep the rotation of their true position. ``"cache"``: keys are rotated by their index in the
        cache (StreamingLLM, arXiv 2309.17453), so that generation can go past the trained context.
    chunk : int
        Feed the prompt in chunks of that many tokens and evict between them; 0: the whole prompt at once.
    """

    decode: Literal["grow", "evict"] = "grow"
    interval: int = 1
    positions: Literal["true", "cache"] = "true"
    chunk: int = 0

    def __post_init__(self) -> None:
        for name, value, low in (("interval", self.interval, 1), ("chunk", self.chunk, 0)):
            if value < low:
                raise ConfigError(f"{name}={value} must be at least {low}")
        if self.interval > 1 and self.decode != "evict":
            raise ConfigError(f"interval={self.interval} is for policies that evict while decoding; add decode=evict")
