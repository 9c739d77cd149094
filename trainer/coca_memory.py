"""Memory of a tower with its captioner (models/coca.py); see trainer/memory.py.

A micro-batch has as many pairs as `count_pairs` says, and all captions are padded to the longest.
With n tokens of all captions, P patches of all images, d = hidden_size, m the MLP's width, v the
tower's hidden_size, N pairs on a rank and A the room for pairs on all ranks, kept until the
backward pass in numbers of the compute type, unless said:

| what               | none                       | selective                     | full |
|--------------------|----------------------------|-------------------------------|------|
| a unimodal block   | n (8 d + 2 m), fp32 n (4 + | n (7 d + m), fp32 n heads     | n d  |
|                    | heads)                     |                               |      |
| a multimodal block | also n 4 d + P (v + 2 d),  | also n 3 d + P 2 d, fp32      |      |
|                    | fp32 n (2 + heads) + 2 P   | n heads                       |      |
| tower              | as of tower_memory.py, and its output, P v and N v                 |
| pooler             | P 3 v, fp32 2 P                                                    |
| contrast           | N (4 v + 2 d), fp32 N (2 A + 7 w) + A (2 w + 1), w = embedding_size |
| last norm, text    | n d, fp32 2 n; ids and labels int64 2 n                            |
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import ceil

from fulmen.models.config import ModelConfig
from fulmen.trainer.caption_inputs import most_pairs
from fulmen.trainer.config import RunConfig
from fulmen.trainer.head_memory import head_scratch
from fulmen.trainer.memory import INT64, Held, Parts, Unit, list_units
from fulmen.trainer.sizes import FP32, compute_bytes
from fulmen.trainer.tower_memory import block_activations, count_pairs, tile_activations


def caption_block(
    model: ModelConfig, pairs: int, tokens: int, e: int, policy: str, sees: bool
) -> int:
    """Bytes that a block keeps of so many captions of so many tokens."""
    assert model.vision is not None
    n, d, heads = pairs * tokens, model.hidden_size, model.num_attention_heads
    m = model.expert_hidden_size
    patches, v = pairs * model.vision.tiling.patches_per_tile, model.vision.hidden_size
    if policy == "full":
        return e * n * d
    if policy == "selective":
        kept = e * n * (7 * d + m) + FP32 * n * heads
        return kept + sees * (e * (3 * n * d + 2 * patches * d) + FP32 * n * heads)
    kept = e * n * (8 * d + 2 * m) + FP32 * n * (4 + heads)
    cross = e * (4 * n * d + patches * (v + 2 * d)) + FP32 * (n * (2 + heads) + 2 * patches)
    return kept + sees * cross


def ends(model: ModelConfig, pairs: int, tokens: int, everyone: int, e: int) -> dict[str, int]:
    """Bytes kept outside of blocks and tower; `everyone` is the room for pairs of all ranks."""
    vision, coca = model.vision, model.coca
    assert vision is not None
    assert coca is not None
    n, d, v = pairs * tokens, model.hidden_size, vision.hidden_size
    patches = pairs * vision.tiling.patches_per_tile
    return {
        "tower's output": e * (patches + pairs) * v,
        "pooler": e * 3 * patches * v + FP32 * 2 * patches,
        "contrast": FP32 * pairs * (2 * everyone + 7 * coca.embedding_size)
        + FP32 * everyone * (2 * coca.embedding_size + 1)
        + e * pairs * (4 * v + 2 * d),
        "text": e * n * d + FP32 * 2 * n + 2 * INT64 * n,
    }


@dataclass(frozen=True)
class _Step:
    """The backward pass of one ZeRO unit."""

    unit: Unit
    kept: int
    """Bytes that it gives up."""
    work: int
    """Bytes beside those, without the gradients of weights."""


def coca_moments(config: RunConfig, world_size: int, micro_batches: int) -> Iterator[Parts]:
    """`memory.moments` of such a model: the parts at the head, and from unit to unit backward."""
    model, e = config.model, compute_bytes(config)
    assert model.coca is not None
    pairs = ceil(count_pairs(model, config.trainer.micro_batch_tokens))
    rows = pairs * (model.coca.max_text_tokens + 1)
    units = list_units(config, world_size)
    zero = Held(units, micro_batches)
    policy = config.trainer.activation_checkpointing
    everyone = most_pairs(model, config.trainer.micro_batch_tokens) * world_size
    steps = _steps(model, units, pairs, everyone, e, policy)
    here = 0
    if config.trainer.offload_checkpoints:  # of the blocks' inputs two are here at a time
        here = 2 * max(step.kept for step in steps if _is_of_block(step.unit))
        steps = [replace(step, kept=0) if _is_of_block(step.unit) else step for step in steps]
    kept = here + sum(step.kept for step in steps)
    head = next(unit for unit in units if unit.name == "lm_head")
    scratch = head_scratch(rows, model.hidden_size, model.vocab_size, e)
    in_head = 2 * e * rows * model.hidden_size + e * head.trained_whole + scratch
    yield zero.parts(head, activations=kept, head=in_head)
    last = head
    for step in steps:
        zero.reduce(last)
        working = step.work + e * step.unit.trained_whole
        buffers = FP32 * last.trained_whole
        yield zero.parts(step.unit, activations=kept, working=working, buffers=buffers)
        kept, last = kept - step.kept, step.unit
    zero.reduce(last)
    yield zero.parts(activations=0)


def _is_of_block(unit: Unit) -> bool:
    return unit.layer >= 0 or unit.name.startswith("vision_tower.")


def _steps(
    model: ModelConfig, units: list[Unit], pairs: int, everyone: int, e: int, policy: str
) -> list[_Step]:
    """Multimodal blocks, image, unimodal blocks, and what is outside of blocks."""
    vision, coca = model.vision, model.coca
    assert vision is not None
    assert coca is not None
    tokens, again = coca.max_text_tokens + 1, policy != "none"
    rows, patches = pairs * tokens, pairs * (vision.tiling.patches_per_tile + 1)
    rest = ends(model, pairs, tokens, everyone, e)
    by_name = {(unit.layer, unit.name): unit for unit in units}

    def block(layer: int) -> _Step:
        sees = layer >= coca.num_unimodal_layers
        own = tokens - sees  # class tokens end with the unimodal ones
        kept = caption_block(model, pairs, own, e, policy, sees)
        work = e * pairs * own * (3 * model.hidden_size + 2 * model.expert_hidden_size)
        work += again * caption_block(model, pairs, own, e, "none", sees)
        return _Step(by_name[layer, "dense"], kept, work)

    seeing = block_activations(vision, pairs, e, policy)
    gradients = e * patches * (3 * vision.hidden_size + 2 * vision.mlp_hidden_size)
    gradients += again * block_activations(vision, pairs, e, "none")
    inputs = tile_activations(vision, pairs, e, policy) - vision.num_layers * seeing
    tower = [unit for unit in units if unit.name.startswith("vision_tower.")]
    backward = reversed(range(model.num_layers))
    multimodal = [block(layer) for layer in backward if layer >= coca.num_unimodal_layers]
    unimodal = [block(layer) for layer in reversed(range(coca.num_unimodal_layers))]
    row = e * rows * model.hidden_size
    return [
        *multimodal,
        _Step(by_name[-1, "contrast"], rest["contrast"], rest["contrast"]),
        _Step(by_name[-1, "pooler"], rest["pooler"] + rest["tower's output"], rest["pooler"]),
        *(_Step(unit, seeing, gradients) for unit in reversed(tower)),
        _Step(by_name[-1, "vision_tower"], inputs, e * patches * vision.hidden_size),
        _Step(by_name[-1, "text_head"], 0, 0),
        *unimodal,
        _Step(by_name[-1, "embed_tokens"], 0, row),
        _Step(by_name[-1, "norm"], rest["text"], row),
    ]
