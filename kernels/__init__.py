"""Operations on the hot path, one folder each: a readable reference and the public op."""
