"""Samples on their way to one npz: every batch is a file of its own, so that a killed run continues and no process
holds more than a batch.

Letters: P pixels.
"""

import json
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np

from autoregressive.runtime.files import atomic_write, npz_writer, read_json, write_json

POLL_SECONDS = 1                                    # between two looks at what the other processes have drawn


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
        _require_equal(folder, settings, read_json(record))
    else:
        write_json(record, settings)


def is_finished(path, settings):
    """Says whether the npz `path` is there and holds the samples of these settings.

    Raises:
        ValueError: it holds others.
    """
    if not Path(path).exists():
        return False
    try:
        with np.load(path, allow_pickle=False) as samples:
            found = json.loads(str(samples["settings"])) if "settings" in samples else {}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected samples, found a damaged file ({error}); remove it") from error
    _require_equal(path, settings, found)
    return True


def _require_equal(path, settings, found):
    for key in [*settings, *found]:
        if found.get(key) != settings.get(key):
            raise ValueError(f"{path}: expected samples with {key} {settings.get(key)!r}, found some with "
                             f"{found.get(key)!r}; choose another --sample-dir or remove them")


def shard_path(folder, first):
    """Returns the file of the batch that begins with sample `first`."""
    return Path(folder) / f"{first:08d}.npz"


def write_shard(path, **arrays):
    """Writes the arrays of one batch (the same length each), atomically."""
    with atomic_write(path) as file:
        np.savez(file, **arrays)


def wait_for_shards(folder, firsts):
    """Waits until the batches that begin with `firsts` are there, whoever draws them: no collective can time out."""
    while not all(shard_path(folder, first).exists() for first in firsts):
        time.sleep(POLL_SECONDS)


def merge_shards(folder, batch_size, num_samples, path, settings):
    """Streams all shards into one npz, the images under `arr_0`, and removes them.

    Args:
        folder: of the shards; every batch 0, batch_size, 2 * batch_size ... must be there.
        batch_size: samples in a full shard; what lies past `num_samples` is left out.
        num_samples: how many samples the npz holds.
        path: the npz; `settings` is stored in it as JSON text.
    """
    firsts = range(0, num_samples, batch_size)

    def chunks(name):
        for first in firsts:
            with np.load(shard_path(folder, first), allow_pickle=False) as shard:
                yield shard[name][:num_samples - first]

    with np.load(shard_path(folder, 0), allow_pickle=False) as shard:
        kinds = {name: (shard[name].dtype, shard[name].shape[1:]) for name in shard.files}
    with npz_writer(path) as add:
        for name, (dtype, shape) in kinds.items():
            add(name, dtype, (num_samples, *shape), chunks(name))
        record = np.array(json.dumps(settings))
        add("settings", record.dtype, (), [record])
    shutil.rmtree(folder)
