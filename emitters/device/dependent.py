"""Programmatic dependent launch: a kernel may start before the one ahead of it has ended."""

from __future__ import annotations

import cutlass.cute as cute


def wait_for_previous():
    """Until the kernel ahead has ended, with all that it wrote; at once where there is none."""
    cute.arch.griddepcontrol_wait()


def launch_next():
    """Lets the kernel behind start, where it was launched to depend on this one."""
    cute.arch.griddepcontrol_launch_dependents()
