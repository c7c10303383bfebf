"""How well a VQ model reconstructs a set of pictures.

Letters: B pictures of a batch, n of them whole, P pixels, T tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.failures import Failures
from autoregressive.runtime.log import progress
from autoregressive.runtime.pictures import save_grid
from tokenizer.tokenizer_image.crops import CenterCrops, load_crops
from tokenizer.tokenizer_image.images import ImageSet, to_float, to_uint8
from tokenizer.tokenizer_image.vq_model import VQModel
from tokenizer.validation.metrics import codebook_usage, psnr

NUM_SHOWN = 16                                      # pictures in the picture of reconstructions


# Maps pictures and their reconstructions, both (B, P, P, 3) uint8, to values (B,).
Measure = Callable[[Tensor, Tensor], Tensor]


class ReconstructionMeter:
    """Means over images of measures of their reconstructions, and the use of the codebook."""

    def __init__(self, measures: dict[str, Measure], codebook_size: int,
                 device: torch.device) -> None:
        """Starts with no images.

        Args:
            measures: by name.
            codebook_size: V.
            device: where sums and counts lie.
        """
        self.measures = measures
        self.num_images = 0
        self.sums = torch.zeros(len(measures), dtype=torch.float64, device=device)
        self.counts = torch.zeros(codebook_size, dtype=torch.float64, device=device)

    def add(self, codes: Tensor, pictures: Tensor, reconstructions: Tensor) -> None:
        """Adds a batch.

        Args:
            codes: (B, T) int64.
            pictures: (B, P, P, 3) uint8, what they come from.
            reconstructions: (B, P, P, 3) uint8, what they lead to.
        """
        values = [measure(pictures, reconstructions).double().sum()
                  for measure in self.measures.values()]
        self.sums += torch.stack(values)
        self.counts += torch.bincount(codes.flatten(), minlength=len(self.counts))
        self.num_images += len(pictures)

    def read(self, session: Session) -> dict[str, float]:
        """Returns the means over the images of all processes, and what codebook_usage says."""
        means = session.sum(self.sums) / sum(session.gather(self.num_images))
        usage = codebook_usage(session.sum(self.counts))
        return dict(zip(self.measures, means.tolist(), strict=True)) | usage


@dataclass(eq=False)
class Validation:
    """What a VQ model is judged by; broken pictures are left out.

    Attributes:
        dataset: the pictures.
        image_size: side of their centre crops in pixels.
        batch_size: pictures reconstructed together by a process.
        num_workers: processes that read them.
        max_failures: fraction of the pictures that may be broken.
        failures: those that are, as far as this process has met them.
    """

    dataset: ImageSet
    image_size: int
    batch_size: int
    num_workers: int
    max_failures: float = 0.0
    failures: Failures = field(init=False)

    def __post_init__(self) -> None:
        """Starts with no failures."""
        self.failures = Failures(len(self.dataset), self.max_failures)

    @torch.inference_mode()
    def reconstruct(self, model: VQModel, meter: ReconstructionMeter, session: Session,
                    description: str) -> Iterator[np.ndarray]:
        """Yields the reconstructions (n, P, P, 3) uint8 of this process's part of the pictures.

        Args:
            model: on the session's device.
            meter: what every batch is added to.
            session: Session.
            description: of the work, for the progress bar.
        """
        rows = session.part_of(len(self.dataset))
        ranges = [rows[first:first + self.batch_size]
                  for first in range(0, len(rows), self.batch_size)]
        with progress(session, len(rows), description, "image") as bar:
            for batch in load_crops(self.dataset, self.image_size, ranges, self.num_workers):
                self.failures.add(batch.failures)
                bar.update(len(batch.rows))
                pictures = torch.from_numpy(batch.whole()).to(session.device)
                if not len(pictures):
                    continue
                images, _, codes = model(to_float(pictures))
                reconstructions = to_uint8(images)
                meter.add(codes, pictures, reconstructions)
                yield reconstructions.cpu().numpy()

    def measure(self, model: VQModel, session: Session) -> dict[str, float]:
        """Returns the mean psnr and what codebook_usage says (all processes call this).

        Raises:
            SystemExit: with exit code 1, if more pictures are broken than may be.
        """
        num_codes = model.quantize.embedding.num_embeddings
        meter = ReconstructionMeter({"psnr": psnr}, num_codes, session.device)
        for _ in self.reconstruct(model, meter, session, "validate"):
            pass                                    # the meter is all that is wanted
        self.failures.gather(session)
        self.failures.check()
        return meter.read(session)

    @torch.inference_mode()
    def save_pictures(self, path: Path, model: VQModel, device: torch.device) -> None:
        """Saves pictures from all over the dataset above their reconstructions."""
        apart = -(-len(self.dataset) // NUM_SHOWN)
        shown = CenterCrops(self.dataset, self.image_size)[range(0, len(self.dataset), apart)]
        originals = torch.from_numpy(shown.whole())                             # (n, P, P, 3)
        if not len(originals):
            return
        images, _, _ = model(to_float(originals.to(device)))                    # (n, 3, P, P)
        reconstructions = to_uint8(images).cpu()
        count = len(originals)
        save_grid(path, torch.cat([originals, reconstructions]), columns=count,
                  captions=["original"] * count + ["rebuilt"] * count)
