"""Fields of a config.json: read by name, and those that were not read but speak of experts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

# What speaks of the experts, their router or their activation, and what only seems to.
_SPEAKS = re.compile(
    r"(^|_)(moe|experts?|ffn|router?|routed|routing|gate|gating|scor\w*|topk|top_k|swiglu\w*|latent"
    r"|act|activation)(_|$)"
)
_ELSEWHERE = re.compile(r"attn|attention|index|mtp|mamba|mla|kda|linear|projector|vision|audio")
# Of training, of generation, and arguments of `topk_router`: none of them changes an image.
_HARMLESS = frozenset(
    {
        "output_router_logits",
        "output_scores",
        "top_k",
        "router_aux_loss_coef",
        "router_z_loss_coef",
        "router_jitter_noise",
        "moe_aux_loss_coeff",
        "expert_dropout",
        "router_dtype",
        "norm_topk_prob",
        "topk_group",
        "routed_scaling_factor",
        "moe_router_enable_expert_bias",
    }
)


class Fields:
    """A model's fields by name, with dots into objects and lists: "a.b", "a.0".

    A field that is false is as good as absent.

    read: the names asked for so far.
    """

    def __init__(self, plain: dict[str, Any]) -> None:
        self.plain = plain
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """The field's value as it stands, or None."""
        self.read |= {name, name.rpartition(".")[0]}
        value: Any = self.plain
        for part in name.split("."):
            if isinstance(value, list) and part.isdigit() and int(part) < len(value):
                value = value[int(part)]
            else:
                value = value.get(part) if isinstance(value, dict) else None
        return None if value is False else value

    def first(self, names: Iterable[str]) -> Any:
        """The value of the first of these fields that has one. A list stands for one value of all
        layers: raises ValueError where it holds several."""
        for name in names:
            value = self.get(name)
            if isinstance(value, list) and value:
                if any(one != value[0] for one in value):
                    raise ValueError(f"{name} must be the same in every layer, got {value}")
                value = value[0]
            if value is not None and value != []:
                return value
        return None

    def number(self, names: Iterable[str], default: int = 0) -> int:
        """As `first`, of a whole number. Raises ValueError for other values."""
        names = tuple(names)
        value = self.first(names)
        if value is None:
            return default
        if not isinstance(value, int):
            raise ValueError(f"{' or '.join(names)} must be an integer, got {value!r}")
        return int(value)

    def layers(self) -> int | None:
        """How many the model has, where a field says so."""
        return self.number(("num_hidden_layers", "num_layers", "n_layers")) or None

    def unread(self, known: Iterable[str]) -> Iterator[tuple[str, Any]]:
        """Fields that speak of the MoE layer, ask for something, and were neither read nor are
        known."""
        understood = self.read | _HARMLESS | set(known)
        for name, value in _flat(self.plain):
            last = name.rpartition(".")[2]
            asks = value not in (None, False, [])
            speaks = _SPEAKS.search(last) and not _ELSEWHERE.search(name)
            if asks and speaks and name not in understood:
                yield name, value


def _flat(plain: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in plain.items():
        if isinstance(value, dict) and _SPEAKS.search(name):
            yield from ((f"{name}.{inner}", one) for inner, one in value.items())
        elif not isinstance(value, dict):
            yield name, value
