"""The commands about size and speed: shapes and stress tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtool.cli_options import emit, json_option, load_named, model_options, out_option, policy_options, read_budgets

if TYPE_CHECKING:
    from kvtool.infer.stress_plan import StressConfig
    from kvtool.models import LoadedModel
    from kvtool.policies import Policy
    from kvtool.shapes import Footprint, Shape

UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class Size(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """Bytes, as in 24GB (powers of ten) or 80GiB (powers of two)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the text."""
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if found is None or found[2].upper() not in UNITS:
            self.fail(f"{value!r} is no size; give one such as 24GB or 80GiB", param, ctx)
        return int(float(found[1]) * UNITS[found[2].upper()])


class Bound(click.ParamType):  # type: ignore[type-arg,unused-ignore]
    """A whole number, or ``oom``: double until memory is out."""

    name = "n|oom"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Read the text."""
        from kvtool.infer.stress_plan import UNTIL_OOM

        if isinstance(value, int):
            return value
        if value == "oom":
            return UNTIL_OOM
        if not value.isdigit() or int(value) < 1:
            self.fail(f"{value!r} is neither a whole number from 1 nor 'oom'", param, ctx)
        return int(value)


@click.command()
@click.option("--length", type=click.IntRange(1), default=4096, show_default=True, help="Tokens per sequence.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences.")
@click.option("--memory", type=Size(), default=None, help="Memory there is, e.g. 24GB or 80GiB: what fits?")
@click.option("--retention", "-r", default="5%", show_default=True, help="Budget of a policy: 5%, 0.05 or 64entries.")
@click.option(
    "--dtype", type=click.Choice(list(ITEM_BYTES)), default="bfloat16", show_default=True, help="Of weights and cache."
)
@json_option
def shapes(length: int, batch: int, memory: int | None, retention: str, dtype: str, as_json: bool) -> None:
    """List the architectures that --model shape:NAME builds with random weights, and what they take.

    \b
    kvtool shapes
    kvtool shapes --length 32768 --batch 16 --memory 80GB -r 2%
    """
    from kvtool.policies import Budget
    from kvtool.shapes import SHAPES, footprint

    budget = Budget.parse(retention)
    kept = min(1.0, budget.resolve(length) / length)
    found = [
        (shape, footprint(shape, length, batch, kept=kept, memory=memory, itemsize=ITEM_BYTES[dtype]))
        for shape in SHAPES.values()
    ]
    facts = [_shape_facts(shape, size) for shape, size in found]
    emit(as_json, facts, _shape_table(found, length, batch, str(budget), memory))


def _shape_facts(shape: Shape, size: Footprint) -> dict[str, Any]:
    return {
        "name": shape.name,
        "family": shape.family,
        "parameters": shape.n_parameters,
        "layers": shape.n_layers,
        "heads": shape.n_heads,
        "kv_heads": shape.n_kv_heads,
        "head_dim": shape.head_dim,
        "context": shape.context,
        "source": shape.source,
        "remark": shape.remark,
        **{name: getattr(size, name) for name in size.__dataclass_fields__},
        "possible_speedup": size.possible_speedup,
    }


def _shape_table(found: list[tuple[Shape, Footprint]], length: int, batch: int, budget: str, memory: int | None) -> str:
    from kvtool.textgrid import grid

    header = ["shape", "parameters", "layers", "heads", "KV heads", "head dim", "context", "weights GB", "KV B/token"]
    header += ["KV GB", f"at {budget}", "speed-up at most"]
    header += ["fits", f"at {budget}", "longest", f"at {budget}"] if memory is not None else []
    rows = []
    for shape, size in found:
        row = [shape.name, f"{shape.n_parameters / 1e9:.3f} B", *map(str, (shape.n_layers, shape.n_heads, shape.n_kv_heads))]
        row += [str(shape.head_dim), str(shape.context), f"{size.weight_bytes / 1e9:.2f}", f"{size.kv_bytes_per_token:,}"]
        row += [f"{size.kv_bytes / 1e9:.3f}", f"{size.kept_bytes / 1e9:.3f}", f"{size.possible_speedup:.2f}"]
        if memory is not None:
            row += ["yes" if fits else "no" for fits in (size.fits, size.kept_fits)] + [
                f"{size.longest:,}",
                f"{size.kept_longest:,}",
            ]
        rows.append(row)
    notes = [f"KV cache of {batch} x {length} tokens, in full and with a budget of {budget}; activations come on top."]
    notes += ["Speed-up at most: what reading fewer bytes can bring a decode step, (weights + full cache) / (weights + kept)."]
    notes += [f"{shape.name}: {shape.remark}" for shape, _ in found if shape.remark]
    notes += [
        "Use: --model shape:NAME, with ,context=N ,layers=N ,seed=N to change it. Weights are random: scores mean nothing."
    ]
    return "\n".join([grid(header, rows), "", *notes])


