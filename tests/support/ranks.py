"""Ranks of a distributed program as processes of this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import multiprocessing


def run_ranks(run: Callable[..., None], arguments: tuple[Any, ...], ranks: int) -> None:
    """Calls run(rank, *arguments) in a process per rank; raises what one raises.

    They are forked from one process that has imported the function's module, torch with it.
    """
    multiprocessing.set_forkserver_preload([run.__module__])
    multiprocessing.start_processes(run, arguments, ranks, start_method="forkserver")
