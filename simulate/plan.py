"""Make plans from a capture: harm curves of every head under one scorer, or the budgets that a policy gives, both averaged over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kvtool.errors import ConfigError, DataError
from kvtool.policies import Budget, Policy, kept_counts
from kvtool.policies.budgetfile import BudgetPlan, Levels, make_plan, read_budgets
from kvtool.policies.headfile import check_heads
from kvtool.policies.planfile import Plan, read_plan, write_plan
from kvtool.policies.shares import share
from kvtool.policies.text import method_key
from kvtool.policies.when import When
from kvtool.progress import track
from kvtool.simulate.curves import head_evidence, head_harm
from kvtool.simulate.evaluate import sample_table
from kvtool.simulate.prompts import usable_prompts

if TYPE_CHECKING:
    from kvtool.capture.reader import Capture, CapturedSample

Float = NDArray[np.float64]
#: Shares of the unprotected entries at which harm is measured: nothing, then finer where curves bend.
FREE_SHARES = np.concatenate([[0.0], np.geomspace(0.001, 1.0, 64)])


@dataclass(frozen=True, slots=True)
class SampleCurves:
    """What every head of one prompt loses at each of `FREE_SHARES`.

    Attributes
    ----------
    harm : ndarray of shape (N, L, H)
    evidence : ndarray of shape (N, L, H) or None
        Part of all heads' weighted attention to the evidence; None where the prompt names none.
    """

    harm: Float
    evidence: Float | None


def sample_curves(sample: CapturedSample, policy: Policy) -> SampleCurves:
    """Return the curves of one prompt under the policy's scores."""
    parts, views = policy.method.parts(), sample.views()
    protected = min(parts.selector.protected, sample.seq_len)
    orders = np.stack([parts.selector.order(parts.scorer.score(view)).numpy() for view in views])
    entries = protected + np.round(FREE_SHARES * (sample.seq_len - protected)).astype(np.int64)
    counts = np.broadcast_to(entries[:, None, None], (len(entries), *orders.shape[:2]))
    table = sample_table(sample)
    lost, whole = head_evidence(table, sample.evidence_positions, orders, counts)
    return SampleCurves(head_harm(table, orders, counts), lost / whole if whole > 0 else None)


def export_plan(captures: str | Path | Sequence[str | Path], scorer: str, out: str | Path) -> Plan:
    """Measure the harm curves of captures and write them as a plan; see `measure_plan`."""
    plan = measure_plan(captures, scorer, str(out))
    write_plan(Path(out), plan)
    return plan


def measure_plan(captures: str | Path | Sequence[str | Path], scorer: str, path: str = "") -> Plan:
    """Measure the harm curves of one or several captures.

    Where all prompts of a capture name their evidence, a head's curve is its harm plus what it loses of the evidence, on the scale of
    the capture's harm: losing all evidence counts as much as dropping everything. What few prompts cannot show is added, see
    `with_unseen`. Several captures (tasks) count alike: each one's
    curves are put on the same total.

    Parameters
    ----------
    captures : path or sequence of paths
    scorer : str
        Method that ranks and protects, text form without a budget, e.g. ``"snapkv:window=8,kernel=11"``. Its own budgets play no part.
    path : str
        Of the plan, for messages.

    Raises
    ------
    ConfigError
        A scorer with a budget, or one that cannot run for real.
    DataError
        A capture without probes, or whose prompts differ in the layers that can be compressed; captures of different models.
    """
    if "budget" in scorer:
        raise ConfigError(f"scorer {scorer!r} names a budget; a plan serves all budgets, leave it out")
    policy = Policy.parse(f"{scorer}{',' if ':' in scorer else ':'}budget=100%")
    if policy.method.simulate_only:
        raise ConfigError(f"scorer {scorer!r} looks into the future; no real run can follow such a plan")
    paths = [captures] if isinstance(captures, (str, Path)) else list(captures)
    found = [_measure_capture(each, policy) for each in paths]
    for other, name in zip(found[1:], paths[1:], strict=True):
        if other.model["fingerprint"] != found[0].model["fingerprint"] or other.layers != found[0].layers:
            raise DataError(f"captures {paths[0]} and {name} are of different models or layers; a plan is made for one model")
    totals = [float(each.harm[0].sum()) for each in found]
    shares = [each.harm / total for each, total in zip(found, totals, strict=True) if total > 0]
    return Plan(
        path=path,
        scorer=scorer,
        protected=policy.method.parts().selector.protected,
        free_shares=FREE_SHARES,
        harm=found[0].harm if len(found) == 1 or not shares else np.mean(shares, axis=0) * np.mean(totals),
        layers=found[0].layers,
        model=found[0].model,
        source=found[0].source if len(found) == 1 else {"captures": [each.source for each in found]},
    )


def with_unseen(curves: Float, n_prompts: int) -> Float:
    """Return mean curves with what prompts that were not seen may still lose, (N, L, H).

    Of n prompts none may have lost anything in a head's last entries, and yet the next one can: by the rule of succession with
    probability 1 / (n + 1). Its loss is taken as everything the head has to lose, its place as anywhere among the unprotected entries.
    """
    found: Float = curves + (1.0 - FREE_SHARES)[:, None, None] * curves[:1] / (n_prompts + 1)
    return found


