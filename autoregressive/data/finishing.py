"""The end of making a store of codes: complete, with a list of what failed, and verified."""

from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.opening import open_codes
from autoregressive.data.store_checks import verify_checksums
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import checks
from autoregressive.runtime.failures import Failures
from autoregressive.runtime.log import LOGGER, progress


def verify_finished(writer: CodeWriter, session: Session) -> None:
    """Compares a finished store with its checksums; ends with exit code 2 if it is damaged."""
    count = writer.manifest["num_images"]
    with checks(session), progress(session, count, "verify", "image") as bar:
        if session.is_main:
            verify_checksums(open_codes(writer.path), bar)
    LOGGER.info("%s is finished: %d images, checksums verified", writer.path, count)


def finish_store(writer: CodeWriter, max_failures: float, session: Session) -> None:
    """Waits for all rows and completes the store.

    Ends the process with exit code 1 if too many images are broken.

    Args:
        writer: of the store.
        max_failures: fraction of the images that may be broken.
        session: Session.
    """
    count = writer.manifest["num_images"]
    writer.rows.wait_for_others()
    with progress(session, count, "checksums", "image") as bar:
        failed = writer.finish(max_failures * count, bar)
    failures = Failures(count, max_failures)
    failures.add({failure["row"]: (failure["path"], failure["reason"]) for failure in failed})
    failures.check(f"; {writer.path / 'manifest.json'} lists them, and the same command tries only "
                   "these again", consequence="training leaves them out")
    LOGGER.info("%d images, %d crops of %d tokens each; codes in %s", count,
                writer.manifest["num_crops"], writer.manifest["num_tokens"], writer.path)
