"""Whether a reference, samples and a network belong together, as far as the files say what they are."""

from evaluations.c2i.npz_reader import NpzImages

REFERENCE_OF = {"samples": "fid reference", "reconstructions": "rfid reference"}


def check_pair(reference: NpzImages, samples: NpzImages) -> None:
    """Raises ValueError if the files are swapped, or the reference is not one of these samples."""
    if samples.path.samefile(reference.path):
        raise ValueError(f"{samples.path}: expected two files, got the same as reference and as samples")
    kind, reference_kind = kind_of(samples), kind_of(reference)
    if reference_kind in REFERENCE_OF:
        raise ValueError(f"{reference.path}: expected a reference, found {reference_kind}; the order "
                         "is REFERENCE SAMPLES")
    if is_reference(samples) and not is_reference(reference):
        raise ValueError(f"{samples.path}: expected samples, found a {kind or 'reference'}; the order "
                         "is REFERENCE SAMPLES")
    wanted = REFERENCE_OF.get(kind)
    if wanted and reference_kind and reference_kind != wanted:
        raise ValueError(f"{reference.path}: expected a {wanted}, since {samples.path.name} holds "
                         f"{kind}; found a {reference_kind}")
    if kind == "reconstructions":
        check_originals(reference, samples)


def check_originals(originals: NpzImages, reconstructions: NpzImages) -> None:
    """Raises ValueError unless two files may be pictures and their reconstructions, in equal number."""
    if originals.shape != reconstructions.shape:
        raise ValueError(f"{originals.path}: expected {_count(reconstructions)}, the originals of "
                         f"{reconstructions.path.name}, found {_count(originals)}; make both of the "
                         "same images")
    hashes = [images.settings.get("images_sha256") for images in (originals, reconstructions)]
    if None not in hashes and hashes[0] != hashes[1]:
        raise ValueError(f"{originals.path}: expected the originals of {reconstructions.path.name}, "
                         "found other images (names and labels differ); make both of the same images")


def _count(images: NpzImages) -> str:
    count, height, width, _ = images.shape
    return f"{count} pictures of {height} x {width} pixels"


def kind_of(images: NpzImages) -> str | None:
    """Returns what a file says that it is; None if it does not."""
    kind = images.settings.get("kind")
    return kind if isinstance(kind, str) else None


def is_reference(images: NpzImages) -> bool:
    """Says whether a file calls itself a reference, or, as those of ADM, carries ready statistics."""
    kind = kind_of(images)
    return images.array("mu") is not None if kind is None else kind.endswith(" reference")


def check_class_names(classes: list[str], owner: str, files: list[NpzImages]) -> None:
    """Raises ValueError if a file knows other names of the classes than `owner`, or another order."""
    for images in files:
        names = images.settings.get("class_names")
        if names is None or names == classes:
            continue
        is_list = isinstance(names, list)
        places = zip(classes, names, strict=False) if is_list else []
        different = [f"{found} instead of {name}" for name, found in places if found != name]
        found = different[0] if different else f"{len(names) if is_list else names} of them"
        raise ValueError(f"{images.path}: expected the {len(classes)} classes of {owner}, in order, "
                         f"found {found}; their labels cannot be compared")
