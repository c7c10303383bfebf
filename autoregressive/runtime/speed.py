"""How fast a training runs, and how much of its machine it uses."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

import torch

# Dense bfloat16 (V100: float16), from the makers' data sheets.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165,
               "V100": 125}


def peak_memory_mib(device: torch.device) -> float:
    """Returns the most memory this process has used: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit_per_mib = 2**20 if sys.platform == "darwin" else 2**10         # macOS counts bytes
    return used / unit_per_mib


class Speedometer:
    """Rates of a training since the last reading."""

    def __init__(self, device: torch.device, world_size: int, tokens: int = 0,
                 flops_at: Callable[[int], float] | None = None) -> None:
        """
        Args:
            device: of this process.
            world_size: processes, of equal devices.
            tokens: of an image; 0 if they are not counted.
            flops_at: floating-point operations of a step, from 0, for one image.
        """
        self._device = device
        self._tokens = tokens
        self._flops_at = flops_at
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peaks = [peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name]
        self._peak = peaks[0] * 1e12 * world_size if peaks and flops_at else None
        self._images = 0
        self._flops = 0.0
        self._started = time.perf_counter()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the block out of the rates: validation, pictures, checkpoints.

        It does not wait for a GPU: whoever calls it has waited, so no step is still queued.
        """
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def add(self, num_images: int, step: int) -> None:
        """Counts the images of a step, from 0, of all processes together."""
        self._images += num_images
        if self._peak:
            self._flops += num_images * self._flops_at(step)

    def read(self) -> dict[str, float]:
        """Returns the rates since the last reading, and starts anew.

        Returns:
            images_per_second and memory_mib, the peak of this process; tokens_per_second if tokens
            are counted; mfu, the model's operations as a fraction of the peak of all GPUs, if it is
            known.
        """
        now = time.perf_counter()
        seconds = now - self._started
        images_per_second = self._images / seconds
        flops_per_second = self._flops / seconds
        self._images = 0
        self._flops = 0.0
        self._started = now
        tokens_per_second = images_per_second * self._tokens
        rates = {"images_per_second": images_per_second,
                 "memory_mib": peak_memory_mib(self._device)}
        if self._tokens:
            rates["tokens_per_second"] = tokens_per_second
        if self._peak:
            rates["mfu"] = flops_per_second / self._peak
        return rates
