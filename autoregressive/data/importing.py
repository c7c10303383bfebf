"""From ready codes to a store: what every image must hold, the names of its classes, the copying.

Letters: N images, T tokens.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.codes import code_dtype, numbered_classes
from autoregressive.data.ready_codes import CodeSource, Reader
from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import message_of
from autoregressive.runtime.log import progress

WRITTEN_TOGETHER = 4096         # images
LOOKED_AT = 100                 # images, of which one at least must be right before any work


def read_class_names(path: str | Path) -> list[str]:
    """Reads the names of classes, one a line, in the order of their labels.

    Raises:
        ValueError: the file is no text, empty, or holds an empty line.
    """
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected names of classes in UTF-8, {error}; save it as "
                         "that") from error
    if not names or "" in names:
        found = f"line {names.index('') + 1} empty" if names else "none"
        raise ValueError(f"{path}: expected a name of a class in every line, found {found}; write "
                         "one for each class")
    return names


def choose_class_names(source: CodeSource, given: list[str] | None) -> list[str]:
    """Returns the names of all classes: those that are given, the source's, or their numbers.

    Args:
        source: CodeSource.
        given: names, or None.

    Raises:
        ValueError: they are not as many as the classes, or nothing tells how many there are.
    """
    labels = np.unique(source.labels)
    if labels[0] < 0:
        raise ValueError(f"{source.path}: expected labels of at least 0, found {labels[0]}; make "
                         "the codes again")
    if given is None and source.class_names is not None:
        return source.class_names
    if given is None:
        absent = np.flatnonzero(labels != np.arange(len(labels)))
        if len(absent):
            raise ValueError(f"{source.path}: expected images of every class, found none of class "
                             f"{absent[0]} of {labels[-1] + 1}; name all classes with "
                             "--class-names")
        return numbered_classes(len(labels))
    count = labels[-1] + 1
    if count > len(given) or source.class_names is not None and count != len(given):
        raise ValueError(f"--class-names: expected names of {count} classes as in {source.path}, "
                         f"got {len(given)}; write one a line")
    return given


def read_codes(source: CodeSource, row: int, read: Reader, manifest: dict[str, Any]) -> np.ndarray:
    """Returns the codes (crops, T) of an image, integers.

    Args:
        source: CodeSource.
        row: of the image.
        read: what its readers yield for it.
        manifest: of the store: num_crops, num_tokens, codebook_size.

    Raises:
        ValueError, OSError: they cannot be read, or are no such codes; the message names the file.
    """
    codes = read()
    expected = (manifest["num_crops"], manifest["num_tokens"])
    if codes.shape != expected:
        raise ValueError(f"{source.path / source.name_of(row)}: expected codes {expected} of "
                         f"pictures of {manifest['image_size']} pixels, found {codes.shape}; give "
                         "the --image-size and --vq-model of these codes")
    smallest = int(codes.min())
    largest = int(codes.max())
    if smallest < 0 or largest >= manifest["codebook_size"]:
        raise ValueError(f"{source.path / source.name_of(row)}: expected codes 0 .. "
                         f"{manifest['codebook_size'] - 1}, found {smallest} .. {largest}; give "
                         "the --codebook-size of these codes")
    return codes


def check_some(source: CodeSource, manifest: dict[str, Any]) -> None:
    """Raises ValueError if not one of the first images holds what the manifest says."""
    first_error = None
    everything = np.ones(len(source), dtype=bool)
    for row, read in itertools.islice(source.readers(everything), LOOKED_AT):
        try:
            read_codes(source, row, read, manifest)
            return
        except (OSError, ValueError) as error:
            first_error = first_error or error
    raise first_error


def check_written(source: CodeSource, writer: CodeWriter) -> None:
    """Raises ValueError if one of a few images that are written has other codes by now."""
    written = writer.rows.array("codes")
    is_written = ~writer.rows.is_missing()
    count = min(LOOKED_AT, np.count_nonzero(is_written))            # no more: a tar is read for it
    for row, read in itertools.islice(source.readers(is_written), count) if count else ():
        if not np.array_equal(read_codes(source, row, read, writer.manifest), written[row]):
            raise ValueError(f"{source.path / source.name_of(row)}: expected the codes that "
                             f"{writer.path} was begun with, found others; begin anew with "
                             "--overwrite")


def copy_codes(source: CodeSource, writer: CodeWriter, session: Session) -> None:
    """Writes the codes that are not in a store yet; images that cannot be read become failures."""
    manifest = writer.manifest
    shape = (WRITTEN_TOGETHER, manifest["num_crops"], manifest["num_tokens"])
    codes = np.empty(shape, code_dtype(manifest["codebook_size"]))
    readers = source.readers(writer.rows.is_missing())
    with progress(session, len(source), "import", "image", initial=writer.rows.num_done) as bar:
        while True:
            rows = []
            failures = {}
            for row, read in itertools.islice(readers, WRITTEN_TOGETHER):
                try:
                    codes[len(rows)] = read_codes(source, row, read, manifest)
                except (OSError, ValueError) as error:
                    failures[row] = (source.name_of(row), message_of(error))
                rows.append(row)
            if not rows:
                break
            order = np.argsort(rows)                # a tar has an order of its own
            writer.write(np.array(rows)[order], codes[order], failures)
            bar.update(len(rows))
