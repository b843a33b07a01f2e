"""What the attention sink is worth: window-only against StreamingLLM, perplexity on real text, token by token.

    python benchmarks/sink_ablation.py [TOKENS]

The embedded model reads passages of Walden (which it was not trained on) one token at a time through a `CompressedCache`
that evicts at every step, so it never sees more than the window, with or without the first 4 tokens. Both have the same
capacity. Perplexity over the tokens after the largest window; intervals by bootstrap over the passages, ratios paired.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from kvtool.infer.cache import CompressedCache
from kvtool.models import LoadedModel, load_model
from kvtool.progress import track

RESULT = Path(__file__).parent / "results" / "sink_ablation"
PASSAGES, WINDOWS, SINK = 16, (32, 64, 128, 256, 512), 4


def passages(loaded: LoadedModel, n_tokens: int) -> torch.Tensor:
    """Return evenly spaced passages of the book, each with the model's first token, ``[PASSAGES, n_tokens]``."""
    text = (Path(__file__).parents[1] / "data/text/walden.txt").read_text(encoding="utf-8")
    starts = [len(text) * i // PASSAGES for i in range(PASSAGES)]
    rows = [loaded.tokenizer(text[start : start + 8 * n_tokens]).input_ids[:n_tokens] for start in starts]
    return torch.tensor(rows)


def losses(loaded: LoadedModel, ids: torch.Tensor, policy: str) -> np.ndarray:
    """Return the negative log-likelihood of every token but the first, ``[PASSAGES, n_tokens - 1]``."""
    cache, found = CompressedCache(policy, loaded.model), []
    with torch.no_grad():
        for i in track(range(ids.shape[1] - 1), ids.shape[1] - 1, policy):
            logits = loaded.model(ids[:, i : i + 1], past_key_values=cache).logits[:, -1].float()
            found.append(-logits.log_softmax(-1).gather(1, ids[:, i + 1 : i + 2])[:, 0])
    if policy != "full":
        capacity = int(policy.partition("budget=")[2].partition(",")[0])
        assert max(n for layer in cache.entries() for row in layer for n in row) == capacity
    return torch.stack(found, dim=1).numpy()


def interval(values: np.ndarray, rng: np.random.Generator) -> list[float]:
    """Return exp of the mean, and its 95 % bootstrap interval over passages."""
    draws = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    return [float(np.exp(x)) for x in (values.mean(), *np.quantile(draws, [0.025, 0.975]))]


def main() -> None:
    n_tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 1537
    torch.set_num_threads(1)
    loaded = load_model("tiny", device="cpu")
    ids, rng = passages(loaded, n_tokens), np.random.default_rng(0)
    counted = slice(max(WINDOWS), None)
    full = losses(loaded, ids, "full")[:, counted].mean(1)
    rows = [{"policy": "full", "perplexity": interval(full, rng)}]
    for size in WINDOWS:
        texts = [f"window:budget={size},decode=evict", f"streaming:budget={size},sink={SINK},decode=evict"]
        per_passage = [losses(loaded, ids, text)[:, counted].mean(1) for text in texts]
        rows += [{"policy": t, "perplexity": interval(x, rng)} for t, x in zip(texts, per_passage, strict=True)]
        rows[-2]["over_streaming"] = interval(per_passage[0] - per_passage[1], rng)
    value = {
        "command": "python benchmarks/sink_ablation.py" + (f" {n_tokens}" if n_tokens != 1537 else ""),
        "model": loaded.info.fingerprint,
        "text": "walden.txt",
        "passages": PASSAGES,
        "tokens_counted": n_tokens - 1 - max(WINDOWS),
        "versions": {"python": platform.python_version(), "torch": version("torch")},
        "rows": rows,
    }
    RESULT.with_suffix(".json").write_text(json.dumps(value, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(table(value))
    print(table(value))


def table(value: dict[str, object]) -> str:
    """Return the result as Markdown."""
    lines = [
        f"`{value['command']}`: embedded model, {value['passages']} passages of {value['text']}, "
        f"{value['tokens_counted']} tokens each, one token at a time",
        "",
        "| policy | perplexity (95 %) | over StreamingLLM of the same capacity |",
        "| --- | --- | --- |",
    ]
    for row in value["rows"]:  # type: ignore[attr-defined]
        point, low, high = row["perplexity"]
        ratio = row.get("over_streaming")
        more = (
            ""
            if ratio is None
            else f"{100 * (ratio[0] - 1):+.1f} % ({100 * (ratio[1] - 1):+.1f} to {100 * (ratio[2] - 1):+.1f})"
        )
        lines.append(f"| `{row['policy']}` | {point:.2f} ({low:.2f}-{high:.2f}) | {more} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
