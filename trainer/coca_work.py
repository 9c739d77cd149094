"""Work of a micro-batch of a tower with its captioner (models/coca.py); see trainer/planner.py.

Captions are taken to be half as long as the longest, but all of a micro-batch are padded to that
one, and what pads them is computed too.
"""

from fulmen.trainer.caption_inputs import most_pairs
from fulmen.trainer.config import RunConfig
from fulmen.trainer.flops import forward_flops
from fulmen.trainer.memory import tower_trains
from fulmen.trainer.sizes import FP32, compute_bytes
from fulmen.trainer.tower_memory import (
    Moved,
    block_moved,
    count_pairs,
    last_products,
    tower_moved,
)


def captioner_flops(config: RunConfig, trained: dict[str, float]) -> dict[str, float]:
    """Operations of forward and backward pass and what is computed again, by part of the model.

    `trained` are passes' worth of parts, where frozen parameters leave less than 3.
    """
    model = config.model
    assert model.vision is not None
    assert model.coca is not None
    pairs = count_pairs(model, config.trainer.micro_batch_tokens)
    patches = model.vision.tiling.patches_per_tile
    length = patches + model.coca.max_text_tokens
    flops = forward_flops(
        model,
        num_tokens=pairs * length,
        sum_squared_lengths=pairs * length**2,
        num_assignments=0,
        num_tiles=pairs,
        num_image_tokens=pairs * patches,
    )
    work = {part: trained.get(part, 3) * once for part, once in flops.items()}
    if config.trainer.activation_checkpointing == "full":
        if tower_trains(config):
            work["vision_tower"] += flops["vision_tower"] - last_products(model.vision, pairs)
        last = 2 * pairs * model.hidden_size * model.expert_hidden_size
        layers, unimodal = model.num_layers, model.coca.num_unimodal_layers
        rows = {"unimodal": unimodal * (model.coca.max_text_tokens + 1)}
        rows["multimodal"] = (layers - unimodal) * model.coca.max_text_tokens
        for part, tokens in rows.items():
            work[f"{part}_layers"] += flops[f"{part}_layers"] - tokens * last
    return work


def captioner_moved(config: RunConfig) -> float:
    """Bytes of ops that are bound by memory; see `tower_memory.block_moved`.

    With n tokens of captions, P patches, d = hidden_size and v the tower's, a block that sees has
    beside the others' ops a norm of its own and one of the patches, 2 n d + 2 P v and backward 3 n
    d + 3 P v; a residual sum 3 n d, both ways; sums for biases of q and output 2 n d, of k and v 2
    P d; and to sum the gradients of the patches, by k and v and over the blocks, 6 P v. The pooler
    has 2 P v, and backward 6 P v and 2 P v for biases.
    """
    model, e = config.model, compute_bytes(config)
    assert model.vision is not None
    assert model.coca is not None
    pairs = count_pairs(model, config.trainer.micro_batch_tokens)
    d, v = model.hidden_size, model.vision.hidden_size
    tokens, patches = model.coca.max_text_tokens, model.vision.tiling.patches_per_tile
    unimodal = model.coca.num_unimodal_layers
    read, seen, shown = pairs * (tokens + 1) * d, pairs * tokens * d, pairs * patches * v
    own = block_moved(tokens * pairs, d, model.expert_hidden_size)
    with_class = block_moved((tokens + 1) * pairs, d, model.expert_hidden_size)
    both = Moved(
        own.forward + 5 * seen + 2 * shown,
        own.again + 5 * seen + 2 * shown,
        own.backward + 8 * seen + 9 * shown + 2 * pairs * patches * d,
    )
    numbers = 0.0
    for block, layers in ((with_class, unimodal), (both, model.num_layers - unimodal)):
        numbers += layers * (block.forward + block.backward)
        if config.trainer.activation_checkpointing != "none":
            numbers += layers * block.again
    numbers += 10 * shown + 5 * (read + seen)  # pooler; embeddings and the last norm
    return e * numbers + tower_moved(config, pairs, trains=tower_trains(config))


def embeddings_sent(config: RunConfig) -> int:
    """Bytes that a rank sends to each other one in a micro-batch, and again backward."""
    assert config.model.coca is not None
    pairs = most_pairs(config.model, config.trainer.micro_batch_tokens)
    return FP32 * pairs * (2 * config.model.coca.embedding_size + 1)
