"""Time and memory of reading long texts in pieces, by length.

    python benchmarks/prefill.py output=prefill [lengths=[32768,131072]] [chunk_tokens=32768]
    python benchmarks/prefill.py output=prefill_softmax shape.softmax_every=1 total_seconds=500

A model of `model`'s shape with random weights reads random tokens, as launch/generate.py and
launch/evaluate.py do; the logits of the last token are formed. First, in fp32 and with a small
model, logits and losses of a text in pieces are compared with those of one pass: nothing is timed
if they differ. Of each length: time, tokens/s, the shares of the lightning layers' and the softmax
layers' cores (between q, k, v and their output), of everything else, and memory: of the weights,
of states, of keys and values, and the most in all.

Each length is a JSON line, printed and kept at once in `output`/prefill.jsonl; table and plot are
drawn anew behind each. A length that would take longer than what is left of `total_seconds` is not
begun, and one that does is left, with the tokens that it came to. `shape.KEY=VALUE` changes the
model; `kernels.attention_block=flash` the kernels.
"""

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from fulmen.kernels import registry
from fulmen.models.config import ModelConfig, MoEConfig
from fulmen.models.init import init_model, init_std
from fulmen.models.layers import Cache
from fulmen.models.lightning import LightningAttention
from fulmen.models.softmax import SoftmaxAttention
from fulmen.models.text import TextModel, count_parameters
from fulmen.trainer.long_context.pictures import short_length
from fulmen.trainer.prefill import Reader

DEFAULTS: dict[str, Any] = {
    "model": "text01_1b",
    "lengths": [2**15, 2**17, 2**19, 2**20, 2**21, 2**22],
    "chunk_tokens": 32768,
    "dtype": "bfloat16",
    "output": "prefill",
    "total_seconds": 540,
    "check_tokens": 6000,
    "shape": {},
    "kernels": {},
}
GIB, MIB = 2**30, 2**20
SMALL = {
    "num_layers": 8,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "expert_hidden_size": 384,
    "vocab_size": 1000,
    "softmax_every": 4,
}
TOLERANCE = 1e-4
"""Of logits and losses, over the largest: fp32, sums in another order."""


class OutOfTimeError(Exception):
    """A length took longer than there was time."""


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> TextModel:
    """Weights of the right spread, drawn on the device; routers in fp32."""
    with torch.device("meta"):
        model = TextModel(config, MoEConfig())
    model = model.to(dtype)
    for layer in model.layers:
        layer.block_sparse_moe.gate.to(torch.float32)
    model = model.to_empty(device=device).requires_grad_(False).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        std = init_std(name, parameter.shape, config)
        if std is None:
            parameter.fill_(1.0)
        else:
            spread = std.to(device, dtype) if isinstance(std, Tensor) else std
            parameter.normal_().mul_(spread)
    return model


