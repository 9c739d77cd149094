"""Operations on the hot path, one folder each: a reference, Triton kernels and the public op."""
