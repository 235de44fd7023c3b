"""Kernel emitters: a (problem, config) pair becomes a kernel image, on any machine, with or
without a GPU.

`problem`, `config` and `image` need the standard library alone and are what a serving process
imports. Everything else needs the CUTLASS DSL and runs in a worker process (`python -m emitters`).
"""
