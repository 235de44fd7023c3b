"""Kernel emitters: turn a (problem, config) pair into a kernel image, with or without a GPU.

  spec        problems, configs, their legality, images; a serving process imports this room only
  device      the parts that kernels are made of
  templates   the kernels, one per file
  compile     turns a template into a cubin

spec needs the standard library only. The other rooms need the CUTLASS DSL and run in a worker
process (`python -m emitters`).
"""
