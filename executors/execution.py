"""How a run is carried out. None of this decides its result, so none of it is part of a run's identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvtool.errors import ConfigError

EXECUTORS = ("local", "ray")


@dataclass(frozen=True, slots=True)
class Shard:
    """Share number `index` of `count`, counted from 0: samples `index`, `index + count`, ...

    Raises
    ------
    ConfigError
        No such share.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            last = max(1, self.count) - 1
            raise ConfigError(
                f"shard {self} does not exist: shards are counted from 0, so of {max(1, self.count)} there are "
                f"0/{last + 1} to {last}/{last + 1}"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``i/n``, for example ``0/4``.

        Raises
        ------
        ConfigError
            Other text, or no such share.
        """
        index, slash, count = text.partition("/")
        if not slash or not index.strip().isdecimal() or not count.strip().isdecimal():
            raise ConfigError(f"shard {text!r}: give i/n with i counted from 0, for example 0/4, 1/4, 2/4 and 3/4")
        return cls(int(index), int(count))

    def has(self, position: int) -> bool:
        """Return whether the sample at this position is in the share."""
        return position % self.count == self.index

    @property
    def name(self) -> str:
        """As part of a file name."""
        return f"{self.index}-of-{self.count}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


@dataclass(frozen=True, slots=True)
class RayOptions:
    """What a run asks of a Ray cluster.

    Attributes
    ----------
    address : str or None
        ``host:port`` or ``auto``; None: ``RAY_ADDRESS``, a cluster that runs on this machine, or a new one on this machine.
    cpus : float
        Per worker; also the number of threads that Ray gives to it.
    gpus : float or None
        Per worker; None: 1 if the model goes to CUDA, else 0.
    resources : mapping of str to float
        The cluster's own resources, per worker.
    workers : int or None
        Most workers; None: as many as the cluster has room for.
    tries : int
        So often may one unit's worker die before the unit is given up.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    workers: int | None = None
    tries: int = 3

    def __post_init__(self) -> None:
        for name, value in (("workers", self.workers), ("tries", self.tries)):
            if value is not None and value < 1:
                raise ConfigError(f"ray: {name}={value} must be at least 1")
        if not any(self.needs(self.gpus or 0.0).values()) and self.gpus is not None:
            raise ConfigError("ray: a worker must ask for something; give cpu or gpu a share above 0")

    @classmethod
    def parse(
        cls, resources: str = "", address: str | None = None, workers: int | None = None, tries: int | None = None
    ) -> RayOptions:
        """Read ``gpu=1,cpu=4,name=0.5``; a bare number where a name is missing, or a negative one, is refused.

        Raises
        ------
        ConfigError
            Unreadable text.
        """
        asked: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in resources.split(","))):
            name, _, value = (part.strip() for part in item.partition("="))
            try:
                amount = float(value)
            except ValueError:
                amount = -1.0
            if not name or not 0 <= amount < float("inf"):
                raise ConfigError(f"ray resources {item!r}: give name=amount, for example gpu=1,cpu=4")
            asked[name.lower() if name.lower() in ("cpu", "gpu") else name] = amount
        cpus, gpus = asked.pop("cpu", 1.0), asked.pop("gpu", None)
        return cls(address, cpus, gpus, asked, workers, 3 if tries is None else tries)

    def needs(self, gpus: float) -> dict[str, float]:
        """Return what one worker takes of a node, in Ray's own names."""
        return {"CPU": self.cpus, "GPU": gpus, **self.resources}


@dataclass(frozen=True, slots=True)
class Execution:
    """How a run is carried out.

    Attributes
    ----------
    shard : Shard or None
        Do only this share of the samples; None: all.
    ray : RayOptions or None
        Do them on a Ray cluster; None: in this process.
    device, device_map : str, str or None
        Where workers of a cluster put the model, as in `kvtool.models.load_model`; this process has loaded its own already.
    retry_failed : bool
        Try units again that an earlier run gave up.
    """

    shard: Shard | None = None
    ray: RayOptions | None = None
    device: str = "auto"
    device_map: str | None = None
    retry_failed: bool = False

    def mine(self, position: int) -> bool:
        """Return whether this run is to do the sample at this position."""
        return self.shard is None or self.shard.has(position)


LOCAL = Execution()
