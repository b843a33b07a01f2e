"""Run policies on samples for real: one record per (sample, policy), appended as it is done; a stopped run continues."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kvtool.errors import ConfigError, DataError
from kvtool.files import append_records, open_run, read_records
from kvtool.models import LoadedModel, check_length, tokenizer_hash
from kvtool.policies.base import Policy
from kvtool.policies.headfile import check_heads
from kvtool.policies.select import refuse_impossible
from kvtool.progress import track

if TYPE_CHECKING:
    from kvtool.data.tasks import Encoded
    from kvtool.infer.measure import Unit
    from kvtool.infer.summary import PolicyRow

SCHEMA = "kvtool.infer/1"
RECORDS = "records.jsonl"
PACKAGES = ("torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class InferConfig:
    """What an inference run does; together with model, prompts and policies it decides the records, timings apart.

    Attributes
    ----------
    task, model : str
        As the user named them.
    n : int
        Samples.
    length : int or None
        Prompt length in tokens, for tasks that build their prompts.
    seed : int
        Of the task.
    compress_at : str
        ``"prompt"``: a policy may see context and question. ``"context"``: the context only.
    answer_tokens : int
        Gold answer tokens that are fed teacher-forced, at most.
    max_new_tokens : int or None
        Tokens to generate at most; None: what the sample says.
    kernel : str
        See `kvtool.infer.kernels.KERNELS`.
    generate : bool
        False: only feed the gold answer, see `kvtool.infer.measure.measure`; no text, no task score, no times per token.
    """

    task: str
    model: str
    n: int
    length: int | None = None
    seed: int = 0
    compress_at: Literal["prompt", "context"] = "prompt"
    answer_tokens: int = 64
    max_new_tokens: int | None = None
    kernel: str = "auto"
    generate: bool = True

    def __post_init__(self) -> None:
        if self.compress_at not in ("prompt", "context"):
            raise ConfigError(f"compress_at={self.compress_at!r}; choose 'prompt' or 'context'")
        for name, low in (("n", 1), ("answer_tokens", 2), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"infer: {name}={value} must be at least {low}")


@dataclass(frozen=True, slots=True)
class InferSummary:
    """What an inference run left.

    Attributes
    ----------
    folder : Path
        Holds ``run.json`` and ``records.jsonl``.
    n_samples, n_units : int
        A unit is one (sample, policy).
    n_reused : int
        Units that an earlier, stopped run had finished.
    n_oom, n_impossible : int
        Units without a result: out of memory; a policy that cannot run on that prompt.
    rows : tuple of PolicyRow
        One per policy, the full cache first.
    seconds : float
        Wall time of this call.
    """

    folder: Path
    n_samples: int
    n_units: int
    n_reused: int
    n_oom: int
    n_impossible: int
    rows: tuple[PolicyRow, ...]
    seconds: float

    def text(self) -> str:
        """Return the table that the command prints."""
        from kvtool.infer.summary import text_table

        notes = [f"{self.n_units} units ({self.n_reused} from an earlier run) in {self.folder}"]
        notes += [f"{self.n_oom} units ran out of memory"] if self.n_oom else []
        notes += [f"{self.n_impossible} units are impossible: {_why(self.rows)}"] if self.n_impossible else []
        return "\n".join([text_table(self.rows), "", *notes])


def _why(rows: Sequence[PolicyRow]) -> str:
    return next((row.message for row in rows if row.n_impossible and row.message), "no reason was recorded")


def run_infer(
    config: InferConfig, loaded: LoadedModel, samples: Sequence[Encoded], policies: Sequence[Policy], out: str | Path
) -> InferSummary:
    """Run every policy, and the full cache, on every sample; stopped at any moment, the same call continues.

    Parameters
    ----------
    config : InferConfig
    loaded : LoadedModel
    samples : sequence of Encoded
        Of `kvtool.data.tasks.load_task`, with the config's task, n, length and seed.
    policies : sequence of Policy
        The full cache is added in front if it is missing; repeated ones run once.
    out : path
        Output folder.

    Raises
    ------
    ConfigError
        The folder holds another run, a prompt exceeds the model's context, or an unknown kernel.
    DataError
        No samples, or damaged records.
    """
    from kvtool.infer.cache import check_moments
    from kvtool.infer.kernels import check_kernel
    from kvtool.infer.summary import summarize
    from kvtool.infer.units import run_samples

    folder, began = Path(out), time.monotonic()
    check_kernel(config.kernel)
    if not samples:
        raise DataError(f"task {config.task!r} gave no samples; there is nothing to run")
    wanted = with_full(policies)
    for sample in samples:
        check_length(loaded.info, _n_tokens(sample, config), f"sample {sample.sample.id}")
    check_moments(wanted, loaded.model)
    at_context = config.compress_at == "context"
    refuse_impossible(wanted, [len(s.context_ids if at_context else s.prompt_ids) for s in samples])
    resumed = open_run(folder, run_identity(config, loaded, samples, wanted), provenance(loaded))
    path = folder / RECORDS
    found = {record["unit"]: record for record in read_records(path)} if resumed else {}
    n_reused = len(found)
    units = [[_unit(config, sample, policy) for policy in wanted] for sample in samples]
    todo = [row for row in units if any(unit.key not in found for unit in row)]
    if todo:
        _warm_up(loaded)
    n_total = sum(len(row) for row in units)
    for record in track(run_samples(loaded, todo, found), n_total, "infer", n_reused):
        append_records(path, [record])
    records = read_records(path)
    return InferSummary(
        folder=folder,
        n_samples=len(samples),
        n_units=n_total,
        n_reused=n_reused,
        n_oom=sum(r["status"] == "oom" for r in records),
        n_impossible=sum(r["status"] == "impossible" for r in records),
        rows=tuple(summarize(records)),
        seconds=time.monotonic() - began,
    )


def with_full(policies: Sequence[Policy]) -> list[Policy]:
    """Return the policies without repetition, the full cache first."""
    texts = dict.fromkeys(["full", *(str(policy) for policy in policies)])
    by_text = {str(policy): policy for policy in [Policy.parse("full"), *policies]}
    return [by_text[text] for text in texts]


def run_identity(
    config: InferConfig, loaded: LoadedModel, samples: Sequence[Encoded], policies: Sequence[Policy]
) -> dict[str, Any]:
    """Return everything that decides the records, as JSON values; refuses heads files of another model."""
    heads = check_heads(policies, loaded.info)
    prompts = hashlib.sha256()
    for encoded in samples:
        sample = encoded.sample
        record: list[Any] = [sample.id, encoded.context_ids, encoded.question_ids, encoded.answer_ids]
        record += [list(sample.answers), sample.metric, sample.max_new_tokens]
        prompts.update(json.dumps(record).encode())
    return {
        "schema": SCHEMA,
        **dataclasses.asdict(config),
        "n_samples": len(samples),
        "policies": [str(policy) for policy in policies],
        **({"heads": heads} if heads else {}),
        "fingerprint": loaded.info.fingerprint,
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "tokenizer": tokenizer_hash(loaded.tokenizer),
        "prompts": prompts.hexdigest()[:16],
    }


def provenance(loaded: LoadedModel) -> dict[str, Any]:
    """Return what else is worth keeping: versions, device, threads, start."""
    import platform
    from datetime import UTC, datetime
    from importlib.metadata import version

    import torch

    device = loaded.device
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "model": dataclasses.asdict(loaded.info),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _unit(config: InferConfig, sample: Encoded, policy: Policy) -> Unit:
    from kvtool.infer.measure import Unit

    return Unit(
        sample, policy, config.compress_at, _n_new(sample, config), config.answer_tokens, config.kernel, config.generate
    )


def _n_new(sample: Encoded, config: InferConfig) -> int:
    return config.max_new_tokens or sample.sample.max_new_tokens


def _n_tokens(sample: Encoded, config: InferConfig) -> int:
    return len(sample.prompt_ids) + max(min(len(sample.answer_ids), config.answer_tokens), _n_new(sample, config))


def _warm_up(loaded: LoadedModel) -> None:
    """Run a few tokens through prefill and decode, so that the first unit is not charged for lazy initialisation."""
    from kvtool.infer.generate import generate, prefill

    state = prefill(loaded.model, [0] * 8, (), 0)
    full = Policy.parse("full")
    generate(loaded.model, state, state.fork(full, state.choose(full)), [], 3, ())
