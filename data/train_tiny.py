"""Train the embedded model: a small Llama that really retrieves (``make train-tiny TEXT=...``).

The curriculum doubles the length from 128 to 4096 tokens. A sequence is plain text, a repeated segment (teaches
copying) or text with hidden needles and, at its end, questions whose answer repeats the needle's beginning.
Answer tokens weigh more in the loss. Checkpoints are written atomically; the same command resumes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from kvtool.data.needles import draw_facts

BOS, END = "<s>", "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything that decides the result, stored with every checkpoint."""

    vocab_size: int = 512
    hidden_size: int = 256
    n_layers: int = 4
    n_heads: int = 8
    n_kv_heads: int = 4
    intermediate_size: int = 704
    rope_theta: float = 500_000.0
    tokens_per_step: int = 16_384
    #: (sequence length, steps), in order
    curriculum: tuple[tuple[int, int], ...] = ((128, 220), (256, 330), (512, 250), (1024, 150), (2048, 150), (4096, 110))
    learning_rate: float = 3e-3
    final_fraction: float = 0.02
    decay_from: float = 0.55
    warmup_steps: int = 100
    weight_decay: float = 0.1
    answer_weight: float = 5.0
    needle_share: float = 0.6
    repeat_share: float = 0.15
    muon: bool = True
    #: bfloat16 multiplications; several times faster on processors that have them, many times slower on those that have not
    autocast: bool = True
    #: price per unit of head output (relative to the mean value norm): idle heads learn to rest on the first token
    output_price: float = 0.1
    #: price of attention that is not on the first token, see `_off_sink`
    sink_price: float = 0.2
    #: step from which both prices are charged: heads first learn what they are for
    prices_from: int = 667
    seed: int = 7

    @property
    def n_steps(self) -> int:
        return sum(steps for _, steps in self.curriculum)

    def length_at(self, step: int) -> int:
        """Sequence length of optimizer step `step`."""
        for length, steps in self.curriculum:
            if step < steps:
                return length
            step -= steps
        return self.curriculum[-1][0]

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, then cosine to `final_fraction` of the peak."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        start = self.decay_from * self.n_steps
        if step <= start:
            return self.learning_rate
        progress = (step - start) / (self.n_steps - start)
        return self.learning_rate * (self.final_fraction + (1 - self.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress)))


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Byte-level BPE with single digits; ``<s>`` is put in front of every encoded text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return tokenizer


