"""Signatures: what tells two calls apart, and how many are kept."""

from __future__ import annotations

import torch

from cutlass_moe.runtime.signatures import Signatures, signature

X = torch.zeros(4, 6)


def test_everything_that_decides_a_kernel_tells_calls_apart():
    others = [(X[:3],), (X.half(),), (X[:, ::2],), (X.T,), (X, None), (None, X)]
    keys = {signature(("fp8",), tensors) for tensors in [(X,), *others]}
    keys.add(signature(("int8",), (X,)))
    assert len(keys) == 8
    assert signature(("fp8",), (X.clone(),)) in keys


def test_all_are_forgotten_when_there_are_too_many():
    seen: Signatures[str] = Signatures(limit=2)
    assert seen.get((1,)) is None
    for number in (1, 2):
        assert seen.keep((number,), f"decided {number}") == f"decided {number}"
    assert seen.get((1,)) == "decided 1" and seen.get((2,)) == "decided 2"
    seen.keep((3,), "decided 3")
    assert [seen.get((number,)) for number in (1, 2, 3)] == [None, None, "decided 3"]
