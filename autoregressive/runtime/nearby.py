"""Files that belong to each other, looked for in the folders beside each other."""

from collections.abc import Iterator
from pathlib import Path

PRETRAINED = Path("pretrained_models")      # where published files are put


def folders_near(*paths: str | Path, levels: int = 1) -> list[Path]:
    """Returns folders, as many parents of each as `levels`, and pretrained_models, each once."""
    folders = []
    for path in paths:
        absolute = Path(path).resolve()
        folders += [absolute, *absolute.parents[:levels]]
    return list(dict.fromkeys([*folders, PRETRAINED.resolve()]))


def files_in(folders: list[Path], *patterns: str) -> Iterator[Path]:
    """Yields the files of some folders whose names match a pattern, in order of folder and name."""
    for folder in folders:
        for pattern in patterns:
            yield from sorted(path for path in folder.glob(pattern) if path.is_file())


def only_one(fitting: list[Path], flag: str, what: str) -> Path | None:
    """Returns the one file that fits, None if there is none.

    Args:
        fitting: files.
        flag: that names one of them.
        what: they are, for the error.

    Raises:
        ValueError: several fit.
    """
    if len(fitting) > 1:
        raise ValueError(f"{flag}: expected one {what} in these folders, found "
                         f"{' and '.join(map(str, fitting))}; name one of them")
    return fitting[0] if fitting else None
