"""Mixture-of-experts grouped GEMM for PyTorch: no token is copied, kernels come from a cache."""
