"""Kernel emitters: a (problem, config) pair becomes a kernel image, on any machine, with or
without a GPU.

`spec` needs the standard library alone and is what a serving process imports: problems, configs and
why one is illegal, what an image is. `device` holds the parts that kernels are made of, `templates`
a kernel in each file, `compile` turns one into a cubin: they need the CUTLASS DSL and run in a
worker process (`python -m emitters`).
"""
