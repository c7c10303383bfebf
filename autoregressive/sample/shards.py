"""Samples on their way to one npz: every batch is a file of its own, so that a killed run continues and no process
holds more than a batch.

Letters: P pixels.
"""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np

from autoregressive.runtime.files import atomic_write, read_json, write_json


def open_shards(folder, settings):
    """Makes the folder of a run's shards, or finds what an earlier start of the same run left (one process calls this).

    Args:
        folder: where the shards lie.
        settings: plain dict of everything that the samples depend on.

    Raises:
        ValueError: shards of other settings lie there.
    """
    record = Path(folder) / "settings.json"
    if record.is_file():
        found = read_json(record)
        for key in settings.keys() | found.keys():
            if found.get(key) != settings.get(key):
                raise ValueError(f"{folder}: expected samples with {key} {settings.get(key)!r}, found some with "
                                 f"{found.get(key)!r}; choose another --sample-dir or remove this folder")
    else:
        write_json(record, settings)


def shard_path(folder, first):
    """Returns the file of the batch that begins with sample `first`."""
    return Path(folder) / f"{first:08d}.npz"


def write_shard(path, **arrays):
    """Writes the arrays of one batch (the same length each), atomically."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def merge_shards(folder, batch_size, num_samples, path, settings):
    """Streams all shards into one npz, the images under `arr_0`, and removes them.

    Args:
        folder: of the shards; every batch 0, batch_size, 2 * batch_size ... must be there.
        batch_size: samples in a full shard; what lies past `num_samples` is left out.
        num_samples: how many samples the npz holds.
        path: the npz; `settings` is stored in it as JSON text.
    """
    shards = [shard_path(folder, first) for first in range(0, num_samples, batch_size)]
    with np.load(shards[0], allow_pickle=False) as shard:
        shapes = {name: (shard[name].dtype, shard[name].shape[1:]) for name in shard.files}
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (dtype, shape) in shapes.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                _write_header(member, dtype, (num_samples, *shape))
                for first, shard in zip(range(0, num_samples, batch_size), shards, strict=True):
                    with np.load(shard, allow_pickle=False) as arrays:
                        member.write(np.ascontiguousarray(arrays[name][:num_samples - first]).tobytes())
        with archive.open("settings.npy", "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(settings)), allow_pickle=False)
    shutil.rmtree(folder)


def _write_header(file, dtype, shape):
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
