"""One model over several devices, by accelerate's device maps (extra ``devices``)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from kvtool.errors import CapacityError, ConfigError, MissingDependencyError, near_matches

KINDS = ("auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(kind: str) -> str:
    """Return `kind` if accelerate knows it and is installed.

    Raises
    ------
    ConfigError
        Unknown kind.
    MissingDependencyError
        accelerate is not installed.
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown device map {kind!r}.{near_matches(kind, KINDS)} Known: {', '.join(KINDS)}")
    if find_spec("accelerate") is None:
        raise MissingDependencyError(
            "--device-map needs accelerate, which is not installed; run: pip install 'kvtool[devices]'"
        )
    return kind


def places_for(model: Any, kind: str) -> dict[str, Any]:
    """Return module name -> device for a model on torch's meta device.

    Raises
    ------
    CapacityError
        The accelerators cannot hold it.
    """
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory

    whole = list(getattr(model, "_no_split_modules", None) or [])
    limits = None
    if kind != "sequential":
        limits = get_balanced_memory(model, no_split_module_classes=whole, low_zero=kind == "balanced_low_0")
    places: dict[str, Any] = infer_auto_device_map(model, max_memory=limits, no_split_module_classes=whole)
    return check_places(places)


def check_places(places: Mapping[str, Any]) -> dict[str, Any]:
    """Return the map, unless it moves layers that the accelerators have no room for to the CPU or to disk.

    Raises
    ------
    CapacityError
        It does: what is measured then is the bus.
    """
    import torch

    away = sorted(
        name for name, place in places.items() if str(place) == "disk" or (str(place) == "cpu" and torch.cuda.is_available())
    )
    if away:
        raise CapacityError(
            f"the devices have no room for {len(away)} parts of the model ({away[0]} first), which a device map would move away; "
            "use a smaller dtype or model, or more devices"
        )
    return dict(places)


def dispatch(model: Any, places: Mapping[str, Any]) -> None:
    """Let activations follow the layers from device to device."""
    from accelerate import dispatch_model

    if len({str(place) for place in places.values()}) > 1:
        dispatch_model(model, device_map=dict(places))


def devices_of(model: Any) -> list[Any]:
    """Return the devices of a model's parameters, in order of appearance."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))
