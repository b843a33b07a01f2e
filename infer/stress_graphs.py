"""The timed decode steps of a stress test once more, with fixed shapes: on CUDA replayed as graphs (`kvtool.infer.graphs`)."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from kvtool.errors import ConfigError, is_out_of_memory
from kvtool.infer.graphs import GreedyDecoder

if TYPE_CHECKING:
    from torch import Tensor

    from kvtool.infer.cache import CompressedCache
    from kvtool.infer.stress_run import Bench

#: Steps that are not timed: the first one warms up, the second one is captured, the others are replays already.
WARM_STEPS = 4


def fixed_steps(bench: Bench, cache: CompressedCache, tokens: Tensor) -> dict[str, Any]:
    """Decode on with fixed shapes and return the fields of the record.

    Parameters
    ----------
    bench : Bench
    cache : CompressedCache
        Its stores are fixed from now on; nothing grows while it is timed.
    tokens : Tensor ``[B, 1]``
        Chosen last.

    Returns
    -------
    dict
        ``fixed_step_s``, ``fixed_tpot_s``, ``fixed_limit_share``, ``graphs_replayed`` and, where there are no such steps or no graphs,
        ``fixed_why_not``.
    """
    import torch

    fields: dict[str, Any] = {
        "fixed_step_s": None,
        "fixed_tpot_s": None,
        "fixed_limit_share": None,
        "graphs_replayed": 0,
        "fixed_why_not": None,
    }
    seen = torch.full((len(tokens),), cache.layers[0].seen, device=tokens.device)
    try:
        decoder = GreedyDecoder(bench.loaded.model, cache, tokens, seen, window=WARM_STEPS + bench.n_new)
        decoder.decode(WARM_STEPS)
    except ConfigError as error:
        return fields | {"fixed_why_not": str(error)}
    except (RuntimeError, MemoryError) as error:
        # The run's own figures stand: only the room for fixed shapes did not fit.
        if not is_out_of_memory(error):
            raise
        return fields | {"fixed_why_not": "out of memory while shapes were being fixed"}
    step_s, used = [], [cache.count_bytes().used]
    for _ in range(bench.n_new):
        started = bench.now()
        decoder.decode(1)
        step_s.append(bench.now() - started)
    used.append(cache.count_bytes().used)
    tpot_s = statistics.median(step_s)
    return fields | {
        "fixed_step_s": [round(seconds, 7) for seconds in step_s],
        "fixed_tpot_s": tpot_s,
        "fixed_limit_share": bench.limit_share(tpot_s, statistics.fmean(used)),
        "graphs_replayed": decoder.n_replayed,
        "fixed_why_not": decoder.problem or (None if decoder.capture else "shapes are fixed, but graphs need CUDA"),
    }
