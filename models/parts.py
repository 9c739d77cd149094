"""Which part of the model a parameter belongs to, by its name."""

PARTS = (
    "tower",
    "projector",
    "embedding",
    "lightning",
    "softmax",
    "router",
    "experts",
    "norms",
    "head",
)
"""All parts, in the order of the forward pass."""
_SOFTMAX = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")


def part_of(name: str) -> str:
    """One of PARTS: attention by its kind with all that is in it, `norms` those around blocks."""
    if name.startswith("vision_tower."):
        return "tower"
    if name.startswith(("multi_modal_projector.", "image_newline")):
        return "projector"
    if name.startswith("embed_tokens."):
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if ".experts." in name:
        return "experts"
    if ".gate." in name:
        return "router"
    if ".self_attn." in name:
        return "softmax" if name.split(".self_attn.")[1] in _SOFTMAX else "lightning"
    return "norms"
