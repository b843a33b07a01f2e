"""Measure the embedded model for its card: accuracy by length, text loss, sink mass per head.

Run it as ``python -m kvtool.data.evaluate_tiny``.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvtool.attention import AttentionCall, attention_handler, dense_attention
from kvtool.data.metrics import score
from kvtool.data.tasks import Encoded, load_task
from kvtool.models import LoadedModel, load_model
from kvtool.policies.statistics import AttentionInputs, attention_rows

#: seed of the prompts of the card; training draws from another text and other seeds
SEED = 20_000
ROWS = 64


def accuracy(loaded: LoadedModel, spec: str, length: int, n: int) -> float:
    """Greedy exact match over `n` fresh prompts, plain transformers, full cache."""
    samples = load_task(spec, loaded.tokenizer, n, length, SEED)
    hits = 0.0
    for encoded in samples:
        ids = torch.tensor([encoded.prompt_ids], device=loaded.device)
        with torch.no_grad():
            out = loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=len(encoded.answer_ids),
                do_sample=False,
                pad_token_id=0,
            )
        hits += score("exact", loaded.tokenizer.decode(out[0, ids.shape[1] :]), encoded.sample.answers)
    return hits / n


def text_loss(loaded: LoadedModel, length: int, n: int) -> dict[str, float]:
    """Mean loss per token on unseen text; `late` is over the last quarter of the positions."""
    losses = []
    for encoded in load_task("text", loaded.tokenizer, n, length, SEED):
        ids = torch.tensor([encoded.prompt_ids], device=loaded.device)
        with torch.no_grad():
            logits = loaded.model(ids).logits[0, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").cpu().numpy())
    values = np.stack(losses)
    n_chars = np.mean([len(e.sample.context) for e in load_task("text", loaded.tokenizer, n, length, SEED)])
    late = values[:, -length // 4 :]
    return {
        "loss": float(values.mean()),
        "late_loss": float(late.mean()),
        "bits_per_character": float(values.mean() * length / n_chars / math.log(2)),
    }


def sink_mass(loaded: LoadedModel, samples: list[Encoded]) -> np.ndarray:
    """Mean attention of later queries to the first token, ``[L, Q]``; queries are `ROWS` evenly spaced positions past 64."""
    info = loaded.info
    total = np.zeros((info.n_layers, info.n_heads))

    def handler(call: AttentionCall) -> torch.Tensor:
        inputs = AttentionInputs(call.queries[0], call.keys[0], call.values[0], call.scaling, call.window)
        for row in np.linspace(64, inputs.seq_len - 1, ROWS).astype(int):
            total[call.layer] += attention_rows(inputs, int(row), int(row) + 1)[:, 0, 0].cpu().numpy() / ROWS
        return dense_attention(call)

    for encoded in samples:
        with torch.no_grad(), attention_handler(loaded.model, handler):
            loaded.model(torch.tensor([encoded.prompt_ids], device=loaded.device), logits_to_keep=1)
    return total / len(samples)


def evaluate(loaded: LoadedModel, n: int, lengths: list[int]) -> dict[str, Any]:
    """Return all figures of the card."""
    result: dict[str, Any] = {"n_prompts": n, "seed": SEED, "accuracy": {}, "text": {}}
    for kind in ("single", "multikey", "multivalue"):
        spec = f"niah:kind={kind}"
        result["accuracy"][kind] = {length: accuracy(loaded, spec, length, n) for length in lengths}
        print(kind, result["accuracy"][kind], flush=True)
    for length in lengths:
        result["text"][length] = text_loss(loaded, length, 8)
    for name, spec in (("niah", "niah"), ("text", "text")):
        mass = sink_mass(loaded, load_task(spec, loaded.tokenizer, 8, 1024, SEED))
        result[f"sink_mass_{name}"] = np.round(mass, 3).tolist()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    result = evaluate(load_model(args.model), args.n, args.lengths)
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
