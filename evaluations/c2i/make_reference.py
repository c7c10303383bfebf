"""Makes a reference npz, for the evaluator to compare with, out of any image folder, data set or npz.

    python evaluations/c2i/make_reference.py --data-path imagenet/train --image-size 256 --num-images 10000 \
        --output evaluations/my_reference.npz

On a CPU, from the digits inside scikit-learn:

    python evaluations/c2i/make_reference.py --dataset digits --data-path train --image-size 16 --output reference.npz
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])      # the repository root instead of this folder

import json

import numpy as np

from autoregressive.runtime.entry import Parser, checks, require_one_process, run
from autoregressive.runtime.files import npz_writer, require_writable_folder
from autoregressive.runtime.log import open_logger, progress
from evaluations.c2i.classifier import load_classifier
from evaluations.c2i.metrics import StreamingStatistics
from evaluations.c2i.npz_reader import NpzImages
from tokenizer.tokenizer_image.images import add_image_args, center_crop, open_images

BATCH_IMAGES = 256      # pictures that are in memory together


def build_parser():
    """Returns the parser of this script's command line."""
    parser = Parser("Make a reference npz out of an image folder, the digits, or an npz (--data-path X.npz).",
                    draws=False)
    add_image_args(parser)
    parser.add_argument("--output", required=True, help="the npz to write")
    parser.add_argument("--num-images", type=int, default=0, help="how many pictures, evenly spread; 0 = all")
    parser.add_argument("--kind", default="fid", choices=("fid", "rfid"),
                        help="fid: real pictures, to compare samples with; rfid: the originals of reconstructions")
    parser.add_argument("--classifier", help="also store the statistics of this small classifier's features")
    return parser


class NpzSource:
    """An npz as a source of pictures, which are taken as they are."""

    resize = "none: pictures of an npz"

    def __init__(self, path, size):
        self._images = NpzImages(path)
        if self._images.shape[1:3] != (size, size):
            raise ValueError(f"{path}: expected pictures of {size} x {size} pixels, found {self._images.shape[1]} x "
                             f"{self._images.shape[2]}; set --image-size")
        self.labels = self._images.labels()
        self.class_names = self._images.settings.get("class_names")

    def __len__(self):
        return len(self._images)

    def pictures(self, rows):
        wanted = set(rows.tolist())
        every = (picture for batch in self._images.batches(BATCH_IMAGES) for picture in batch)
        return (picture for row, picture in enumerate(every) if row in wanted)


class FolderSource:
    """A data set as a source of centre crops."""

    resize = "ADM centre crop: box halvings, then bicubic"

    def __init__(self, dataset, data_path, size):
        self._images = open_images(dataset, data_path)
        self._size = size
        self.labels, self.class_names = self._images.labels, self._images.class_names

    def __len__(self):
        return len(self._images)

    def pictures(self, rows):
        return (center_crop(self._images.read(row), self._size) for row in rows)


def open_source(args):
    """Returns the source of pictures of the flags and the rows to take from it."""
    if args.image_size < 1:
        raise ValueError(f"--image-size: expected at least 1, got {args.image_size}")
    if Path(args.output).suffix != ".npz":
        raise ValueError(f"--output: expected a name ending in .npz, got {args.output}")
    if args.data_path.endswith(".npz"):
        source = NpzSource(args.data_path, args.image_size)
    else:
        source = FolderSource(args.dataset, args.data_path, args.image_size)
    count = args.num_images or len(source)
    if not 2 <= count <= len(source):
        raise ValueError(f"--num-images: expected 2 to {len(source)}, the pictures of {args.data_path}, got {count}")
    require_writable_folder(Path(args.output).parent)
    return source, np.arange(count) * len(source) // count


def load_network(args, session):
    """Returns the feature network of the flags, or None."""
    network = load_classifier(args.classifier, session.device) if args.classifier else None
    if network and network.image_size != args.image_size:
        raise ValueError(f"--image-size: expected {network.image_size} for {network.name}, got {args.image_size}")
    return network


def write_reference(path, pictures, shape, settings, labels, network, advance):
    """Writes a reference, streaming its pictures.

    Args:
        path: the npz.
        pictures: yields N pictures (P, P, 3) uint8.
        shape: (N, P, P, 3).
        settings: plain dict, stored as JSON text.
        labels: (N,) int64 or None.
        network: FeatureNetwork whose statistics are stored, or None.
        advance: called with the number of pictures written, for a progress bar.
    """
    pool, spatial = StreamingStatistics(), StreamingStatistics()

    def batches():
        for start in range(0, shape[0], BATCH_IMAGES):
            batch = np.stack([next(pictures) for _ in range(min(BATCH_IMAGES, shape[0] - start))])
            if network:
                pool_features, spatial_features, _ = network.features(batch)
                pool.add(pool_features)
                spatial.add(spatial_features)
            yield batch
            advance(len(batch))

    with npz_writer(path) as add:
        add("arr_0", np.uint8, shape, batches())
        small = {"settings": np.array(json.dumps(settings))} | ({} if labels is None else {"labels": labels})
        if network:
            small |= {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
        for name, array in small.items():
            add(name, array.dtype, array.shape, [array])


def main(args, session):
    logger = open_logger(session)
    with checks(session):
        require_one_process(session)
        source, rows = open_source(args)
        network = load_network(args, session)
    settings = {"kind": f"{args.kind} reference", "dataset": args.dataset, "source": args.data_path,
                "num_images": len(rows), "num_source_images": len(source), "image_size": args.image_size,
                "resize": source.resize, "class_names": source.class_names}
    if network:
        settings |= {"feature_network": network.name, "feature_network_sha256": network.sha256}
    with progress(session, len(rows), "make the reference", "image") as bar:
        write_reference(args.output, source.pictures(rows), (len(rows), args.image_size, args.image_size, 3), settings,
                        None if source.labels is None else source.labels[rows], network, bar.update)
    logger.info("%d pictures of %s in %s", len(rows), args.data_path, args.output)


if __name__ == "__main__":
    run(main, build_parser())