class Samples:
    """Draws training sequences of any length from a tokenized corpus."""

    def __init__(self, recipe: Recipe, tokenizer: Tokenizer, corpus: np.ndarray) -> None:
        self._recipe = recipe
        self._tokenizer = tokenizer
        self._corpus = corpus
        self._stops = {i for token, i in tokenizer.get_vocab().items() if token.endswith(".")}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def batch(self, rng: np.random.Generator, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return token ids and loss weights of the *predicted* tokens, each ``[B, length + 1]``."""
        n = max(1, self._recipe.tokens_per_step // length)
        rows = [self._draw(rng, length + 1) for _ in range(n)]
        ids = torch.from_numpy(np.stack([r[0] for r in rows]).astype(np.int64))
        weights = torch.from_numpy(np.stack([r[1] for r in rows]).astype(np.float32))
        return ids, weights

    def _draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        kind = rng.random()
        if kind < self._recipe.needle_share:
            return self._needles(rng, length)
        if kind < self._recipe.needle_share + self._recipe.repeat_share:
            return self._repeats(rng, length)
        return self._finish([self._text(rng, length - 1)], length)

    def _text(self, rng: np.random.Generator, n: int) -> np.ndarray:
        start = int(rng.integers(len(self._corpus) - n))
        return self._corpus[start : start + n]

    def _finish(self, parts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
        ids = np.concatenate([np.zeros(1, dtype=np.int64), *parts])[:length]
        return ids, np.ones(length, dtype=np.float32)

    def _repeats(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        size = int(rng.integers(16, max(17, min(length // 2, 256))))
        noise = rng.random() < 0.5
        segment = rng.integers(2, self._recipe.vocab_size, size=size) if noise else self._text(rng, size)
        parts, filled = [], 0
        while filled < length:
            gap = self._text(rng, int(rng.integers(0, max(1, length // 4))))
            parts += [segment, gap]
            filled += len(segment) + len(gap)
        return self._finish(parts, length)

    def _needles(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        most = max(1, min(16, length // 64))
        n_facts = int(rng.integers(1, most + 1))
        multi = rng.random() < 0.3
        n_values = [int(rng.integers(2, 4)) if multi and rng.random() < 0.5 and length > 200 else 1 for _ in range(n_facts)]
        facts = draw_facts(rng, n_values)
        asked = rng.permutation(n_facts)[: max(1, min(n_facts, length // 96))]
        tail: list[tuple[list[int], float]] = []
        for index in asked:
            fact = facts[index]
            tail.append((self.encode(fact.question(int(rng.integers(1000)))), 1.0))
            tail.append((self.encode(fact.answer()), self._recipe.answer_weight))
        n_tail = sum(len(ids) for ids, _ in tail)
        statements = [(i, v, self.encode(s)) for i, f in enumerate(facts) for v, s in enumerate(f.statements())]
        n_filler = length - 1 - n_tail - sum(len(ids) for *_, ids in statements)
        if n_filler < 8:  # too many needles for this length: fewer facts
            return self._needles(rng, length)
        filler = self._text(rng, n_filler)
        # Statements of one fact keep their order; facts are interleaved at random.
        spots = np.sort(rng.integers(0, n_filler + 1, size=len(statements)))
        order = rng.permutation(len(statements))
        placed = sorted(range(len(statements)), key=lambda k: order[k])
        by_fact: dict[int, list[int]] = {}
        for k in sorted(placed, key=lambda k: statements[k][1]):
            by_fact.setdefault(statements[k][0], []).append(k)
        parts: list[np.ndarray] = []
        last = 0
        for spot, k in zip(spots, placed, strict=True):
            spot = max(last, self._sentence_start(filler, int(spot)))
            parts += [filler[last:spot], np.asarray(statements[by_fact[statements[k][0]].pop(0)][2])]
            last = spot
        parts.append(filler[last:])
        parts += [np.asarray(ids) for ids, _ in tail]
        ids, weights = self._finish(parts, length)
        weights[length - n_tail :] = np.concatenate([np.full(len(t), w, dtype=np.float32) for t, w in tail])
        return ids, weights

    def _sentence_start(self, filler: np.ndarray, spot: int) -> int:
        for back in range(spot, max(0, spot - 60), -1):
            if int(filler[back - 1]) in self._stops:
                return back
        return spot


def load_corpus(recipe: Recipe, text_path: Path, out: Path) -> tuple[Tokenizer, np.ndarray]:
    """Train (or read) the tokenizer and tokenize the text; both are kept in `out`."""
    tokenizer_file, ids_file = out / "tokenizer.json", out / "corpus.npy"
    opener = gzip.open if text_path.suffix == ".gz" else open
    if not ids_file.exists():
        with opener(text_path, "rt", encoding="utf-8") as handle:
            text = handle.read()
        tokenizer = train_tokenizer(text[:8_000_000], recipe.vocab_size)
        tokenizer.save(str(tokenizer_file))
        pieces = [text[i : i + 200_000] for i in range(0, len(text), 200_000)]
        ids = [np.asarray(e.ids, dtype=np.uint16) for e in tokenizer.encode_batch(pieces, add_special_tokens=False)]
        np.save(ids_file, np.concatenate(ids))
    return Tokenizer.from_file(str(tokenizer_file)), np.load(ids_file)


#: mean relative output norm of the heads of each layer, collected during one forward
_output_norms: list[torch.Tensor] = []
#: `_off_sink` of each layer, collected during one forward
_off_sinks: list[torch.Tensor] = []

N_SINK_ROWS = 32


def _off_sink(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """How little attention the first token gets: mean of -log(a_0 + 0.02), scaled to 0 ... 1, over evenly spaced queries."""
    length = query.shape[2]
    rows = torch.linspace(16, length - 1, N_SINK_ROWS).long()
    keys = key.float().repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query[:, :, rows].float() @ keys.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    logits = logits.masked_fill(torch.arange(length) > rows[:, None], float("-inf"))
    return -(logits.softmax(-1)[..., 0] + 0.02).log().mean() / 3.912


def causal_only(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention without a mask tensor that also collects how much its heads write."""
    scale = options.get("scaling")
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    _output_norms.append(output.float().norm(dim=-1).mean() / (value.float().norm(dim=-1).mean() + 1e-6))
    _off_sinks.append(_off_sink(query, key, scale))
    return output.transpose(1, 2).contiguous(), None


def build_model(recipe: Recipe) -> Any:
    """Return a fresh Llama with the recipe's shape."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("causal_only", causal_only)
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_kv_heads,
        # a prompt as long as the longest training sequence, and room for its answer
        max_position_embeddings=recipe.curriculum[-1][0] + 128,
        rope_parameters={"rope_type": "default", "rope_theta": recipe.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        attn_implementation="causal_only",
    )
    return LlamaForCausalLM(config)


def optimizers_of(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """AdamW for embeddings and norms; the hidden matrices by Muon (or by AdamW if ``recipe.muon`` is off)."""
    hidden = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" not in name]
    embedding = [p for name, p in model.named_parameters() if p.dim() > 1 and "embed" in name]
    norms = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": embedding, "weight_decay": recipe.weight_decay}, {"params": norms, "weight_decay": 0.0}]
    if not recipe.muon:
        groups.append({"params": hidden, "weight_decay": recipe.weight_decay})
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))]
    if recipe.muon:
        optimizers.append(
            torch.optim.Muon(hidden, lr=recipe.learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def loss_of(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted loss, the mean loss of plain tokens and of answer tokens."""
    losses = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    flat = weights[:, 1:].flatten()
    answers = flat > 1
    plain = losses[~answers].mean()
    answer = losses[answers].mean() if bool(answers.any()) else plain
    return (losses * flat).sum() / flat.sum(), plain.detach(), answer.detach()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(recipe: Recipe, text_path: Path, out: Path, max_minutes: float) -> None:
    """Run or resume the training in folder `out`; stops after `max_minutes` with a checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, corpus = load_corpus(recipe, text_path, out)
    samples = Samples(recipe, tokenizer, corpus)
    model = build_model(recipe)
    optimizers = optimizers_of(model, recipe)
    checkpoint, step, spent_s = out / "checkpoint.pt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent_s = state["step"], state["spent_s"]
    started = last_saved = time.monotonic()
    with (out / "log.jsonl").open("a") as log:
        while step < recipe.n_steps:
            length = recipe.length_at(step)
            ids, weights = samples.batch(np.random.default_rng([recipe.seed, step]), length)
            for group in (g for optimizer in optimizers for g in optimizer.param_groups):
                group["lr"] = recipe.rate_at(step)
            model.zero_grad(set_to_none=True)
            _output_norms.clear()
            _off_sinks.clear()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=recipe.autocast):
                logits = model(input_ids=ids[:, :-1], use_cache=False).logits
            loss, plain, answer = loss_of(logits, ids, weights)
            activity = torch.stack(_output_norms).mean()
            off_sink = torch.stack(_off_sinks).mean()
            prices = recipe.output_price * activity + recipe.sink_price * off_sink
            (loss + prices if step >= recipe.prices_from else loss).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
            step += 1
            now = time.monotonic()
            line = {
                "step": step,
                "length": length,
                "loss": float(loss),
                "text": float(plain),
                "answer": float(answer),
                "activity": float(activity),
                "off_sink": float(off_sink),
            }
            log.write(json.dumps({**line, "minutes": (spent_s + now - started) / 60}) + "\n")
            log.flush()
            stopping = now - started > 60 * max_minutes
            if now - last_saved > 180 or step == recipe.n_steps or stopping:
                state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers], "step": step}
                save_checkpoint(checkpoint, {**state, "spent_s": spent_s + now - started, "recipe": json.dumps(asdict(recipe))})
                last_saved = now
            if stopping:
                return


def export(out: Path, folder: Path) -> None:
    """Write the checkpoint of `out` as a transformers model folder (float32 safetensors, tokenizer, recipe)."""
    from transformers import PreTrainedTokenizerFast

    state = torch.load(out / "checkpoint.pt", weights_only=True)
    recipe = Recipe(
        **{**json.loads(state["recipe"]), "curriculum": tuple(map(tuple, json.loads(state["recipe"])["curriculum"]))}
    )
    model = build_model(recipe)
    model.load_state_dict(state["model"])
    model.config._attn_implementation = "sdpa"
    model.save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(out / "tokenizer.json"),
        bos_token=BOS,
        eos_token=END,
        model_max_length=recipe.curriculum[-1][0] + 128,
    )
    tokenizer.save_pretrained(folder)
    record = {"recipe": asdict(recipe), "steps": state["step"], "minutes": round(state["spent_s"] / 60, 1)}
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="training text, UTF-8, .txt or .txt.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer, checkpoint and log")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop with a checkpoint after this time")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="change one value of the recipe")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write the checkpoint as a transformers model and end")
    args = parser.parse_args()
    if args.export:
        export(args.out, args.export)
        return
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in args.set)}
    if "curriculum" in changes:
        changes["curriculum"] = tuple((int(a), int(b)) for a, b in changes["curriculum"])
    train(Recipe(**changes), args.text, args.out, args.minutes)


if __name__ == "__main__":
    main()
