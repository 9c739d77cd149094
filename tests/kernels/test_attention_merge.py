"""Attention behind a cache, by blocks, equals the formula over all keys at once."""

import pytest
import torch

from fulmen.kernels.attention import Merged, attend_behind
from fulmen.kernels.attention import merge as module
from fulmen.kernels.attention.merge import key_blocks
from fulmen.kernels.attention.reference import reference_attention

pytestmark = pytest.mark.fast


def rows(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (7, 8), (5, 29), (16, 33), (30, 31)])
@pytest.mark.parametrize("batch", [1, 2])
def test_as_the_formula(
    queries: int, keys: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "KEY_UNIT", 4)
    monkeypatch.setattr(module, "MOST_KEYS_ON_TORCH", 8)
    q = rows(batch, queries, 4, 8, seed=0)
    k, v = rows(batch, keys, 2, 8, seed=1), rows(batch, keys, 2, 8, seed=2)
    assert (attend_behind(q, k, v) - reference_attention(q, k, v)).abs().max() < 1e-12


def test_bf16_is_summed_in_fp32() -> None:
    q, k, v = (rows(1, n, 2, 16, seed=n, dtype=torch.bfloat16) for n in (64, 3000, 3000))
    want = reference_attention(q.double(), k.double(), v.double())
    assert (attend_behind(q, k, v).double() - want).abs().max() < 1e-2 * want.abs().max()


def test_queries_that_saw_nothing_weigh_nothing() -> None:
    q, k, v = rows(6, 2, 8, seed=0), rows(6, 2, 8, seed=1), rows(6, 2, 8, seed=2)
    late, never = Merged(q), Merged(q)
    late.merge(never.out, never.lse)
    late.add(k[:0], v[:0])
    assert torch.equal(late.out, torch.zeros_like(q))
    late.add(k[:2], v[:2], slice(2, None))
    late.add_causal(k, v)
    late.merge(never.out, never.lse)
    alone = Merged(q)
    alone.add_causal(k, v)
    assert (late.out[:2] - alone.out[:2]).abs().max() < 1e-12
    assert not late.out.isnan().any()


@pytest.mark.parametrize("most", [1, 1024, 5000, 2**20])
def test_blocks_cover_all_keys_in_few_sizes(most: int) -> None:
    for keys in (0, 1, 1023, 1024, 5000, 3 * 32768, 7 * 32768 + 5):
        blocks = list(key_blocks(keys, most))
        assert [i for block in blocks for i in (block.start, block.stop)] == sorted(
            i for block in blocks for i in (block.start, block.stop)
        )
        assert sum(block.stop - block.start for block in blocks) == keys
        sizes = {block.stop - block.start for block in blocks if block.stop < keys}
        assert all(size % 1024 == 0 and (size // 1024).bit_count() == 1 for size in sizes)
        assert all(size <= max(most, 1024) for size in sizes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("queries", "keys"), [(2, 5), (300, 3000), (2048, 20000), (20000, 60000)])
def test_on_the_gpu(queries: int, keys: int) -> None:
    """Against fp32 formulas; the largest go to cuDNN where there is one."""
    q = rows(1, queries, 8, 64, seed=0, dtype=torch.bfloat16).cuda()
    k, v = (rows(1, keys, 2, 64, seed=n, dtype=torch.bfloat16).cuda() for n in (1, 2))
    some = slice(-min(queries, 64), None)  # the last of them, or scores would fill the memory
    found = attend_behind(q, k, v)[:, some].float()
    wanted = reference_attention(q[:, some].float(), k.float(), v.float())
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()
