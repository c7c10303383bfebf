"""Rows per second and memory of random access to a store of a million rows.

    python scripts/benchmarks/codes.py

The store is synthetic and takes half a gigabyte of disk while this runs. The published layout, a file for every image,
stands beside it on fewer rows.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import tempfile
import time

import numpy as np

from autoregressive.data.batches import TokenBatches
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.codes import open_codes
from autoregressive.runtime.entry import Parser, run

CODEBOOK_SIZE, NUM_CLASSES, TOKENS = 16384, 1000, 256
WRITTEN_TOGETHER, BATCH = 10000, 256
ROUNDS = 5
SECONDS = 1.0                                       # of a measurement
OLDER_ROWS = 20000                                  # in the published layout


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Measure random access to codes.", draws=False)
    parser.add_argument("--num-rows", type=int, default=1_000_000, help="images in the store, one crop each")
    return parser


def make_store(folder, num_rows):
    writer = CodeWriter(folder, {"num_images": num_rows, "num_crops": 1, "num_tokens": TOKENS, "grid": 16,
                                 "codebook_size": CODEBOOK_SIZE})
    random = np.random.default_rng(0)
    writer.create(random.integers(NUM_CLASSES, size=num_rows))
    for rows in writer.missing(WRITTEN_TOGETHER):
        writer.write(rows, random.integers(CODEBOOK_SIZE, size=(len(rows), 1, TOKENS)), {})
    writer.finish(0)
    return open_codes(folder)


def make_older(folder, store):
    """Writes the first rows in the published layout: imagenet256_codes/{i}.npy and imagenet256_labels/{i}.npy."""
    for kind, arrays in (("codes", store.codes), ("labels", store.labels)):
        (folder / f"imagenet256_{kind}").mkdir(parents=True)
        for row in range(OLDER_ROWS):
            np.save(folder / f"imagenet256_{kind}" / f"{row}.npy", arrays[row:row + 1].astype(np.int64))
    return open_codes(folder)


def rows_per_second(batches, updates):
    """Returns the rate of batches of an iterator of update numbers, for about SECONDS."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        batches.batch(next(updates), range(BATCH))
        count += BATCH
    return count / (time.perf_counter() - started)


def private_megabytes():
    """Returns the resident memory of this process that is not the page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status: expected RssAnon; this benchmark needs Linux")


def main(args, session):
    imported = private_megabytes()
    mapping = np.random.default_rng(0).permutation(CODEBOOK_SIZE)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store", args.num_rows)
        older = make_older(Path(folder) / "older", store)
        ours, published = (TokenBatches(codes, mapping, BATCH, 0, NUM_CLASSES, 0.1) for codes in (store, older))
        updates, rates = iter(range(10**9)), {"ours": [], "published": []}
        for batches in (ours, published):
            batches.batch(0, range(BATCH))                      # plans the epoch
        for _ in range(ROUNDS):
            rates["ours"].append(rows_per_second(ours, updates))
            rates["published"].append(rows_per_second(published, updates))
        ours, published = np.median(rates["ours"]), np.median(rates["published"])
        print(f"{len(store.rows)} rows of {TOKENS} tokens: {ours:.0f} rows/s as batches of {BATCH}; a file for every "
              f"image ({OLDER_ROWS} of them): {published:.0f} rows/s; ours / published: {ours / published:.1f}; memory "
              f"beyond the page cache: {private_megabytes() - imported:.0f} MB, and {imported:.0f} MB of torch itself")


if __name__ == "__main__":
    run(main, build_parser())
