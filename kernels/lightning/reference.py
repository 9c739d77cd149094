"""Lightning attention in plain torch: all chunks at once, one short scan over their states."""

import torch
from torch import Tensor

CHUNK_TOKENS = 64


def chunked_lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """Block form of the recurrence (arXiv:2501.08313, algorithm 1), with decay and documents.

    Shapes as in `lightning_attention`; with `cu_seqlens` there is one state, which enters the first
    document, and the final one is the last document's. With `l = exp(-slope)`, a
    token at offset i of a chunk gets `sum_{j<=i} l^(i-j) (q_i k_j) v_j` from its chunk and
    `l^(i+1) q_i S` from the state S before it; then `S <- l^n S + sum_j l^(n-1-j) k_j v_j^T`. A
    document boundary inside a chunk removes the terms that would cross it. Every exponent is <= 0,
    so nothing overflows however large slope x length is.
    """
    batch, tokens, heads, head_dim = q.shape
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    size = max(1, min(CHUNK_TOKENS, tokens))
    num_chunks = max(1, -(-tokens // size))
    padding = num_chunks * size - tokens

    def to_chunks(x: Tensor) -> Tensor:
        # [batch, tokens, heads, dim] -> [batch, chunks, heads, size, dim]
        x = torch.nn.functional.pad(x.to(accumulate), (0, 0, 0, 0, 0, padding))
        return x.view(batch, num_chunks, size, heads, head_dim).transpose(2, 3)

    q_chunks, k_chunks, v_chunks = to_chunks(q), to_chunks(k), to_chunks(v)
    offset = torch.arange(size, device=q.device)
    first = torch.arange(num_chunks, device=q.device)[:, None] * size  # [chunks, 1]
    position = first + offset  # [chunks, size], index of the token in the row
    last = (first[:, 0] + size).clamp(max=tokens) - 1  # last real token of each chunk
    start = _document_starts(cu_seqlens, position)
    start_of_last = start.flatten()[last.clamp(min=0)][:, None]

    def decay(exponent: Tensor, keep: Tensor) -> Tensor:
        # [chunks, ...] token distances -> [chunks, heads, ...] decay factors, 0 where not kept
        steps = exponent.clamp(min=0).to(accumulate)
        rate = -slopes.to(accumulate).view(1, heads, *[1] * (exponent.dim() - 1))
        return torch.exp(rate * steps.unsqueeze(1)) * keep.unsqueeze(1)

    distance = offset[:, None] - offset[None, :]
    same_document = start[:, :, None] <= position[:, None, :]
    intra = decay(distance.expand(num_chunks, -1, -1), (distance >= 0) & same_document)
    scores = (q_chunks @ k_chunks.transpose(-1, -2)) * intra
    output = scores @ v_chunks

    in_reach = (start_of_last <= position) & (position <= last[:, None])
    to_end = decay(last[:, None] - position, in_reach)
    local_states = (k_chunks * to_end.unsqueeze(-1)).transpose(-1, -2) @ v_chunks
    # The state that enters a chunk belongs to the document of the token before it (to the whole
    # row, for the first chunk): it reaches the tokens of that document only.
    before_chunk = (first - 1).clamp(min=0)
    carry = decay((last - first[:, 0] + 1), (start_of_last <= before_chunk)[:, 0])
    from_start = decay(position - first + 1, start <= before_chunk)

    state = (
        torch.zeros(batch, heads, head_dim, head_dim, dtype=accumulate, device=q.device)
        if initial_state is None
        else initial_state.to(accumulate)
    )
    before = []
    for index in range(num_chunks):
        before.append(state)
        state = carry[index, :, None, None] * state + local_states[:, index]
    output = output + (q_chunks * from_start.unsqueeze(-1)) @ torch.stack(before, dim=1)
    output = output.transpose(2, 3).reshape(batch, num_chunks * size, heads, head_dim)
    return output[:, :tokens].to(v.dtype), state if output_final_state else None


def reference_closing_state(k: Tensor, v: Tensor, slopes: Tensor, *, reverse: bool) -> Tensor:
    """`sum_j l^(n-1-j) k_j v_j^T` of `[1, n, heads, head_dim]`; reverse, with `l^(j+1)`."""
    accumulate = torch.float64 if k.dtype == torch.float64 else torch.float32
    token = torch.arange(k.shape[1], device=k.device)
    steps = token + 1 if reverse else token.flip(0)
    weight = torch.exp(-slopes.to(accumulate) * steps[:, None])
    keys = k[0].to(accumulate) * weight[:, :, None]
    return torch.einsum("thd,the->hde", keys, v[0].to(accumulate))


def reference_combine_states(
    states: Tensor, slopes: Tensor, tokens: int, *, reverse: bool
) -> Tensor:
    """`sum_s l^(tokens (n-1-s)) states_s` of `[n, heads, ...]`; reverse, with `l^(tokens s)`."""
    steps = torch.arange(states.shape[0], device=states.device)
    steps = steps if reverse else steps.flip(0)
    weights = torch.exp(-slopes.double() * (tokens * steps[:, None])).to(states.dtype)
    # Not a matrix product, which may be allowed to round states to tf32.
    return (weights[:, :, None, None] * states).sum(0)


def _document_starts(cu_seqlens: Tensor | None, position: Tensor) -> Tensor:
    """Index of the first token of each position's document, shaped like `position`."""
    if cu_seqlens is None:
        return torch.zeros_like(position)
    bounds = cu_seqlens.to(position.device, torch.long)
    document = torch.searchsorted(bounds, position.contiguous(), right=True) - 1
    return bounds[document.clamp(max=bounds.numel() - 1)]
