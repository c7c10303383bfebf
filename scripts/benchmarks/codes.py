"""Rows per second and memory of random access to a store of a million rows; import from a tar.

    python scripts/benchmarks/codes.py

The store is synthetic and takes half a gigabyte of disk while this runs. The published layout, a
file for every image, stands beside it on fewer rows.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # The repository root instead of this folder.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import io
import itertools
import tarfile
import tempfile
import time

import numpy as np

from autoregressive.data.batches import TokenBatches
from autoregressive.data.code_writer import CodeWriter
from autoregressive.data.importing import copy_codes
from autoregressive.data.opening import open_codes
from autoregressive.data.ready_folders import open_source
from autoregressive.runtime.entry import run
from scripts.benchmarks.turns import benchmark_parser, compare, resident_bytes

CODEBOOK_SIZE, NUM_CLASSES, TOKENS = 16384, 1000, 256
NUM_ROWS, WRITTEN_TOGETHER, BATCH = 1_000_000, 10000, 256
SECONDS = 1.0                                       # of a measurement
OLDER_ROWS = 20000                                  # in the published layout
NUM_MEMBERS = 20000                                 # of a tar


def build_parser():
    """Returns the parser of this script's command line."""
    return benchmark_parser("Measure random access to codes.", rounds=5)


def describe(num_images, crops):
    """Returns the manifest of a store."""
    unknown = dict.fromkeys(("dataset", "images_sha256", "codebook_sha256", "tokenizer_sha256"), "")
    class_names = [str(label) for label in range(NUM_CLASSES)]
    return unknown | {
        "num_images": num_images, "num_crops": len(crops), "crops": crops, "num_tokens": TOKENS,
        "grid": 16, "image_size": 256, "codebook_size": CODEBOOK_SIZE, "class_names": class_names}


def make_store(folder):
    writer = CodeWriter(folder, describe(NUM_ROWS, ["centre"]))
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


def make_tar(path):
    """Writes a tar of RandAR's layout, its members in an order of their own."""
    random = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for image in random.permutation(NUM_MEMBERS):
            file = io.BytesIO()
            np.save(file, random.integers(CODEBOOK_SIZE, size=(2, TOKENS)))
            member = tarfile.TarInfo(f"codes/{image % NUM_CLASSES}/{image}.npy")
            member.size = file.tell()
            file.seek(0)
            tar.addfile(member, file)


def measure_import(folder, session):
    """Prints how many files of a tar become rows in a second."""
    make_tar(folder / "codes.tar")
    started = time.perf_counter()
    cpu_started = time.process_time()
    source = open_source(folder / "codes.tar", session)
    writer = CodeWriter(folder / "imported", describe(len(source), ["centre", "centre, mirrored"]))
    writer.create(source.labels)
    copy_codes(source, writer, session)
    writer.finish(0)
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started
    print(f"import of {NUM_MEMBERS} files of 2 x {TOKENS} tokens from a tar: "
          f"{NUM_MEMBERS / seconds:.0f} files/s, {NUM_MEMBERS / cpu_seconds:.0f} per CPU second")


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
        measure_import(Path(folder), session)


if __name__ == "__main__":
    run(main, build_parser())
