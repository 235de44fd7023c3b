"""What an instruction tells the machine when it does not simply go on to the next."""

from __future__ import annotations

import enum


class Outcome(enum.Enum):
    YIELD = "another warp may run before the next instruction"
    AGAIN = "the fragment waits and then executes the instruction again"
    PARKED = "the fragment waits behind the instruction until somebody releases it"


YIELD, AGAIN, PARKED = Outcome


class State(enum.Enum):
    READY = "ready"
    WAITING = "waiting"  # for an mbarrier, a named barrier or registers
    GATHERING = "gathering"  # for the other lanes of the warp, before a .sync instruction
    DONE = "done"


READY, WAITING, GATHERING, DONE = State
