"""Which part of a model each of its parameters belongs to, by their names."""

from collections.abc import Collection

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
    "other",
)
"""All parts, in the order of the forward pass; a model has some of them."""
_BEGINNINGS = {
    "vision_tower.": "tower",
    "multi_modal_projector.": "projector",
    "image_newline": "projector",
    "embed_tokens.": "embedding",
    "lm_head.": "head",
}


def parts_of(names: Collection[str]) -> dict[str, str]:
    """One of PARTS for each name.

    lightning and softmax are the attention of those layers with all that is in it, norms those
    around the blocks, other what only a tower's own pretraining has.
    """
    fused = {name.split("qkv_proj")[0] for name in names if "qkv_proj" in name}
    return {name: _part_of(name, fused) for name in names}


def _part_of(name: str, fused: set[str]) -> str:
    """`fused` are the beginnings of names in lightning attention, which has q, k and v in one."""
    for beginning, part in _BEGINNINGS.items():
        if name.startswith(beginning):
            return part
    if ".experts." in name:
        return "experts"
    if ".gate." in name:
        return "router"
    before, attention, _ = name.partition("_attn.")
    if attention:
        return "lightning" if before + attention in fused else "softmax"
    return "norms" if "norm" in name else "other"
