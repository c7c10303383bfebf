"""Which files of a folder of class folders are images: as torchvision's ImageFolder, in its order.

Unlike ImageFolder, hidden files and hidden folders of classes are left out, pipes and devices are
never opened, and links that lead back into a folder that one is already in are not followed.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from autoregressive.runtime.log import LOGGER

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
FILE = "file"
FOLDER = "folder"
SPECIAL = "pipe or device"


def list_images(root: Path, flag: str) -> tuple[list[str], list[list[str]]]:
    """Lists the images of a folder of class folders; a warning counts what is left out.

    Args:
        root: the folder.
        flag: that names it, for an error.

    Returns:
        names of the classes, sorted, and of each the paths of its images, folder after folder.

    Raises:
        ValueError: there is no such folder, no class in it, or a class without images.
    """
    if not root.is_dir():
        found = "a file" if root.exists() else "none"
        raise ValueError(f"{root}: expected a folder of class folders, found {found}; "
                         f"name one as {flag}")
    entries = [entry for entry in os.scandir(root) if not entry.name.startswith(".")]
    class_names = sorted(entry.name for entry in entries if _kind_of(entry) == FOLDER)
    num_loose = len(entries) - len(class_names)
    if not class_names:
        raise ValueError(f"{root}: expected one folder a class, found {num_loose} files and no "
                         "folder; move the images into folders named after their classes")
    left_out = Counter({"outside the class folders": num_loose} if num_loose else {})
    outer = {_identity_of(folder) for folder in (root, *root.resolve().parents)}
    paths_of_classes = []
    for class_name in class_names:
        paths = list(_walk(root / class_name, outer, left_out))
        if not paths:
            raise ValueError(f"{root / class_name}: expected images ({', '.join(IMAGE_SUFFIXES)}) "
                             "of a class, found none; remove the folder or fill it")
        paths_of_classes.append(paths)
    if left_out:
        listed = ", ".join(f"{count} {what}" for what, count in left_out.most_common())
        LOGGER.warning("%s: left out %d entries that are no images: %s", root, left_out.total(),
                       listed)
    return class_names, paths_of_classes


def _walk(class_folder: Path, outer: set[tuple[int, int]], left_out: Counter) -> Iterator[str]:
    """Yields the images of a class.

    Args:
        class_folder: the folder of the class.
        outer: identities of the folders that it lies in.
        left_out: what is left out -> how often; added to.
    """
    images_of = {}                                              # folder -> its images
    to_enter = [(str(class_folder), outer)]
    while to_enter:
        folder, above = to_enter.pop()
        try:
            identity = _identity_of(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            left_out["folders that cannot be read"] += 1
            continue
        if identity in above:
            left_out["links that lead back"] += 1
            continue
        images_of[folder] = [entry.path for entry in entries if _is_image(entry, left_out)]
        to_enter += [(entry.path, above | {identity}) for entry in entries
                     if _kind_of(entry) == FOLDER]
    for folder in sorted(images_of):
        yield from images_of[folder]


def _is_image(entry: os.DirEntry, left_out: Counter) -> bool:
    """Says whether an entry is listed, and counts it if it is neither listed nor entered."""
    kind = _kind_of(entry)
    is_hidden = entry.name.startswith(".")
    is_named_so = entry.name.lower().endswith(IMAGE_SUFFIXES) and not is_hidden
    if is_named_so and kind == FILE:
        return True     # a folder that is called like an image is none: it is entered as any other
    if kind == SPECIAL:
        left_out["pipes or devices"] += 1
    elif kind == FILE:
        suffix = Path(entry.name).suffix.lower() or "without an ending"
        left_out["hidden" if is_hidden else suffix] += 1
    return False


def _kind_of(entry: os.DirEntry) -> str:
    """Returns FILE, FOLDER or SPECIAL.

    A link to nowhere is a file: reading it fails, not listing it.
    """
    try:
        if entry.is_file():                                     # mostly without reading the disk
            return FILE
        if entry.is_dir():
            return FOLDER
        entry.stat()
        return SPECIAL
    except OSError:
        return FILE


def _identity_of(folder: str | Path) -> tuple[int, int]:
    """Returns what is the same for all paths to one folder: device and inode."""
    found = os.stat(folder)
    return found.st_dev, found.st_ino
