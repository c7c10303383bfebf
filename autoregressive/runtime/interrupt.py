"""Signals that ask a run to save and leave: SIGTERM and SIGUSR1, which clusters send before they take a node."""

import signal


class Interrupt:
    """Remembers the first signal that asked this process to leave; the work looks at it between updates.

    Attributes:
        received: its number; 0 while there was none.
    """

    def __init__(self):
        self.received = 0
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number, _frame):
        self.received = self.received or number
