"""What classes are called, and which one a word means."""

import difflib
from collections.abc import Sequence

from autoregressive.data.codes import numbered_classes

# ImageNet's classes are those of ILSVRC, whose folders are named by WordNet, in this order.
NUM_IMAGENET_CLASSES = 1000
FIRST_IMAGENET_FOLDER = "n01440764"
LAST_IMAGENET_FOLDER = "n15075141"
NUM_NEAREST = 5                 # names in an error


def known_names(recorded: Sequence[str] | None, num_classes: int) -> Sequence[str] | None:
    """Returns the names of all classes that people know them by; None if there are none.

    A thousand classes without names, or with the numbers or the folders of ImageNet as names, are
    those of ImageNet.

    Args:
        recorded: names that a file records, or None.
        num_classes: how many there are.
    """
    if num_classes != NUM_IMAGENET_CLASSES:
        return recorded
    has_no_names = not recorded or recorded == numbered_classes(num_classes)
    if has_no_names or (recorded[0], recorded[-1]) == (FIRST_IMAGENET_FOLDER, LAST_IMAGENET_FOLDER):
        return imagenet_names()
    return recorded


def names_to_show(recorded: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    """Returns what to call all classes in captions: known_names, else their numbers."""
    return known_names(recorded, num_classes) or [f"class {label}" for label in range(num_classes)]


def imagenet_names() -> Sequence[str]:
    """Returns the names of ImageNet's classes in the order of their folders; no two are equal."""
    from torchvision.models import ResNet50_Weights  # here: it takes a second

    return ResNet50_Weights.DEFAULT.meta["categories"]


def read_classes(text: str, recorded: Sequence[str] | None, num_classes: int) -> list[int]:
    """Returns the class indices of a list of indices and names, the value of --class-ids.

    Args:
        text: with commas between, such as "207,tench".
        recorded: names that the checkpoint records, or None.
        num_classes: indices are below it.

    Raises:
        ValueError: an index out of range, or no name of exactly one class.
    """
    return [_read_class(word.strip(), recorded, num_classes) for word in text.split(",")]


def _read_class(word: str, recorded: Sequence[str] | None, num_classes: int) -> int:
    """Returns the index of the class that a word names: exactly, else in upper or lower case."""
    known = known_names(recorded, num_classes) or []
    for names in (recorded or [], known):           # a name first: digits are called "0" to "9"
        exact = [label for label, name in enumerate(names) if name == word]
        found = exact or [label for label, name in enumerate(names)
                          if name.casefold() == word.casefold()]
        if len(found) > 1:
            numbers = " and ".join(map(str, found))
            raise ValueError(f"--class-ids: expected a name of one class, got {word!r}, a name of "
                             f"{numbers}; give the number")
        if found:
            return found[0]
    if word.isdecimal() and len(word) < 10 and int(word) < num_classes:
        return int(word)
    others = " (the checkpoint carries no names)"
    if known:
        others = f" or names such as {known[0]}"
    nearest = ", ".join(f"{known[label]} ({label})" for label in _nearest(word, known))
    advice = f"; near it are {nearest}" if nearest else ""
    raise ValueError(f"--class-ids: expected indices in 0 .. {num_classes - 1}{others}, got "
                     f"{word!r}{advice}")


def _nearest(word: str, names: Sequence[str]) -> list[int]:
    """Returns the classes, a few, whose names contain a word, then those whose names are alike."""
    folded = [name.casefold() for name in names]
    containing = [name for name in folded if word and word.casefold() in name]
    similar = difflib.get_close_matches(word.casefold(), folded, NUM_NEAREST)
    return [folded.index(name) for name in dict.fromkeys([*containing, *similar])][:NUM_NEAREST]
