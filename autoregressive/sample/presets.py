"""The published rows of IAR on ImageNet 256 x 256, as presets of the sampling scripts.

FID, Inception score, precision and recall are those of the paper's tables (50,000 samples; 300 epochs, but 50 for XL
and XXL at 16 x 16). The paper's figure gives the best guidance of B, L and XXL at 24 x 24; where it gives none, the
guidance of LlamaGen's model of that size stands in, and is said to.
"""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """One published row.

    Attributes:
        flags: dict of argument names -> values.
        reported: what the paper reports for it.
        guidance_of: whose guidance it is.
    """

    flags: dict
    reported: str
    guidance_of: str


def _row(size, image_size, cfg_scale, fid, score, precision, recall, epochs, guidance_of):
    flags = {"gpt_model": f"GPT-{size}", "image_size": image_size, "image_size_eval": 256, "downsample_size": 16,
             "cluster_size": 128, "cfg_scale": cfg_scale, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    reported = (f"the paper reports FID {fid}, Inception score {score}, precision {precision}, recall {recall} after "
                f"{epochs} epochs")
    return Preset(flags, reported, guidance_of)


PRESETS = {
    "IAR-B-256": _row("B", 256, 2.0, 5.14, 202.0, 0.85, 0.45, 300, "LlamaGen"),
    "IAR-L-256": _row("L", 256, 2.0, 3.40, 271.3, 0.84, 0.51, 300, "LlamaGen"),
    "IAR-XL-256": _row("XL", 256, 1.75, 3.36, 228.9, 0.82, 0.54, 50, "LlamaGen"),
    "IAR-XXL-256": _row("XXL", 256, 1.75, 3.01, 257.4, 0.83, 0.53, 50, "LlamaGen"),
    "IAR-B-384": _row("B", 384, 2.25, 5.77, 192.5, 0.85, 0.42, 300, "the paper"),
    "IAR-L-384": _row("L", 384, 1.75, 3.18, 234.8, 0.82, 0.53, 300, "the paper"),
    "IAR-XL-384": _row("XL", 384, 1.75, 2.52, 248.1, 0.82, 0.58, 300, "LlamaGen"),
    "IAR-XXL-384": _row("XXL", 384, 1.7, 2.19, 265.6, 0.81, 0.58, 300, "the paper"),
}


def describe_preset(name):
    """Returns one line on a preset: its settings and the numbers that the paper reports."""
    preset = PRESETS[name]
    settings = ", ".join(f"--{key.replace('_', '-')} {value}" for key, value in preset.flags.items())
    return f"{name}: {settings} (guidance of {preset.guidance_of}); {preset.reported}"


def add_preset_arg(parser):
    """Declares --preset, which sets the flags of a published row; flags that are given besides win."""
    parser.add_argument("--preset", choices=PRESETS, action=_ApplyPreset, help="settings of a published row")


class _ApplyPreset(argparse.Action):
    def __call__(self, parser, namespace, value, option_string=None):
        namespace.preset = value
        for name, setting in PRESETS[value].flags.items():
            if getattr(namespace, name, parser.get_default(name)) == parser.get_default(name):
                setattr(namespace, name, setting)
