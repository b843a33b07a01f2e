"""Make a plan from a capture: the harm curve of every head under one scorer, averaged over the captured prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvtool.errors import ConfigError, DataError
from kvtool.policies import Policy
from kvtool.policies.planfile import Plan, write_plan
from kvtool.progress import track
from kvtool.simulate.curves import head_harm
from kvtool.simulate.evaluate import sample_table

if TYPE_CHECKING:
    from kvtool.capture.reader import CapturedSample

#: Shares of the unprotected entries at which harm is measured: nothing, then finer where curves bend.
FREE_SHARES = np.concatenate([[0.0], np.geomspace(0.001, 1.0, 64)])


def sample_curves(sample: CapturedSample, policy: Policy) -> np.ndarray:
    """Return the harm of every head of one prompt at each of `FREE_SHARES`, (N, L, H)."""
    parts, views = policy.method.parts(), sample.views()
    protected = min(parts.selector.protected, sample.seq_len)
    orders = np.stack([parts.selector.order(parts.scorer.score(view)).numpy() for view in views])
    entries = protected + np.round(FREE_SHARES * (sample.seq_len - protected)).astype(np.int64)
    counts = np.broadcast_to(entries[:, None, None], (len(entries), *orders.shape[:2]))
    return head_harm(sample_table(sample), orders, counts)


def export_plan(capture_path: str | Path, scorer: str, out: str | Path) -> Plan:
    """Measure the harm curves of a capture and write them as a plan.

    Parameters
    ----------
    capture_path : path
    scorer : str
        Method that ranks and protects, text form without a budget, e.g. ``"snapkv:window=8,kernel=11"``. Its own budgets play no part.
    out : path

    Raises
    ------
    ConfigError
        A scorer with a budget, or one that cannot run for real.
    DataError
        A capture without probes, or whose prompts differ in the layers that can be compressed.
    """
    from kvtool.capture.reader import open_capture

    if "budget" in scorer:
        raise ConfigError(f"scorer {scorer!r} names a budget; a plan serves all budgets, leave it out")
    policy = Policy.parse(f"{scorer}{',' if ':' in scorer else ':'}budget=100%")
    if policy.method.simulate_only:
        raise ConfigError(f"scorer {scorer!r} looks into the future; no real run can follow such a plan")
    with open_capture(capture_path) as capture:
        samples = [sample for sample in capture.samples if sample.n_probe]
        masks = {sample.compressible for sample in samples}
        if len(masks) != 1 or not any(next(iter(masks))):
            raise DataError(
                f"capture {capture_path} has no prompts with probes, or prompts that differ in which layers can be compressed; "
                "capture prompts of one length with answers of several tokens"
            )
        mean: np.ndarray | None = None
        for sample in track(samples, len(samples), "plan"):
            found = sample_curves(sample, policy) / len(samples)
            mean = found if mean is None else mean + found
        assert mean is not None
        model = capture.model
        plan = Plan(
            path=str(out),
            scorer=scorer,
            protected=policy.method.parts().selector.protected,
            free_shares=FREE_SHARES,
            harm=mean,
            layers=tuple(int(layer) for layer in np.flatnonzero(next(iter(masks)))),
            model={key: getattr(model, key) for key in ("model_id", "fingerprint", "n_layers", "n_kv_heads")},
            source={
                **{key: capture.config.get(key) for key in ("task", "n", "length", "seed")},
                "compress_at": samples[0].compress_at,
                "prompts": len(samples),
            },
        )
    write_plan(Path(out), plan)
    return plan