def check_equality(device: torch.device, tokens: int) -> dict[str, Any]:
    """Text in pieces against text in one, fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    config = ModelConfig(**SMALL)  # type: ignore[arg-type]
    model = TextModel(config, MoEConfig())
    init_model(model, config, seed=0)
    model = model.to(device).requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (tokens,), generator=generator)
    whole = model(ids[None].to(device))[0]
    losses = torch.nn.functional.cross_entropy(whole[:-1], ids[1:].to(device), reduction="none")
    errors = {}
    for chunk in (tokens // 8 - 50, tokens // 6 + 24, tokens // 3 * 2 + 96):
        reader = Reader(model, chunk_tokens=chunk)
        logits, _ = reader.read(ids, num_logits=50)
        pairs = {"logits": (logits, whole[-50:]), "losses": (reader.losses(ids), losses)}
        for name, (found, wanted) in pairs.items():
            errors[f"{name}, {chunk} a piece"] = float(
                (found - wanted).abs().max() / wanted.abs().max()
            )
    worst = max(errors.values())
    if not worst <= TOLERANCE:
        sys.exit(f"error: a text in pieces is not the text in one: {errors}")
    return {"check": "fp32, pieces against one pass", "tokens": tokens, "largest_error": worst}


class Clock:
    """Time in the cores of the two kinds of attention, by events on the device's stream."""

    def __init__(self, model: TextModel, device: torch.device) -> None:
        self.device = device
        self.spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for module in model.modules():
            for kind, name in ((LightningAttention, "lightning"), (SoftmaxAttention, "softmax")):
                if isinstance(module, kind):
                    module.attend = self._timed(name, module.attend)  # type: ignore[method-assign]

    def now(self) -> Any:
        """A point in time, read later."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds by kind since the last call; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        totals = {
            name: sum(_seconds(begin, end) for begin, end in self.spans[name])
            for name in ("lightning", "softmax")
        }
        self.spans.clear()
        return totals

    def _timed(self, name: str, attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any) -> Tensor:
            begin = self.now()
            output = attend(*args)
            self.spans[name].append((begin, self.now()))
            return output

        return timed


def _seconds(begin: Any, end: Any) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


def measure(
    reader: Reader, clock: Clock, config: ModelConfig, length: int, deadline: float
) -> dict[str, Any]:
    """One length."""
    device, tokens_done = reader.device, 0
    on_gpu = device.type == "cuda"

    def watch(_: nn.Module, __: Any) -> None:
        nonlocal tokens_done
        if on_gpu:
            torch.cuda.synchronize()
        if time.monotonic() > deadline:
            raise OutOfTimeError
        tokens_done += reader.chunk_tokens

    ids = torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(1))
    weights = sum(p.numel() * p.element_size() for p in reader.model.parameters())
    row: dict[str, Any] = {"length": length, "weights_gib": weights / GIB}
    clock.read()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    handle = reader.model.register_forward_pre_hook(watch)
    cache, begin = None, time.perf_counter()
    try:
        logits, cache = reader.read(ids)
        assert bool(logits.isfinite().all())
    except OutOfTimeError:
        row["out_of_time_at_tokens"] = tokens_done
    except torch.OutOfMemoryError:
        row["out_of_memory_at_tokens"] = tokens_done
    finally:
        handle.remove()
    cores = clock.read()
    row["seconds"] = time.perf_counter() - begin
    row |= {f"{name}_seconds": seconds for name, seconds in cores.items()}
    row["other_seconds"] = row["seconds"] - sum(cores.values())
    if on_gpu:
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    if cache is not None:
        row["tokens_per_s"] = length / row["seconds"]
        row |= sizes(cache)
    return row


def sizes(cache: Cache) -> dict[str, float]:
    """What is carried from piece to piece."""
    held = [x for kv in cache.keys_values.values() for x in kv.views()]
    return {
        "state_mib": sum(s.numel() * s.element_size() for s in cache.states.values()) / MIB,
        "keys_values_gib": sum(x.numel() * x.element_size() for x in held) / GIB,
    }


COLUMNS = {
    "seconds": ("s", "{:.2f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "lightning_seconds": ("lightning, s", "{:.2f}"),
    "softmax_seconds": ("softmax, s", "{:.2f}"),
    "other_seconds": ("the rest, s", "{:.2f}"),
    "state_mib": ("states, MiB", "{:.1f}"),
    "keys_values_gib": ("keys and values, GiB", "{:.2f}"),
    "peak_gib": ("peak, GiB", "{:.1f}"),
}


def write_table(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Markdown."""
    lines = [title, "", "| tokens | " + " | ".join(name for name, _ in COLUMNS.values()) + " |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for row in rows:
        cells = [form.format(row[key]) if key in row else "" for key, (_, form) in COLUMNS.items()]
        lines.append(f"| {short_length(row['length'])} | " + " | ".join(cells) + " |")
    path.write_text("\n".join(lines) + "\n")


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Time and memory by length, both axes by powers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    rows = [row for row in rows if "tokens_per_s" in row]
    lengths = [row["length"] for row in rows]
    for key in ("seconds", "lightning_seconds", "softmax_seconds", "other_seconds"):
        label = "all" if key == "seconds" else COLUMNS[key][0].removesuffix(", s")
        times.plot(lengths, [row[key] for row in rows], marker="o", label=label)
    states = [row["state_mib"] / 1024 for row in rows]
    memory.plot(lengths, states, marker="o", label="states, lightning layers")
    keys = [row["keys_values_gib"] for row in rows]
    memory.plot(lengths, keys, marker="o", label="keys and values, softmax layers")
    if all("peak_gib" in row for row in rows):
        memory.plot(lengths, [row["peak_gib"] for row in rows], marker="o", label="peak in all")
    for axes, name in ((times, "seconds"), (memory, "GiB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(lengths, [short_length(length) for length in lengths])
        axes.set(xlabel="tokens", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def main() -> None:
    started = time.monotonic()
    options = OmegaConf.merge(OmegaConf.create(DEFAULTS), OmegaConf.from_cli(sys.argv[1:]))
    registry.configure({str(op): name for op, name in options.kernels.items()})
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = Path(__file__).parent.parent / "recipes" / "model" / f"{options.model}.yaml"
    config = ModelConfig(**OmegaConf.merge(OmegaConf.load(shape), options.shape))
    rows: list[dict[str, Any]] = []
    with (output / "prefill.jsonl").open("w") as file:

        def say(line: dict[str, Any]) -> None:
            print(json.dumps(line), flush=True)
            print(json.dumps(line), file=file, flush=True)

        say(check_equality(device, options.check_tokens))
        model = random_model(config, getattr(torch, options.dtype), device)
        clock = Clock(model, device)
        reader = Reader(model, chunk_tokens=options.chunk_tokens)
        name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        title = (
            f"{options.model}, {config.num_softmax_layers} of {config.num_layers} layers softmax, "
            f"{options.dtype}, {options.chunk_tokens} tokens a piece, {name}, torch "
            f"{torch.__version__}"
        )
        say({"model": title, "parameters": count_parameters(model)})
        # Compiles and plans; not timed.
        reader.read(torch.zeros(2 * options.chunk_tokens, dtype=torch.long))
        deadline = started + options.total_seconds
        for length in options.lengths:
            expected = rows[-1]["seconds"] * length / rows[-1]["length"] if rows else 0.0
            if time.monotonic() + expected > deadline:
                say({"length": length, "left_out": f"would take {expected:.0f} s or more"})
                break
            rows.append(measure(reader, clock, config, length, deadline))
            say(rows[-1])
            write_table(output / "prefill.md", rows, title)
            draw(output / "prefill.png", rows, title)


if __name__ == "__main__":
    main()
