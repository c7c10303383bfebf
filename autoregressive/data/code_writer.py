"""Writes a store of codes, of the layout in codes.py, from any number of processes at once.

Letters: N images, T tokens.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from autoregressive.data.checksums import CHECKSUM_ROWS, checksum_of_labels, checksum_of_rows
from autoregressive.data.codes import code_dtype
from autoregressive.runtime.entry import Parser, may_vary
from autoregressive.runtime.files import read_json, write_json
from autoregressive.runtime.identity import find_difference
from autoregressive.runtime.rows import FAILED, TO_DO, WRITTEN, RowWriter


def add_writer_args(parser: Parser) -> None:
    """Declares what may become of a store that lies at --code-path."""
    may_vary(parser.add_argument("--overwrite", action="store_true",
                                 help="replace a finished store, or one of another extraction, at "
                                      "--code-path"))


class CodeWriter:
    """One store that is being written; every process of an extraction opens its own.

    Attributes:
        path: its folder.
        target: the file in it that an extraction holds (Session.hold): what lies above the folder
            may belong to others.
        manifest: dict of what the codes are; never of when, or by how many processes, they were
            made.
        rows: RowWriter of the store's arrays.
    """

    def __init__(self, path: str | Path, manifest: dict[str, Any]) -> None:
        """Describes the store; nothing is written yet.

        Args:
            path: folder of the store.
            manifest: dict with at least num_images, num_crops, num_tokens, codebook_size.
        """
        self.path = Path(path)
        self.manifest = manifest
        self.target = self.path / "codes.npy"
        self._record = self.path / "manifest.json"
        shape_of_row = (manifest["num_crops"], manifest["num_tokens"])
        arrays = {"codes": (code_dtype(manifest["codebook_size"]), shape_of_row),
                  "labels": (np.int64, ())}
        self.rows = RowWriter(path, manifest, manifest["num_images"], arrays, "manifest.json")

    def create(self, labels: np.ndarray, overwrite: bool = False) -> None:
        """Lays out an unfinished store, or finds the one that the same extraction began.

        One process calls this. Rows that failed before are to be tried again. A finished store of
        the same manifest is left as it is.

        Args:
            labels: (N,) int64.
            overwrite: whether to replace a finished store, or that of another extraction.

        Raises:
            ValueError: another store, or something else, lies there, or the disk is too small.
        """
        is_store = self._record.is_file()
        pattern = ".*.tmp" if is_store else f".{self._record.name}.*.tmp"
        for unfinished in self.path.glob(pattern):      # left by a kill
            unfinished.unlink()
        if is_store:
            found = self._read_record(overwrite)
            difference = find_difference(self.manifest, found, self.manifest)
            if overwrite and (difference or found["complete"]):
                self._empty()
            elif difference:
                raise ValueError(f"{self.path}: expected a store with {difference}; choose another "
                                 "--code-path, or replace it with --overwrite")
            elif found["complete"]:
                self._remove_scaffolding()
                return
        elif self.path.is_dir() and not all(self._is_of_lock(path) for path in self.path.iterdir()):
            raise ValueError(f"{self.path}: expected a new or empty folder, or a store; found "
                             "other files")
        self.rows.create()
        status = np.array(self.rows.array("status"))
        status[status == FAILED] = TO_DO
        self.rows.write(range(len(labels)), labels=labels, status=status)
        shutil.rmtree(self.path / "failures", ignore_errors=True)

    def _empty(self) -> None:
        """Removes what a store holds, and writes its manifest in place of the old one.

        There is always a manifest, by which the next start finds a store here.
        """
        shutil.rmtree(self.path / "failures", ignore_errors=True)
        self.rows.clear()
        write_json(self._record, self.manifest | {"complete": False})

    def _is_of_lock(self, path: Path) -> bool:
        """Says whether a file is this store's lock, which lies in its folder, or left of one."""
        is_ours = path.name.startswith(f".{self.target.name}.")
        return is_ours and path.suffix in (".lock", ".tmp")

    def _read_record(self, overwrite: bool) -> dict[str, Any]:
        """Returns the manifest that lies there; one of no extraction if it is damaged.

        Raises:
            ValueError: it is damaged and not to be overwritten.
        """
        try:
            return read_json(self._record, {"complete": bool})
        except ValueError:
            if not overwrite:
                raise
            return {"complete": False}

    @property
    def is_complete(self) -> bool:
        """Whether the store on disk is finished."""
        return read_json(self._record, {"complete": bool})["complete"]

    def write(self, rows: range | np.ndarray, codes: np.ndarray,
              failures: dict[int, tuple[str, str]]) -> None:
        """Writes rows: failures first, then codes, then the status that counts them.

        Args:
            rows: as in RowWriter.write.
            codes: (len(rows), crops, T) integers.
            failures: dict of row -> (path, reason); the codes of these rows are never read.
        """
        codes = np.array(codes)
        status = np.full(len(rows), WRITTEN)
        for place, row in enumerate(np.asarray(rows).tolist()):
            if row not in failures:
                continue
            path, reason = failures[row]
            codes[place] = 0
            status[place] = FAILED
            write_json(self.path / "failures" / f"{row:09d}.json",
                       {"row": row, "path": path, "reason": reason})
        self.rows.write(rows, codes=codes, status=status)

    def finish(self, most_failures: float, bar: tqdm | None = None) -> list[dict[str, Any]]:
        """Completes the manifest: failures, checksums, and whether the store is whole.

        It is, unless too many rows failed. One process calls this, after rows.wait_for_others.

        Args:
            most_failures: rows that may have failed in a store that is whole; one without any
                image never is.
            bar: progress bar of the rows that are summed up.

        Returns:
            the list of failures, dicts of row, path and reason, by row.

        Raises:
            RuntimeError: rows are missing.
        """
        num_missing = self.rows.num_rows - self.rows.num_done
        if num_missing:
            raise RuntimeError(f"{self.path}: {num_missing} rows were not written; run the same "
                               "command again")
        failed = [read_json(path) for path in sorted((self.path / "failures").glob("*.json"))]
        is_complete = len(failed) <= most_failures and len(failed) < self.rows.num_rows
        manifest = self.manifest | {"failed": failed, "complete": is_complete}
        if is_complete:
            codes = self.rows.array("codes")
            manifest["checksum_rows"] = CHECKSUM_ROWS
            manifest["codes_sha256"] = [checksum_of_rows(codes, first, bar)
                                        for first in range(0, len(codes), CHECKSUM_ROWS)]
            manifest["labels_sha256"] = checksum_of_labels(self.rows.array("labels"))
        write_json(self._record, manifest)
        if is_complete:
            self._remove_scaffolding()
        return failed

    def _remove_scaffolding(self) -> None:
        """Removes from a finished store what was needed to write it."""
        (self.path / "status.npy").unlink(missing_ok=True)
        shutil.rmtree(self.path / "failures", ignore_errors=True)
