"""The environment variables that the library reads: all of them, with their defaults.

`python -m cutlass_moe.environment` prints the table of the operating manual.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Text(NamedTuple):
    """A variable that holds text; an unset one reads as ""."""

    name: str
    default: str  # in words
    meaning: str

    def read(self) -> str:
        return os.environ.get(self.name, "")

    def paths(self) -> list[str]:
        """The paths in a list that is written like PATH; empty ones are left out."""
        return [path for path in self.read().split(os.pathsep) if path]


class Switch(NamedTuple):
    """A variable that is 0 or 1."""

    name: str
    default: str
    meaning: str

    def on(self) -> bool:
        """Raises ValueError where it is set to anything but 0 or 1."""
        text = os.environ.get(self.name) or self.default
        if text not in ("0", "1"):
            raise ValueError(f"{self.name} must be 0 or 1, got {text!r}")
        return text == "1"


CACHE_DIR = Text(
    "CUTLASS_MOE_CACHE_DIR",
    "`cutlass_moe` in `$XDG_CACHE_HOME`, else in `~/.cache`",
    "Roots to search for kernel images, separated like `PATH`. The last one is written to where "
    "it is a directory that this process may write to; the others are only read.",
)
JIT = Switch(
    "CUTLASS_MOE_JIT",
    "1",
    "0: never compile. A missing image is then an error that names the problem, the nearest image "
    "and the command that builds it.",
)
TUNING = Text(
    "CUTLASS_MOE_TUNING",
    "none",
    "Tuning tables, separated like `PATH`, that are asked before the tables of this package.",
)
TRUST_ROOT = Switch(
    "CUTLASS_MOE_TRUST_ROOT", "0", "1: use roots that other users can write to. Images are code."
)
STRICT = Switch(
    "CUTLASS_MOE_STRICT",
    "0",
    "1: raise where no kernel exists for a problem. By default a warning says so once, and the "
    "slow PyTorch path is taken.",
)
LOG = Switch(
    "CUTLASS_MOE_LOG",
    "0",
    "1: print to stderr, once per new signature of a call, what was chosen: problem, config, "
    "whether a table or an estimate chose it, the image and the seconds to load or compile it, or "
    "why there is no kernel.",
)
VLLM = Switch(
    "CUTLASS_MOE_VLLM", "1", "0: vLLM runs its own experts, although this package is installed."
)
SGLANG = Switch(
    "CUTLASS_MOE_SGLANG", "1", "0: SGLang runs its own experts, although this package is installed."
)
VARIABLES: tuple[Text | Switch, ...] = (
    CACHE_DIR,
    JIT,
    TUNING,
    TRUST_ROOT,
    STRICT,
    LOG,
    VLLM,
    SGLANG,
)


def markdown() -> str:
    """The table of all variables."""
    rows = [f"| `{v.name}` | {v.default} | {v.meaning} |" for v in VARIABLES]
    return "\n".join(["| variable | default | meaning |", "| --- | --- | --- |", *rows]) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
