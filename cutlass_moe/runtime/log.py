"""The log of choices: with CUTLASS_MOE_LOG=1, each new choice for a call is printed.

Messages go to the logger "cutlass_moe" at level INFO. The variable adds a handler that prints them
to stderr; a program that configures `logging` itself sees them without the variable.
"""

from __future__ import annotations

import logging
import sys

from cutlass_moe.environment import LOG

logger = logging.getLogger("cutlass_moe")


class _Stderr(logging.StreamHandler):
    """Prints to the object that sys.stderr is at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _configure() -> None:
    if LOG.on():
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("cutlass_moe: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


_configure()