@click.command()
@model_options
@policy_options
@click.option(
    "--length", type=click.IntRange(2), default=512, show_default=True, help="Prompt length; the length series begins here."
)
@click.option(
    "--max-length",
    type=Bound(),
    default=None,
    help="Double the length up to N, or until memory is out.  [default: native context]",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences; the batch series begins here.")
@click.option("--max-batch", type=Bound(), default=None, help="Double the batch up to N, or until memory is out.")
@click.option("--new", "n_new", type=click.IntRange(2), default=32, show_default=True, help="Timed decode steps of each run.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True, help="Timed runs of each point.")
@click.option("--warm-ups", type=click.IntRange(0), default=1, show_default=True, help="Untimed runs before them.")
@click.option(
    "--endless", type=click.IntRange(0), default=0, help="Decode N tokens over one cache; needs policies with decode=evict."
)
@click.option("--window", type=click.IntRange(1), default=1000, show_default=True, help="Tokens per record of --endless.")
@click.option("--kernel", default="auto", show_default=True, help="Attention kernel; auto takes the fastest that runs here.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the prompts.")
@click.option("--graphs", is_flag=True, help="Time decode steps with fixed shapes, too: CUDA graphs, where there is CUDA.")
@click.option("--dry-run", is_flag=True, help="List the points with an estimate of their memory; run nothing.")
@out_option("stress", "Folder to write.")
@json_option
def stress(
    model: str, device: str, dtype: str, policies: tuple[str, ...], retention: str, heads: str, dry_run: bool, out: Path, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """How long, how many at once and how far: time and memory against length, batch and tokens decoded.

    The full cache is always measured beside the policies, twice: the difference is the noise floor. Out of memory is a row.
    Without --max-length, --max-batch and --endless, the length doubles up to the model's native context.

    \b
    kvtool stress -p snapkv -p adakv -r 2% --max-length 4096
    kvtool stress -m shape:llama-0.3b -p snapkv -r 2% --length 1024 --max-length 8192 --max-batch 8
    kvtool stress -p streaming:budget=256,decode=evict,positions=cache --endless 20000
    """
    from kvtool.errors import KvtoolError
    from kvtool.infer.kernels import check_kernel
    from kvtool.infer.stress import run_stress
    from kvtool.infer.stress_plan import StressConfig, endless_policies
    from kvtool.policies import expand_policies

    chosen = expand_policies(policies or ("snapkv",), read_budgets(retention), real=True, heads=heads)
    if options["endless"]:
        endless_policies(chosen)  # what is wrong is said before a model is loaded
    check_kernel(options["kernel"])
    loaded = load_named(model, device, dtype)
    if options["max_length"] is None and options["max_batch"] is None and not options["endless"]:
        options["max_length"] = loaded.info.max_positions
    config = StressConfig(model=model, **options)
    if dry_run:
        rows = _planned(config, loaded, chosen)
        lines = [
            f"{r['policy']}, length {r['length']}, batch {r['batch']}: about {r['estimate_bytes'] / 1e9:.2f} GB" for r in rows
        ]
        emit(as_json, rows, "\n".join([*lines, f"{len(rows)} points of {config.repeats} runs"]))
        return
    summary = run_stress(config, loaded, chosen, out)
    emit(as_json, summary, summary.text())
    if "ok" not in [*(row.status for row in summary.rows), *(row.status for row in summary.endless)]:
        raise KvtoolError("stress: nothing could be measured; the table's notes say why")


def _planned(config: StressConfig, loaded: LoadedModel, chosen: list[Policy]) -> list[dict[str, Any]]:
    """Return the points of the series up to the first that does not fit, with what they need."""
    from kvtool.infer.stress_memory import SAFE_SHARE, free_bytes, needed_bytes
    from kvtool.infer.stress_plan import rounds, with_full

    free, rows = free_bytes([loaded.device]), []
    for runs in rounds(config, with_full(chosen)):
        if runs[0].repeat:
            continue
        sizes = [needed_bytes(loaded, run.policy, run.batch, run.length, config.n_new) for run in runs]
        fits = [free is None or size <= SAFE_SHARE * free for size in sizes]
        for run, size, fit in zip(runs, sizes, fits, strict=True):
            rows.append({**run.point, "estimate_bytes": size, "free_bytes": free, "fits": fit})
        if not any(fits):
            break
    return rows
