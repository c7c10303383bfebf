"""A look at the data of a run that takes longer than its first steps may wait for it."""

import threading
from collections.abc import Callable
from pathlib import Path


class Verification(threading.Thread):
    """A look at the data beside the work; it leaves an empty file `verified` if it finds nothing wrong."""

    def __init__(self, verify: Callable[[], None], verified: Path):
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
        try:
            self._verify()
            self._verified.touch()
        except Exception as error:                  # whatever it is: unverified data do not count as good
            self._error = error

    def result(self, seconds: float | None) -> Exception | None:
        """Waits some seconds, or to the end (None); returns what is wrong, None if nothing was found until then."""
        self.join(seconds)
        return self._error
