"""Rows per second and memory of random access to a store of a million rows.

    python scripts/benchmarks/codes.py

The store is synthetic and takes half a gigabyte of disk while this runs. The published layout, a
file for every image, stands beside it on fewer rows.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import itertools
import tempfile
import time

import numpy as np

from autoregressive.data.batches import TokenBatches
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.opening import open_codes
from autoregressive.runtime.entry import run
from scripts.benchmarks.turns import benchmark_parser, compare, resident_bytes

CODEBOOK_SIZE, NUM_CLASSES, TOKENS = 16384, 1000, 256
NUM_ROWS, WRITTEN_TOGETHER, BATCH = 1_000_000, 10000, 256
SECONDS = 1.0                                       # of a measurement
OLDER_ROWS = 20000                                  # in the published layout


def build_parser():
    """Returns the parser of this script's command line."""
    return benchmark_parser("Measure random access to codes.", rounds=5)


def make_store(folder):
    unknown = dict.fromkeys(("dataset", "images_sha256", "codebook_sha256", "tokenizer_sha256"), "")
    class_names = [str(label) for label in range(NUM_CLASSES)]
    header = {"num_images": NUM_ROWS, "num_crops": 1, "crops": ["centre"], "num_tokens": TOKENS,
              "grid": 16, "image_size": 256, "codebook_size": CODEBOOK_SIZE,
              "class_names": class_names}
    writer = CodeWriter(folder, header | unknown)
    random = np.random.default_rng(0)
    writer.create(random.integers(NUM_CLASSES, size=NUM_ROWS))
    for rows in writer.rows.missing(WRITTEN_TOGETHER):
        writer.write(rows, random.integers(CODEBOOK_SIZE, size=(len(rows), 1, TOKENS)), {})
    writer.finish(0)
    return open_codes(folder)


def make_older(folder, store):
    """Writes the first rows in the published layout: imagenet256_{codes,labels}/{i}.npy."""
    for kind, arrays in (("codes", store.codes), ("labels", store.labels)):
        kind_folder = folder / f"imagenet256_{kind}"
        kind_folder.mkdir(parents=True)
        for row in range(OLDER_ROWS):
            np.save(kind_folder / f"{row}.npy", arrays[row:row + 1].astype(np.int64))
    return open_codes(folder)


def main(args, session):
    imported = resident_bytes("RssAnon")
    mapping, steps = np.random.default_rng(0).permutation(CODEBOOK_SIZE), itertools.count()

    def measure(batches):
        started, count = time.perf_counter(), 0
        while time.perf_counter() - started < SECONDS:
            batches[next(steps), range(BATCH)]
            count += BATCH
        return {"rows/s": count / (time.perf_counter() - started)}

    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder) / "store")
        stores = {"published": make_older(Path(folder) / "older", store), "ours": store}
        ways = {way: TokenBatches(codes, mapping, BATCH, 0, NUM_CLASSES, 0.1)
                for way, codes in stores.items()}
        title = (f"{NUM_ROWS} rows of {TOKENS} tokens (published: {OLDER_ROWS}) "
                 f"as batches of {BATCH}")
        compare(title, measure, ways, args.rounds, warm_up=1)
        added = resident_bytes("RssAnon") - imported
        print(f"memory beyond the page cache: {added / 2**20:.0f} MB, and "
              f"{imported / 2**20:.0f} MB of torch itself")


if __name__ == "__main__":
    run(main, build_parser())
