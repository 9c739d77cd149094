"""How often a step gathers the weights of a ZeRO unit in stage 3.

FSDP2 gathers a unit for each forward pass, and again where a gradient comes to what the unit puts
out: where it trains itself, or anything that its input comes from. It also gathers ahead the unit
that ended before such a one in the forward pass; where no gradient comes there, the next
micro-batch's forward pass finds it gathered.
"""

from collections.abc import Iterator

from fulmen.trainer.config import RunConfig
from fulmen.trainer.memory import count_model, frozen_of, unit_of

Key = tuple[int, str]
"""A unit's layer and name."""


def count_gathers(config: RunConfig, micro_batches: int) -> dict[Key, int]:
    """Of each unit in a step, if it is of stage 3."""
    frozen = frozen_of(config)
    names = [name for name, _ in count_model(config.model).shapes]
    trained = {name for name in names if name not in frozen}
    units = list((_captioner if config.model.coca else _reader)(names, trained))
    following = [reached for _, reached in units[1:]] + [False]
    return {
        key: micro_batches + (micro_batches if reached else int(ahead))
        for (key, reached), ahead in zip(units, following, strict=True)
    }


def _tower(names: list[str], trained: set[str]) -> tuple[list[tuple[Key, bool]], bool]:
    """Its units, and whether a gradient comes to what leaves it."""
    of_tower = [key for key in dict.fromkeys(map(unit_of, names)) if key[1].startswith("vision_")]
    units = {unit_of(name) for name in trained}
    found, below = [], (-1, "vision_tower") in units  # embeddings, the first norm
    for key in of_tower:
        if key[1] != "vision_tower":
            below = below or key in units
            found.append((key, below))
    return found + [(key, below) for key in of_tower if key[1] == "vision_tower"], below


def _reader(names: list[str], trained: set[str]) -> Iterator[tuple[Key, bool]]:
    """Units of a language model in the order in which they end, and whether a gradient comes."""
    units = {unit_of(name) for name in trained}
    text = (-1, "embed_tokens") in units
    yield (-1, "embed_tokens"), text
    tower, seen = _tower(names, trained)
    yield from tower
    if tower:
        seen = seen or (-1, "multi_modal_projector") in units
        yield (-1, "multi_modal_projector"), seen
    below = text or seen or "image_newline" in trained
    for layer in range(1 + max(unit_of(name)[0] for name in names)):
        # The router's weights go into the experts' unit; norms and attention come before both.
        below = below or (layer, "dense") in units
        gate = below or (layer, "gate") in units
        below = gate or (layer, "experts") in units
        yield (layer, "gate"), gate
        yield (layer, "experts"), below
        yield (layer, "dense"), below
    yield (-1, "lm_head"), True  # something trains, at the latest the head
    yield (-1, "norm"), True


def _captioner(names: list[str], trained: set[str]) -> Iterator[tuple[Key, bool]]:
    """The same of a tower with its captioner (models/coca.py): texts, images, then both."""
    units = {unit_of(name) for name in trained}
    sees = {unit_of(name)[0] for name in names if ".cross_attn." in name}
    read = "class_embedding" in trained or "position_embedding.weight" in trained
    text = (-1, "embed_tokens") in units
    yield (-1, "embed_tokens"), text
    text = text or read
    for layer in range(min(sees)):
        text = text or (layer, "dense") in units
        yield (layer, "dense"), text
    yield (-1, "text_head"), text or (-1, "text_head") in units
    tower, seen = _tower(names, trained)
    yield from tower
    yield (-1, "pooler"), seen or (-1, "pooler") in units
    compared = {(-1, name) for name in ("text_head", "pooler", "contrast")}
    yield (-1, "contrast"), text or seen or bool(compared & units)
    both = text or seen
    for layer in sorted(sees):
        both = both or (layer, "dense") in units
        yield (layer, "dense"), both
    yield (-1, "lm_head"), True
    yield (-1, "norm"), True
