"""Whether a reference, samples and a network belong together, as far as the files say."""

from evaluations.c2i.npz_reader import NpzImages

REFERENCE_OF = {"samples": "fid reference", "reconstructions": "rfid reference"}


def check_pair(reference: NpzImages, samples: NpzImages) -> None:
    """Raises ValueError if the files are swapped, or the reference is not one of these samples."""
    if samples.path.samefile(reference.path):
        raise ValueError(f"{samples.path}: expected two files, got the same as reference and as "
                         "samples")
    kind = kind_of(samples)
    reference_kind = kind_of(reference)
    if reference_kind in REFERENCE_OF:
        raise ValueError(f"{reference.path}: expected a reference, found {reference_kind}; the "
                         "order is REFERENCE SAMPLES")
    if is_reference(samples) and not is_reference(reference):
        raise ValueError(f"{samples.path}: expected samples, found a {kind or 'reference'}; the "
                         "order is REFERENCE SAMPLES")
    wanted = REFERENCE_OF.get(kind)
    if wanted and reference_kind and reference_kind != wanted:
        raise ValueError(f"{reference.path}: expected a {wanted}, since {samples.path.name} holds "
                         f"{kind}; found a {reference_kind}; make one with make_reference.py "
                         f"--kind {wanted.split()[0]}")
    if kind == "reconstructions":
        check_originals(reference, samples)


def check_originals(originals: NpzImages, reconstructions: NpzImages) -> None:
    """Raises ValueError unless two files may be pictures and their reconstructions."""
    if originals.shape != reconstructions.shape:
        raise ValueError(f"{originals.path}: expected {_count(reconstructions)}, the originals of "
                         f"{reconstructions.path.name}, found {_count(originals)}; make both of "
                         "the same images")
    expected = reconstructions.settings.get("images_sha256")
    found = originals.settings.get("images_sha256")
    are_known = expected is not None and found is not None
    if are_known and expected != found:
        raise ValueError(f"{originals.path}: expected the originals of "
                         f"{reconstructions.path.name}, found other images (names and labels "
                         "differ); make both of the same images")


def _count(images: NpzImages) -> str:
    count, height, width, _ = images.shape
    return f"{count} pictures of {height} x {width} pixels"


def kind_of(images: NpzImages) -> str | None:
    """Returns the kind of npz that a file records; None if it records none."""
    kind = images.settings.get("kind")
    return kind if isinstance(kind, str) else None


def is_reference(images: NpzImages) -> bool:
    """Returns whether a file calls itself a reference or, as ADM's, has ready statistics."""
    kind = kind_of(images)
    if kind is None:
        return images.array("mu") is not None
    return kind.endswith(" reference")


def check_class_names(classes: list[str], owner: str, files: list[NpzImages]) -> None:
    """Raises ValueError if a file names other classes than `owner`, or in another order."""
    for images in files:
        names = images.settings.get("class_names")
        if names is None or names == classes:
            continue
        raise ValueError(f"{images.path}: expected the {len(classes)} classes of {owner}, in "
                         f"order, found {_difference(classes, names)}; their labels cannot be "
                         "compared")


def _difference(classes: list[str], names: object) -> str:
    """Returns how the names in a file, which need not be a list, differ from the classes."""
    if not isinstance(names, list):
        return f"{names} of them"
    for expected, found in zip(classes, names, strict=False):
        if found != expected:
            return f"{found} instead of {expected}"
    return f"{len(names)} of them"