@dataclass(frozen=True, slots=True)
class _Measured:
    harm: Float
    layers: tuple[int, ...]
    model: dict[str, Any]
    source: dict[str, Any]


def _measure_capture(path: str | Path, policy: Policy) -> _Measured:
    """Return the mean curves of a capture's prompts."""
    from kvtool.capture.reader import open_capture

    with open_capture(path) as capture:
        samples = usable_prompts(capture, "plan")
        harm, evidence, n_named = np.zeros(1), np.zeros(1), 0
        for sample in track(samples, len(samples), "plan"):
            found = sample_curves(sample, policy)
            harm = harm + found.harm / len(samples)
            if found.evidence is not None:
                evidence, n_named = evidence + found.evidence / len(samples), n_named + 1
        named = n_named == len(samples)
        curves = with_unseen(harm + float(harm[0].sum()) * evidence if named else harm, len(samples))
        return _Measured(curves, _layers(samples[0]), _model(capture), {**_source(capture, samples), "evidence": named})


def policy_budgets(capture_path: str | Path, text: str, length: int | None = None) -> BudgetPlan:
    """Return what a policy gives every head of a capture's prompts, averaged and put at one length.

    Per head the share of the unprotected entries is averaged over prompts, whose lengths may differ.

    Parameters
    ----------
    capture_path : path
    text : str
        Policy with its budget, e.g. ``"hace:heads=heads.json,budget=5%"``.
    length : int, optional
        Prompt length of the plan's entries; default: of the longest captured prompt.

    Raises
    ------
    ConfigError
        A policy without budgets of its own to hand on (``full``, a yardstick, one with options of the run), or whose budget does not hold
        the protected entries.
    DataError
        A capture whose prompts differ in the layers that can be compressed, that lacks a statistic, or is of another model than the
        policy's files.
    """
    from kvtool.capture.reader import open_capture

    policy = Policy.parse(text)
    _refuse_unplannable(policy)
    with open_capture(capture_path) as capture:
        check_heads([policy], capture.model)
        samples = usable_prompts(capture, "plan", probes=False)
        length = length or max(sample.seq_len for sample in samples)
        least = policy.minimum(length)
        total = policy.entries(length)
        shares = np.mean([_shares(sample, policy) for sample in track(samples, len(samples), "plan")], axis=0)
        # Rules that miss the budget keep what they keep on average, the others exactly what was asked for.
        exact = policy.exact
        wanted = total * shares.size if exact else round(float((least + shares * (length - least)).sum()))
        flat = share(wanted, (shares * (length - least)).flatten().tolist(), least, length)
        values = np.asarray(flat, dtype=np.int64).reshape(1, *shares.shape)
        budget = str(policy.budget) if exact else str(Budget(entries=max(2, round(float(values.mean())))))
        model, source = _model(capture), _source(capture, samples)
        layers = _layers(samples[0])
    table = Levels((budget,), "entries", values, length)
    return make_plan(scorer_text(policy), layers, table, model, {**source, "policy": str(policy)})


def scorer_text(policy: Policy) -> str:
    """Return the text form of what ranks under a policy, without budgets and without files: a plan stands alone."""
    method = policy.method
    if path := getattr(method, "plan", ""):
        return read_plan(path).scorer
    if path := getattr(method, "file", ""):
        return read_budgets(path).scorer
    if getattr(method, "heads", ""):
        method = replace(method, heads="")  # type: ignore[call-arg]
    return method_key(Policy(method, Budget.parse("100%")))


def _refuse_unplannable(policy: Policy) -> None:
    if policy.method.keeps_all:
        raise ConfigError(f"policy {policy} keeps everything; there are no budgets to plan")
    if policy.method.simulate_only:
        raise ConfigError(f"policy {policy} looks into the future; no real run can follow such a plan")
    if policy.compensation.active or policy.when != When() or policy.quant.active:
        raise ConfigError(
            f"policy {policy}: a plan holds what is kept of a prompt; leave compensate=, decode=, positions=, chunk= and quant= out, "
            "and give them to plan:file=... when you run it"
        )


def _shares(sample: CapturedSample, policy: Policy) -> np.ndarray:
    """Return the share of the unprotected entries that each head keeps, (L, H)."""
    parts, views = policy.method.parts(), sample.views()
    counts = np.asarray(kept_counts(policy, views, [parts.scorer.score(view) for view in views]), dtype=np.float64)
    least = min(policy.minimum(sample.seq_len), sample.seq_len)
    return (counts - least) / (sample.seq_len - least) if least < sample.seq_len else np.ones_like(counts)


def _layers(sample: CapturedSample) -> tuple[int, ...]:
    return tuple(int(layer) for layer in np.flatnonzero(sample.compressible))


def _model(capture: Capture) -> dict[str, Any]:
    return {key: getattr(capture.model, key) for key in ("model_id", "fingerprint", "n_layers", "n_heads", "n_kv_heads")}


def _source(capture: Capture, samples: list[CapturedSample]) -> dict[str, Any]:
    facts = {key: capture.config.get(key) for key in ("task", "n", "length", "seed")}
    return {**facts, "compress_at": samples[0].compress_at, "prompts": len(samples)}
