"""The published rows of IAR on ImageNet 256 x 256, as presets of the sampling scripts.

FID, Inception score, precision and recall are those of the paper's tables (50,000 samples; 300
epochs, but 50 for XL and XXL at 16 x 16). The paper's figure gives the best guidance of B, L and
XXL at 24 x 24; where it gives none, the guidance of LlamaGen's model of that size stands in, and
is said to.
"""

from dataclasses import dataclass

from autoregressive.runtime.entry import flag_of
from autoregressive.runtime.log import LOGGER


@dataclass(frozen=True)
class Preset:
    """How a published row is sampled, and what the paper reports for it.

    Attributes:
        cfg_scale: strength of the guidance.
        guidance_of: whose guidance that is.
        fid, inception_score, precision, recall: of 50,000 samples, as the paper prints them.
        epochs: of the training.
    """

    cfg_scale: float
    guidance_of: str
    fid: str
    inception_score: str
    precision: str
    recall: str
    epochs: int

    def reported(self) -> str:
        """Returns what the paper reports, as a text."""
        return (f"FID {self.fid}, Inception score {self.inception_score}, "
                f"precision {self.precision}, recall {self.recall} after {self.epochs} epochs")


PAPER = "the paper"
LLAMAGEN = "LlamaGen"
PRESETS = {                             # by size and image size
    "IAR-B-256": Preset(2.0, LLAMAGEN, fid="5.14", inception_score="202.0", precision="0.85",
                        recall="0.45", epochs=300),
    "IAR-L-256": Preset(2.0, LLAMAGEN, fid="3.4", inception_score="271.3", precision="0.84",
                        recall="0.51", epochs=300),
    "IAR-XL-256": Preset(1.75, LLAMAGEN, fid="3.36", inception_score="228.9", precision="0.82",
                         recall="0.54", epochs=50),
    "IAR-XXL-256": Preset(1.75, LLAMAGEN, fid="3.01", inception_score="257.4", precision="0.83",
                          recall="0.53", epochs=50),
    "IAR-B-384": Preset(2.25, PAPER, fid="5.77", inception_score="192.5", precision="0.85",
                        recall="0.42", epochs=300),
    "IAR-L-384": Preset(1.75, PAPER, fid="3.18", inception_score="234.8", precision="0.82",
                        recall="0.53", epochs=300),
    "IAR-XL-384": Preset(1.75, LLAMAGEN, fid="2.52", inception_score="248.1", precision="0.82",
                         recall="0.58", epochs=300),
    "IAR-XXL-384": Preset(1.7, PAPER, fid="2.19", inception_score="265.6", precision="0.81",
                          recall="0.58", epochs=300),
}


def preset_flags(name: str | None) -> dict[str, object]:
    """Returns the flags that a preset sets, and logs what it is; none without a name."""
    if name is None:
        return {}
    preset = PRESETS[name]
    _, size, image_size = name.split("-")
    flags = {"gpt_model": f"GPT-{size}", "image_size": int(image_size), "image_size_eval": 256,
             "downsample_size": 16, "cluster_size": 128, "cfg_scale": preset.cfg_scale,
             "top_k": 0, "top_p": 1.0, "temperature": 1.0}
    settings = ", ".join(f"{flag_of(key)} {value}" for key, value in flags.items())
    LOGGER.info("%s: %s (guidance of %s); the paper reports %s", name, settings,
                preset.guidance_of, preset.reported())
    return flags
