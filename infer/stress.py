"""Stress test: how long, how many at once and how far a model decodes under each policy; every run is appended as it is done.

Out of memory is a row, and the test goes on. A stopped test continues; a run that was cut short is the only one measured again.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError, is_out_of_memory
from kvtool.files import append_records, config_hash, open_run, read_records
from kvtool.infer.bandwidth import Bandwidth, measure_bandwidth
from kvtool.infer.cache import check_moments
from kvtool.infer.kernels import check_kernel
from kvtool.infer.runner import provenance
from kvtool.infer.stress_memory import SAFE_SHARE, free_bytes, needed_bytes, release_memory
from kvtool.infer.stress_plan import FATAL, Run, StressConfig, endless_policies, rounds, too_long, with_full
from kvtool.infer.stress_prompts import Book
from kvtool.infer.stress_run import Bench, Window, endless, timed_run
from kvtool.models import LoadedModel, rotary
from kvtool.policies.base import Policy
from kvtool.policies.headfile import check_heads
from kvtool.progress import say

if TYPE_CHECKING:
    from kvtool.infer.stress_table import StressSummary

SCHEMA = "kvtool.stress/1"
RECORDS = "records.jsonl"


def run_stress(
    config: StressConfig, loaded: LoadedModel, policies: Sequence[Policy], out: str | Path, bandwidth: Bandwidth | None = None
) -> StressSummary:
    """Measure every policy, and the full cache twice, at every length and batch; then decode endlessly.

    Parameters
    ----------
    config : StressConfig
    loaded : LoadedModel
    policies : sequence of Policy
        The full cache is added in front.
    out : path
        Output folder.
    bandwidth : Bandwidth, optional
        Of the device; default: it is measured.

    Raises
    ------
    ConfigError
        The folder holds another test, nothing is asked for, or a policy that this model cannot serve.
    """
    from kvtool.infer.stress_report import write_summary

    folder, began = Path(out), time.monotonic()
    check_kernel(config.kernel)
    wanted = with_full(policies)
    lasting = endless_policies(wanted) if config.endless else []
    check_moments(wanted, loaded.model)
    if config.max_length is None and config.max_batch is None and not config.endless:
        raise ConfigError("stress: nothing to measure; give --max-length, --max-batch or --endless")
    resumed = open_run(folder, identity(config, loaded, wanted), provenance(loaded))
    found = {record["unit"]: record for record in read_records(folder / RECORDS)} if resumed else {}
    if found:
        say(f"stress: {len(found)} records were made by an earlier run")
    say("stress: measuring the memory bandwidth")
    bench = Bench.of(loaded, config.n_new, config.kernel, bandwidth or measure_bandwidth(loaded.device), graphs=config.graphs)
    test = _Test(config, bench, Book.read(loaded), wanted, folder / RECORDS, found)
    for _ in test.series():
        pass
    for policy in lasting:
        test.endless(policy)
    return write_summary(folder, read_records(folder / RECORDS), loaded.info, time.monotonic() - began)


def identity(config: StressConfig, loaded: LoadedModel, policies: Sequence[Policy]) -> dict[str, Any]:
    """Return everything that decides the figures, as JSON values; the device and its threads among it."""
    facts, asked = provenance(loaded), dataclasses.asdict(config)
    heads = check_heads(policies, loaded.info)
    if not config.graphs:
        del asked["graphs"]  # tests begun before there was a choice go on
    return {
        "schema": SCHEMA,
        **asked,
        "policies": [str(policy) for policy in policies],
        **({"heads": heads} if heads else {}),
        "fingerprint": loaded.info.fingerprint,
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "device": facts["device"],
        "threads": facts["threads"],
        "torch": facts["versions"]["torch"],
    }


@dataclass(slots=True)
class _Test:
    """The state of a stress test: what was found, and which series of which policy have ended.

    Attributes
    ----------
    config : StressConfig
    bench : Bench
    book : Book
        Where the prompts come from.
    policies : list of Policy
    path : Path
        Of the records.
    found : dict
        Unit -> record.
    """

    config: StressConfig
    bench: Bench
    book: Book
    policies: list[Policy]
    path: Path
    found: dict[str, dict[str, Any]]

    def series(self) -> Iterator[dict[str, Any]]:
        """Run what is missing of the length and the batch series, and yield the new records."""
        ended: set[tuple[str, str]] = set()
        failed: set[str] = set()
        warm: set[str] = set()
        for runs in rounds(self.config, self.policies):
            for run in runs:
                point, series = config_hash(run.point), (run.series, str(run.policy))
                if point in failed or (series in ended):
                    continue
                record = self.found.get(run.key)
                if record is None:
                    record = self._measure(run, point not in warm)
                    warm.add(point)
                    self._append(record)
                    say(_line(record))
                    yield record
                if record["status"] != "ok":
                    failed.add(point)
                if record["status"] in FATAL:
                    ended.add(series)

    def _append(self, record: dict[str, Any]) -> None:
        append_records(self.path, [record])
        self.found[record["unit"]] = record

    def _measure(self, run: Run, cold: bool) -> dict[str, Any]:
        """Return the record of one run; what cannot be run is a result."""
        bench, loaded = self.bench, self.bench.loaded
        why = too_long(loaded.info, _learned_positions(loaded.model), run.length + bench.n_tokens)
        if why is not None:
            return run.blank("too long", why)
        try:
            run.policy.entries(run.length)
        except ConfigError as error:
            return run.blank("impossible", str(error))
        needed, free = self._needed(run), free_bytes(bench.devices)
        estimate = {"estimate_bytes": needed, "free_bytes": free}
        # CUDA says by itself when memory is out; a CPU's kernel would kill the process.
        if bench.devices[0].type != "cuda" and free is not None and needed > SAFE_SHARE * free:
            text = f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
            return {**run.blank("would not fit", text), **estimate}
        try:
            prompt = self.book.batch(run.batch, run.length, self.config.seed, bench.devices[0])
            for _ in range(self.config.warm_ups if cold else 0):
                timed_run(bench, run.policy, prompt)
            figures = timed_run(bench, run.policy, prompt)
        except ConfigError as error:
            return {**run.blank("impossible", str(error)), **estimate}
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            message = " ".join(str(error).split())[:300] or type(error).__name__
        else:
            return {**run.blank("ok", None), **figures, **estimate, **self._facts(run.length + bench.n_tokens)}
        release_memory()  # outside of the handler: the error's frames hold tensors
        return {**run.blank("oom", message), **estimate}

    def _facts(self, n_tokens: int) -> dict[str, Any]:
        """What every record with figures carries."""
        bench, info = self.bench, self.bench.loaded.info
        return {
            "weight_bytes": bench.weight_bytes,
            "weight_bytes_read": bench.read_bytes,
            "bandwidth_bytes_per_s": bench.bandwidth.bytes_per_s,
            "bandwidth_ways": bench.bandwidth.ways,
            "weights": info.weights or "of the model",
            "beyond_context": n_tokens > info.max_positions,
        }

    def _needed(self, run: Run) -> int:
        """Estimate a run's peak: by formula, and by what this policy took at half the length or batch."""
        half = (run.length // 2, run.batch) if run.series == "length" else (run.length, run.batch // 2)
        peaks = [
            r["prefill_peak_bytes"]
            for r in self.found.values()
            if r.get("prefill_peak_bytes") and r["policy"] == str(run.policy) and (r["length"], r["batch"]) == half
        ]
        return max(
            needed_bytes(self.bench.loaded, run.policy, run.batch, run.length, self.bench.n_tokens), 2 * max(peaks, default=0)
        )

    def endless(self, policy: Policy) -> None:
        """Decode endlessly: the model's own tokens, and a text where the weights are a model's own."""
        config, loaded = self.config, self.bench.loaded
        n, size = config.endless, config.window
        for source in ("own",) if loaded.info.weights else ("own", "text"):
            keys = [self._endless_key(policy, source, start) for start in range(0, n, size)]
            if all(key in self.found for key in keys) or self._endless_ended(policy, source):
                continue
            done = sum(key in self.found for key in keys)
            if done:
                say(f"endless {policy}, {source}: the first {done * size} tokens are decoded again to rebuild the cache")
            why = too_long(loaded.info, _learned_positions(loaded.model), config.length + n)
            if why is not None:
                self._append({**self._endless_blank(policy, source, 0), "status": "too long", "message": why})
                continue
            self._decode_endlessly(policy, source)

    def _decode_endlessly(self, policy: Policy, source: str) -> None:
        config = self.config
        n, length, start = config.endless, config.length, 0
        ids = self.book.stretch(length + n + 1, config.seed)
        text = ids[length:] if source == "text" else None
        try:
            for window in endless(self.bench, policy, ids[:length], text, n, config.window):
                start = window.stop
                record = {**self._endless_blank(policy, source, window.start), **_window_fields(window)}
                record |= {"text_repeats": self.book.copies(len(ids)) - 1, **self._facts(length + window.stop)}
                if record["unit"] not in self.found:
                    self._append(record)
                    say(_line(record))
            return
        except ConfigError as error:
            status, message = "impossible", str(error)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            status, message = "oom", " ".join(str(error).split())[:300]
        release_memory()
        self._append({**self._endless_blank(policy, source, start), "status": status, "message": message})

    def _endless_key(self, policy: Policy, source: str, start: int) -> str:
        return config_hash({"series": "endless", "policy": str(policy), "source": source, "start": start})

    def _endless_ended(self, policy: Policy, source: str) -> bool:
        mine = [
            r for r in self.found.values() if r["series"] == "endless" and r["policy"] == str(policy) and r["source"] == source
        ]
        return any(r["status"] != "ok" for r in mine)

    def _endless_blank(self, policy: Policy, source: str, start: int) -> dict[str, Any]:
        facts = {"series": "endless", "policy": str(policy), "source": source, "start": start, "length": self.config.length}
        return {
            "unit": self._endless_key(policy, source, start),
            **facts,
            "method": policy.method.name,
            "status": "ok",
            "message": None,
        }


def _learned_positions(model: Any) -> bool:
    """True for a table of positions, which ends; rotary ones do not."""
    found = rotary(model)
    return found is not None and found.inv_freq.numel() == 0


def _window_fields(window: Window) -> dict[str, Any]:
    fields = dataclasses.asdict(window)
    steps = sorted(fields.pop("step_s"))
    return {
        **fields,
        "tpot_s": statistics.median(steps),
        "tpot_quartiles_s": [steps[len(steps) // 4], steps[(3 * len(steps)) // 4]],
    }


def _line(record: dict[str, Any]) -> str:
    """One line of progress."""
    if record["series"] == "endless":
        where = f"endless {record['policy']}, {record['source']}, from token {record['start']}"
    else:
        again = " again" if record["again"] else ""
        where = f"{record['policy']}{again}, length {record['length']}, batch {record['batch']}, run {record['repeat'] + 1}"
    if record["status"] != "ok":
        return f"{where}: {record['status']}: {record['message']}"
    return f"{where}: {1000 * record['tpot_s']:.2f} ms a token"
