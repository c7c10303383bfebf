"""How fast a training runs, and how much of its machine it uses."""

import resource
import sys
import time

import torch

# Dense bfloat16 (V100: float16), from the makers' data sheets.
PEAK_TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}


def peak_memory_mib(device):
    """Returns the most memory this process has used: of the GPU, or resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used / 2**20 if sys.platform == "darwin" else used / 2**10                # macOS counts bytes


class Speedometer:
    """Rates since the last reading."""

    def __init__(self, device, world_size, tokens=0, flops=0):
        """
        Args:
            device: of this process.
            world_size: processes, of equal devices.
            tokens: of an image; 0 if they are not counted.
            flops: floating-point operations of a step for one token.
        """
        self._tokens, self._device, self._flops = tokens, device, flops
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        peaks = [peak for gpu, peak in PEAK_TFLOPS.items() if gpu in name]
        self._peak = peaks[0] * 1e12 * world_size if peaks and flops else None
        self._images, self._started = 0, time.perf_counter()

    def add(self, num_images):
        self._images += num_images

    def read(self):
        """Returns images_per_second, memory_mib, tokens_per_second and, on a GPU that is known, mfu; starts anew."""
        now = time.perf_counter()
        images_per_second = self._images / (now - self._started)
        self._images, self._started = 0, now
        tokens_per_second = images_per_second * self._tokens
        rates = {"images_per_second": images_per_second, "memory_mib": peak_memory_mib(self._device)}
        if self._tokens:
            rates["tokens_per_second"] = tokens_per_second
        if self._peak:
            rates["mfu"] = tokens_per_second * self._flops / self._peak
        return rates
