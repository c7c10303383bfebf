"""Verifies the data of a run in the background, while its first steps are taken."""

import threading
from collections.abc import Callable
from pathlib import Path


class Verification(threading.Thread):
    """A verification in a thread; it leaves an empty file `verified` if it finds nothing wrong."""

    def __init__(self, verify: Callable[[], None], verified: Path) -> None:
        """
        Args:
            verify: raises an exception if the data are not what they were.
            verified: the empty file.
        """
        super().__init__(daemon=True)
        self._verify = verify
        self._verified = verified
        self._error: Exception | None = None

    def run(self) -> None:
        """Verifies, in the thread."""
        try:
            self._verify()
            self._verified.touch()
        except Exception as error:                  # whatever it is: these data are not verified
            self._error = error

    def result(self, seconds: float | None) -> Exception | None:
        """Waits for the verification; returns the error that it has found, None if none yet.

        Args:
            seconds: how long to wait; None waits for its end.
        """
        self.join(seconds)
        return self._error
