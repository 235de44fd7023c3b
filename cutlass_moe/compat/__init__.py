"""Names and signatures of other grouped GEMM libraries, on `cutlass_moe.grouped_matmul`."""
