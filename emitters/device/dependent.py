"""Programmatic dependent launch: a kernel may start before the previous one has ended."""

from __future__ import annotations

import cutlass.cute as cute


def wait_for_previous():
    """Waits until the previous kernel has ended and all that it wrote is visible.

    Returns at once if the launch depends on no kernel.
    """
    cute.arch.griddepcontrol_wait()


def launch_next():
    """Lets the next kernel start, if it was launched to depend on this one."""
    cute.arch.griddepcontrol_launch_dependents()
