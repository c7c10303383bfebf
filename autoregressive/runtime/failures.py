"""Images of a set that cannot be used: named in the log, left out, and counted.

The same in every script that reads images, or codes of images.
"""

import argparse

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Parser, fraction_up_to_1, may_vary
from autoregressive.runtime.log import LOGGER

NUM_LISTED = 10                                     # broken images that the log names at once


def add_failure_args(parser: Parser | argparse._ArgumentGroup) -> None:
    """Declares how many images may be broken: the same in every script that reads images."""
    may_vary(parser.add_argument("--max-failures", type=fraction_up_to_1, default=0.001,
                                 help="fraction of images that may be broken; more end with exit "
                                      "code 1 and a list"))


class Failures:
    """Broken images of a dataset: named in the log and left out; too many of them end the work.

    Attributes:
        num_images: of the dataset.
        max_failures: fraction of them that may be broken.
        found: row -> (path, reason).
    """

    def __init__(self, num_images: int, max_failures: float) -> None:
        self.num_images = num_images
        self.max_failures = max_failures
        self.found: dict[int, tuple[str, str]] = {}
        self._num_reported = 0

    @property
    def are_too_many(self) -> bool:
        """Whether more than the fraction, or all of them, are broken."""
        count = len(self.found)
        return count > self.max_failures * self.num_images or count == self.num_images

    def add(self, failures: dict[int, tuple[str, str]]) -> None:
        """Adds rows -> (path, reason), and names in the log those that are new."""
        new = [reason for row, (_, reason) in failures.items() if row not in self.found]
        self.found |= failures
        for reason in new[:NUM_LISTED]:
            LOGGER.warning("broken: %s", reason)

    def gather(self, session: Session) -> None:
        """Adds what the other processes found (all call this)."""
        for failures in session.gather(self.found):
            self.add(failures)

    def check(self, where: str = "", consequence: str = "they are left out") -> None:
        """Says how many images are broken, when their number has changed.

        Args:
            where: follows the number: where all of them are listed.
            consequence: what becomes of an image that may be broken.

        Raises:
            SystemExit: with exit code 1, if more are broken than may be.
        """
        count = len(self.found)
        listed = f"{count} of {self.num_images} images are broken{where}"
        if self.are_too_many:
            _, first_reason = next(iter(self.found.values()))
            LOGGER.error("%s, such as %s. More than --max-failures %g: repair or remove them and "
                         "run the same command again, or raise --max-failures", listed,
                         first_reason, self.max_failures)
            raise SystemExit(1)
        if count > self._num_reported:
            LOGGER.warning("%s, and %s", listed, consequence)
            self._num_reported = count
