"""The model card of an exported GPT: what a hub shows of it, as Markdown.

What it says comes from the settings of the checkpoint, the manifest of the codes, and the record of
the evaluator; the last two may be missing.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoregressive.runtime.files import Kinds, read_json

MANIFEST_KINDS: Kinds = {"dataset": str, "num_images": int, "num_crops": int, "image_size": int}
SCORE_KINDS: Kinds = {
    "numbers": dict, "reference": {"name": str}, "feature_network": {"name": str},
    "samples": {"num_images": int, "settings": {"cfg_scale": (int, float), "gpt_sha256": str,
                                                "vq_sha256": str}}}
# Settings of the samples that a score depends on, beside the strength of guidance.
SAMPLING = ("cfg_schedule", "beta", "top_k", "top_p", "temperature", "labels", "resize",
            "precision", "global_seed")
NUM_NAMED = 20                                      # classes whose names are listed
FRONT_MATTER = """\
---
pipeline_tag: unconditional-image-generation
tags:
- class-conditional
- image-generation
- autoregressive
- vq
---
"""
USE = """\
## Use

With the code of IAR, whose README says how it is installed, and this folder as `OUT`:

```
hf download USER/NAME --local-dir OUT
python autoregressive/sample/sample_c2i.py --gpt-ckpt OUT
torchrun --nproc_per_node=8 autoregressive/sample/sample_c2i_ddp.py --gpt-ckpt OUT
```

`model.safetensors` holds the GPT and `vq.safetensors` the tokenizer that decodes its tokens, under
the published names; settings and hashes are in their metadata and in
`config.json`. `export_c2i.py` wrote the folder, and `hf upload USER/NAME OUT` publishes it.
"""


@dataclass(frozen=True)
class Facts:
    """What a model card is written from.

    Attributes:
        settings: of the checkpoint.
        weights: "raw" or "ema".
        steps: of the training; None is unknown.
        vq: vq_model, codebook_size and codebook_embed_dim.
        hashes: codebook_sha256, vq_sha256 and gpt_sha256.
        picture: name of the file of sample pictures.
        manifest: of the codes, or None.
        scores: record of the evaluator, or None.
    """

    settings: dict[str, Any]
    weights: str
    steps: int | None
    vq: dict[str, Any]
    hashes: dict[str, str]
    picture: str
    manifest: dict[str, Any] | None
    scores: dict[str, Any] | None


def read_scores(path: str | Path) -> dict[str, Any]:
    """Reads the evaluator's record of a GPT's samples.

    Raises:
        ValueError: the file is none.
    """
    scores = read_json(path, SCORE_KINDS)
    numbers = [*scores["numbers"].values(), scores["samples"]["settings"].get("beta") or 1]
    if not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"{path}: expected numbers of the evaluator, found other content; score "
                         "the samples again")
    return scores


def write_card(facts: Facts) -> str:
    """Returns the text of a model card."""
    settings = facts.settings
    dataset = facts.manifest["dataset"] if facts.manifest else None
    side = settings["image_size"]
    title = f"{settings['gpt_model']}{_after(' on ', dataset)}, {side} x {side} pixels"
    parts = [
        FRONT_MATTER,
        f"# {title}\n",
        "A GPT that samples class-conditional images as codes of a VQ tokenizer whose codebook was "
        "rearranged into clusters of similar codes: IAR, cluster-oriented token prediction "
        "([arXiv 2501.00880](https://arxiv.org/abs/2501.00880)).\n",
        f"![sample pictures]({facts.picture})\n",
        f"## Model\n\n{_table(_model_rows(facts))}",
    ]
    if facts.manifest:
        parts.append(f"## Data\n\n{_table(_data_rows(facts))}")
    if facts.scores:
        parts.append(f"## Scores\n\n{_table(_score_rows(facts.scores))}")
    return "\n".join([*parts, USE])


def _model_rows(facts: Facts) -> dict[str, object]:
    settings = facts.settings
    size = settings["cluster_size"]
    loss = f"token loss + {settings.get('lambda_cce', '?')} x cluster loss"
    schedule = settings.get("lambda_schedule", "constant")
    if schedule != "constant":
        loss += f", {schedule} to {settings.get('lambda_end')}"
    weights = "averaged over the steps" if facts.weights == "ema" else "as trained"
    if facts.steps:
        batch = settings.get("global_batch_size")
        weights += f", after {facts.steps} steps{_after(' of ', batch)}{' images' if batch else ''}"
    rows = {
        "GPT": f"{settings['gpt_model']}, {settings['num_classes']} classes",
        "pictures": f"{settings['image_size']} pixels, {settings['grid']} x {settings['grid']} "
                    "tokens",
        "codebook": f"{settings['vocab_size']} codes, {settings['vocab_size'] // size} clusters of "
                    f"{size}",
        "loss": loss,
        "weights": weights,
        "tokenizer": f"{facts.vq['vq_model']}, codes of {facts.vq['codebook_embed_dim']} "
                     "dimensions",
    }
    if settings.get("guidance_free"):
        rows["guidance"] = "trained guidance-free (arXiv 2501.15420): `--beta`"
    if settings.get("recipe"):
        rows["recipe"] = settings["recipe"]
    return rows | {f"SHA-256 of {name.removesuffix('_sha256')}": f"`{value}`"
                   for name, value in facts.hashes.items()}


def _data_rows(facts: Facts) -> dict[str, object]:
    manifest = facts.manifest
    rows = {"images": f"{manifest['dataset']}, {manifest['num_images']} of "
                      f"{manifest['image_size']} pixels",
            "crops of an image": manifest["num_crops"]}
    names = facts.settings.get("class_names")
    if names:
        listed = ", ".join(map(str, names[:NUM_NAMED]))
        rows["classes"] = f"{listed}, ..." if len(names) > NUM_NAMED else listed
    return rows


def _score_rows(scores: dict[str, Any]) -> dict[str, object]:
    samples = scores["samples"]
    settings = samples["settings"]
    rows = {title: f"{number:.4f}" for title, number in scores["numbers"].items()}
    sampling = [f"{name} {settings[name]}" for name in SAMPLING if settings.get(name) is not None]
    return rows | {
        "samples": f"{samples['num_images']} at guidance {settings['cfg_scale']}; "
                   f"{', '.join(sampling)}",
        "reference": scores["reference"]["name"],
        "feature network": scores["feature_network"]["name"]}


def _after(words: str, value: object) -> str:
    """Returns words and a value, or nothing without one."""
    return "" if value is None else words + _one_line(value)


def _table(rows: dict[str, object]) -> str:
    """Returns a Markdown table of two columns without titles."""
    lines = [f"| {_one_line(name)} | {_one_line(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines, ""])


def _one_line(value: object) -> str:
    """Returns a value as text that neither ends a cell of a table nor begins a tag of HTML."""
    text = " ".join(str(value).split())
    return text.replace("|", "\\|").replace("<", "&lt;")
