"""The forms that operands of index_group_matmul come in, and calls in them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import cutlass_moe as cm
from emitters.spec.gemm import Granularity
from tests.support.cases import Case, make_inputs
from tests.support.numerics import poisoned, same_bits

I32, I64 = torch.int32, torch.int64


@dataclass(frozen=True)
class Form:
    """How the operands of a call come.

    "whole"; "one": in a list of one; one tensor per expert: "parts" of one, or "apart". Weights
    also as parts: "strided", or "interleaved"; and apart with different "pitches"; scales also as
    "columns". kind and dtype are group_list's; room: rows of an expert's tensor beyond its own.
    """

    x: str = "whole"
    weight: str = "whole"
    scale: str = "whole"
    per_token_scale: str = "whole"
    out: str = "whole"
    kind: str = "cumsum"
    dtype: torch.dtype = I32
    room: int = 2

    @property
    def rows_per_expert(self) -> bool:
        return {self.x, self.per_token_scale, self.out} & {"parts", "apart"} != set()


PARTS = Form("parts", "parts", "parts", "parts", "parts")
APART = Form("apart", "apart", "apart", "apart", "apart")
FORMS = {
    "whole": Form(),
    "lists_of_one": Form("one", "one", "one", "one", "one"),
    "parts": PARTS,
    "parts_without_room": replace(PARTS, room=0),
    "apart": APART,
    "apart_without_room": replace(APART, room=0),
    "x_parts": Form(x="parts"),
    "x_apart": Form(x="apart"),
    "weight_parts": Form(weight="parts"),
    "weight_strided": Form(weight="strided"),
    "weight_interleaved": Form(weight="interleaved"),
    "weight_apart": Form(weight="apart"),
    "weight_pitches": Form(weight="pitches"),
    "scale_parts": Form(scale="parts"),
    "scale_apart": Form(scale="apart"),
    "scale_columns": Form(scale="columns"),
    "token_scale_parts": Form(per_token_scale="parts"),
    "token_scale_apart": Form(per_token_scale="apart"),
    "out_parts": Form(out="parts"),
    "out_apart": Form(out="apart"),
    "count": Form(kind="count"),
    "count_int64": Form(kind="count", dtype=I64),
    "cumsum_int64": Form(dtype=I64),
    "apart_count": replace(APART, kind="count"),
    "parts_count_int64": replace(PARTS, kind="count", dtype=I64),
    "apart_cumsum_int64": replace(APART, dtype=I64),
}
INDEX_FORMS = {  # with an index, x and per_token_scale are single tensors
    name: replace(form, x="whole", per_token_scale="whole")
    for name, form in FORMS.items()
    if form.x in ("whole", "parts", "apart") and form.room and form.per_token_scale == form.x
}


def _rows(whole: Tensor, lengths: tuple[int, ...], how: str) -> Any:
    if how in ("whole", "one"):
        return whole if how == "whole" else [whole]
    parts = list(whole.split(lengths))
    return parts if how == "parts" else [part.clone() for part in parts]


def _weights(whole: Tensor, how: str) -> Any:
    experts, n, k = whole.shape
    if how in ("whole", "one"):
        return whole if how == "whole" else [whole]
    if how == "strided":
        return list(torch.cat([whole, whole], 2)[:, :, :k].unbind())
    if how == "interleaved":
        return list(whole.transpose(0, 1).contiguous().unbind(1))
    if how == "parts":
        return list(whole.unbind())
    apart = [part.clone() for part in whole.unbind()]
    if how == "pitches":
        apart[::2] = [torch.cat([part] * 3, 1)[:, k : 2 * k] for part in apart[::2]]
    return apart


def _scales(whole: Tensor, how: str) -> Any:
    if how in ("whole", "one"):
        return whole if how == "whole" else [whole]
    parts = list(whole.unbind())
    if how == "columns":
        return [part.clone()[..., None] for part in parts]
    return parts if how == "parts" else [part.clone() for part in parts]


def _listed(value: Any) -> list[Tensor]:
    return [t for t in (value if isinstance(value, list) else [value]) if isinstance(t, Tensor)]


@dataclass
class Call:
    """Arguments of index_group_matmul, what must come of them, and in which rows."""

    arguments: dict[str, Any]
    before: Tensor
    want: Tensor
    used: Tensor

    @property
    def got(self) -> Tensor:
        return torch.cat(_listed(self.arguments["out"]))

    @property
    def inputs(self) -> list[Tensor]:
        return [t for name, v in self.arguments.items() if name != "out" for t in _listed(v)]

    def become(self, other: Call) -> None:
        """Takes the contents of a call of the same shapes."""
        mine = self.inputs + _listed(self.arguments["out"])
        theirs = other.inputs + _listed(other.arguments["out"])
        for old, new in zip(mine, theirs, strict=True):
            old.copy_(new)
        self.before, self.want, self.used = other.before, other.want, other.used

    def check(self) -> None:
        assert torch.equal(self.got[self.used], self.want[self.used])
        assert same_bits(self.got[~self.used], self.before[~self.used]), "other rows were written"


def make_call(
    case: Case,
    form: Form,
    device: str = "cpu",
    seed: int = 0,
    lengths: tuple[int, ...] | None = None,
) -> Call:
    """A call that any right kernel computes to the last bit.

    lengths: of the experts' tensors, where rows come one tensor per expert.
    """
    if Granularity.TOKEN not in case.epilogue:
        form = replace(form, per_token_scale="whole")
    counts = case.counts
    if form.rows_per_expert and len(counts) > 1:
        lengths = lengths or tuple(count + form.room for count in counts)
        case = replace(case, counts=lengths, spare=0)
    else:
        lengths = counts
    inputs = make_inputs(case, device, exact=True, seed=seed)
    want = cm.grouped_matmul_reference(**inputs)
    used = [torch.arange(length) < count for length, count in zip(lengths, counts, strict=True)]
    used.append(torch.zeros(case.rows - sum(lengths), dtype=torch.bool))
    before = poisoned(case.rows, case.n, inputs.pop("out_dtype"), device)
    group_list = torch.tensor(counts, dtype=form.dtype, device=device)
    if form.kind == "cumsum":
        group_list = group_list.cumsum(0, dtype=form.dtype)
    if len(counts) == 1:  # nothing to split
        lengths = (case.rows,)
    arguments = {
        **{name: inputs.get(name) for name in ("index", "bias", "accumulation")},
        "x": inputs["x"] if case.gather else _rows(inputs["x"], lengths, form.x),
        "weight": _weights(inputs["weight"], form.weight),
        "scale": None,
        "per_token_scale": inputs.get("per_token_scale"),
        "group_list": group_list,
        "group_list_type": form.kind,
        "out": _rows(before.clone(), lengths, form.out),
    }
    if "scale" in inputs:
        arguments["scale"] = _scales(inputs["scale"], form.scale)
    if "per_token_scale" in inputs and not case.gather:
        scales = _rows(inputs["per_token_scale"], lengths, form.per_token_scale)
        arguments["per_token_scale"] = scales
    return Call(arguments, before, want, torch.cat(used).to(device))
