"""A job that kills the process it runs in; by itself, so that the process starts quickly."""

import os
import signal


def crash_on_three(number: int) -> int:
    """Ten times the number."""
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * 10
