"""Are the errors that a calibration carries over the policies' own, or luck that both tasks share through their prompts?

    python benchmarks/fidelity.py WORK [MODEL ...] && python benchmarks/carry_over.py WORK

Calibrations are fitted on the other tasks of the same model, on one random half of the prompts, and judged on the other task: on the
same half of the prompts (same seeds, same haystacks), and on the other half. Kendall's tau-b within budgets against the real answer
accuracy of the judged half, mean over budgets whose order can be told from chance and over 10 splits. Writes ``results/carry_over.md``
and ``results/carry_over.json``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fidelity_report import finished

from kvtool.analysis.calibrate import Confirmed, confirmed, fit_calibration
from kvtool.analysis.fidelity import ORDER_LEVEL, order_p_value
from kvtool.analysis.load import load_reality, load_simulation
from kvtool.analysis.statistics import tau_b
from kvtool.calibration import Where
from kvtool.textgrid import markdown_grid

RESULT = Path(__file__).parent / "results" / "carry_over"
SPLITS = 10
NAMES = ("curve alone", "carried over, same prompts", "carried over, other prompts")


def part(pair: Confirmed, columns: Any) -> Confirmed:
    """Return a pair on some of its prompts."""
    return replace(pair, figures={k: v[:, columns] for k, v in pair.figures.items()}, real=pair.real[:, columns])


def tau(predicted: Any, judged: Confirmed, whole: Confirmed) -> float:
    """Return the mean tau within budgets whose order all prompts together can tell from chance."""
    found = []
    for budget in dict.fromkeys(whole.budgets):
        rows = np.flatnonzero(np.asarray(whole.budgets) == budget)
        if len(rows) > 2 and order_p_value(whole.real[rows]) < ORDER_LEVEL:
            found.append(float(np.nan_to_num(tau_b(predicted[rows][:, None], judged.real[rows].mean(1)[:, None])[0])))
    return float(np.mean(found))


def split(pairs: dict[str, list[Confirmed]], task: str, rng: np.random.Generator) -> list[list[float]]:
    """Return one row per run of a task: tau of the three predictions of `NAMES` on one random half."""
    others = [pair for other, each in pairs.items() if other != task for pair in each]
    order = rng.permutation(others[0].real.shape[1])
    first, second = np.array_split(order, 2)
    fits = [fit_calibration([part(pair, half) for pair in others]) for half in (second, first)]
    rows = []
    for pair in pairs[task]:
        judged = part(pair, second)
        where = Where(pair.setting.model, pair.setting.compress_at, pair.setting.length)
        figures = judged.figures if pair.setting.named else {"harm": judged.figures["harm"]}
        carried = [fit.predict_policies(figures, where, pair.methods, pair.shares).mean(1) for fit in fits]
        rows.append([tau(p, judged, pair) for p in (fits[0].predict(figures).mean(1), *carried)])
    return rows


def main() -> None:
    work, value, grid = Path(sys.argv[1]), dict[str, Any](), []
    for folder in sorted(path.parent for path in work.glob("*/heads.json")):
        pairs = {
            task: [confirmed(load_simulation(simulated), load_reality(run)) for simulated, run in each]
            for task, each in finished(folder, "same").items()
        }
        for task, each in pairs.items():
            rng = np.random.default_rng(0)
            means = np.mean([split(pairs, task, rng) for _ in range(SPLITS)], axis=0)
            for pair, row in zip(each, means.tolist(), strict=True):
                value[f"{folder.name}, {task}, {pair.setting.compress_at}"] = dict(zip(NAMES, row, strict=True))
                grid.append([folder.name, task, pair.setting.compress_at, *(f"{x:.2f}" for x in row)])
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    text = f"`python benchmarks/carry_over.py WORK`\n\n{markdown_grid(['model', 'task', 'compressed at', *NAMES], grid)}\n"
    RESULT.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
