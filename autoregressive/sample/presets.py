"""The published rows of IAR on ImageNet 256 x 256, as presets of the sampling scripts.

FID, Inception score, precision and recall are those of the paper's tables (50,000 samples; 300 epochs, but 50 for XL
and XXL at 16 x 16). The paper's figure gives the best guidance of B, L and XXL at 24 x 24; where it gives none, the
guidance of LlamaGen's model of that size stands in, and is said to.
"""

from typing import Any

from autoregressive.runtime.entry import flag_of
from autoregressive.runtime.log import LOGGER

# Name, which tells size and image size: guidance, whose guidance it is, what the paper reports.
PRESETS = {
    "IAR-B-256": (2.0, "LlamaGen", "FID 5.14, Inception score 202.0, precision 0.85, recall 0.45 after 300 epochs"),
    "IAR-L-256": (2.0, "LlamaGen", "FID 3.4, Inception score 271.3, precision 0.84, recall 0.51 after 300 epochs"),
    "IAR-XL-256": (1.75, "LlamaGen", "FID 3.36, Inception score 228.9, precision 0.82, recall 0.54 after 50 epochs"),
    "IAR-XXL-256": (1.75, "LlamaGen", "FID 3.01, Inception score 257.4, precision 0.83, recall 0.53 after 50 epochs"),
    "IAR-B-384": (2.25, "the paper", "FID 5.77, Inception score 192.5, precision 0.85, recall 0.42 after 300 epochs"),
    "IAR-L-384": (1.75, "the paper", "FID 3.18, Inception score 234.8, precision 0.82, recall 0.53 after 300 epochs"),
    "IAR-XL-384": (1.75, "LlamaGen", "FID 2.52, Inception score 248.1, precision 0.82, recall 0.58 after 300 epochs"),
    "IAR-XXL-384": (1.7, "the paper", "FID 2.19, Inception score 265.6, precision 0.81, recall 0.58 after 300 epochs"),
}


def preset_flags(name: str | None) -> dict[str, Any]:
    """Returns the flags that a preset sets, and logs what it is; none without a name."""
    if name is None:
        return {}
    cfg_scale, guidance_of, reported = PRESETS[name]
    _, size, image_size = name.split("-")
    flags = {"gpt_model": f"GPT-{size}", "image_size": int(image_size), "image_size_eval": 256, "downsample_size": 16,
             "cluster_size": 128, "cfg_scale": cfg_scale, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    settings = ", ".join(f"{flag_of(key)} {value}" for key, value in flags.items())
    LOGGER.info("%s: %s (guidance of %s); the paper reports %s", name, settings, guidance_of, reported)
    return flags
