"""Ready codes in the layouts of others, made from arrays.

Letters: N images, T tokens.
"""

import io
import tarfile

import numpy as np


def npy(array):
    """Returns the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_tar(path, members, mode="w"):
    """Writes members (name, bytes) in their order."""
    with tarfile.open(path, mode) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def numbered_files(codes, labels, prefix="imagenet-llamagen-adm-256_codes/"):
    """Returns RandAR's files (name, bytes) of codes (N, 2, T); image i is called i."""
    return [(f"{prefix}{label}/{image}.npy", npy(codes[image].astype(np.int64)))
            for image, label in enumerate(labels)]


def write_folders(root, members):
    """Writes members (name, bytes) as files."""
    for name, content in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def write_lpd(root, codes, labels, class_names):
    """Writes LPD's files of codes (N, 2, T)."""
    for image, label in enumerate(labels):
        path = root / class_names[label] / f"{class_names[label]}_{image:04d}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, indices=codes[image, 0], indices_flip=codes[image, 1])


def write_older(folder, codes, labels):
    """Writes the older layout of codes (N, crops, T)."""
    for kind, arrays in (("codes", codes), ("labels", labels)):
        (folder / f"imagenet48_{kind}").mkdir(parents=True)
        for row, array in enumerate(arrays):
            np.save(folder / f"imagenet48_{kind}" / f"{row}.npy", array[None])
