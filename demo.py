"""The demonstration: every stage once, on needle prompts, ending in a report. Each step resumes by itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtool.models import LoadedModel

#: the real run uses other prompts than the capture
FRESH_SEED = 1000
POLICIES = ("window", "streaming", "h2o", "snapkv", "snapkv:window=16,kernel=15", "random")
BUDGETS = ("4%", "8%", "16%", "32%")


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """Size of the demonstration.

    Attributes
    ----------
    model : str
    length : int
        Prompt length in tokens.
    n : int
        Prompts captured, and as many fresh ones run for real.
    refine : int
        Configurations that get a masked teacher-forced forward.
    """

    model: str = "tiny"
    length: int = 1024
    n: int = 32
    refine: int = 12


@dataclass(frozen=True, slots=True)
class DemoSummary:
    """Where everything is, and the table that puts prediction beside reality."""

    out: Path
    report: Path
    table: str
    answer: str

    def text(self) -> str:
        """Return what the command prints."""
        return f"{self.table}\n\n{self.answer}\n\nreport: {self.report.resolve()}"


def run_demo(config: DemoConfig, loaded: LoadedModel, out: Path) -> DemoSummary:
    """Run capture, classify, simulate, infer and analyze into folder `out`.

    Parameters
    ----------
    config : DemoConfig
    loaded : LoadedModel
    out : Path

    Returns
    -------
    DemoSummary
    """
    from kvtool.analysis.runner import run_analyze
    from kvtool.capture.runner import CaptureConfig, run_capture
    from kvtool.classify.runner import run_classify
    from kvtool.data.tasks import load_task
    from kvtool.infer.runner import InferConfig, run_infer
    from kvtool.policies import expand_policies
    from kvtool.progress import say
    from kvtool.simulate.runner import SimulateConfig, run_simulate

    shared: dict[str, Any] = {"task": "niah", "model": config.model, "n": config.n, "length": config.length}
    say(f"1/5 capture: attention and answer gradients of {config.n} prompts of {config.length} tokens")
    samples = load_task("niah", loaded.tokenizer, config.n, config.length, seed=0)
    run_capture(CaptureConfig(**shared, seed=0), loaded, samples, out / "capture.h5")
    say("2/5 classify: what kind each head is")
    run_classify(out / "capture.h5", out / "heads.json")
    say(f"3/5 simulate: {len(POLICIES)} policies at {len(BUDGETS)} budgets, offline; then {config.refine} refined")
    simulation = SimulateConfig(capture=str(out / "capture.h5"), policies=POLICIES, budgets=BUDGETS, refine=config.refine)
    run_simulate(simulation, out / "simulate", loaded)
    say(f"4/5 infer: the same policies for real, on {config.n} fresh prompts")
    fresh = load_task("niah", loaded.tokenizer, config.n, config.length, seed=FRESH_SEED)
    run_infer(InferConfig(**shared, seed=FRESH_SEED), loaded, fresh, expand_policies(POLICIES, BUDGETS), out / "infer")
    say("5/5 analyze: prediction beside reality")
    summary = run_analyze(out / "simulate", out / "infer", out / "report")
    return DemoSummary(out, summary.report, summary.table, summary.answer)
