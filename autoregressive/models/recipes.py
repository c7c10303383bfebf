"""Recipes of training and sampling, and the numbers that were published for them.

    iar         the paper: both losses
    llamagen    arXiv 2406.06525, the token loss alone; its numbers are those of the paper's tables
    strong      the next-token baselines of LPD (arXiv 2507.01957): ADM crops instead of ten, a long
                warm-up, a rate that falls late, less weight decay, guidance that rises

A recipe sets flags of train_c2i.py, and the guidance of the sampling scripts. Flags that are given
win.
"""

from dataclasses import dataclass
from typing import Any

from autoregressive.runtime.entry import Parser, flag_of, may_vary
from autoregressive.runtime.log import LOGGER

# Of 50,000 pictures of 256 x 256 pixels, as the papers print them; `pixels` is the size at which
# they are sampled. LPD gives the FID alone.
PUBLISHED = """
recipe    size  pixels  epochs  FID   IS     precision  recall
llamagen  B     256     300     5.46  193.6  0.84       0.46
llamagen  B     256     50      7.22  178.3  0.86       0.38
llamagen  B     384     300     6.09  182.5  0.84       0.42
llamagen  B     384     50      8.31  154.7  0.84       0.38
llamagen  L     256     300     3.80  248.3  0.83       0.52
llamagen  L     256     50      4.20  200.0  0.82       0.51
llamagen  L     384     300     3.29  227.8  0.82       0.53
llamagen  L     384     50      4.61  191.4  0.82       0.50
llamagen  XL    256     50      3.39  227.1  0.81       0.54
llamagen  XL    384     300     2.63  244.1  0.81       0.58
llamagen  XL    384     50      3.24  245.7  0.83       0.53
llamagen  XXL   256     50      3.09  253.6  0.83       0.53
llamagen  XXL   384     300     2.34  253.9  0.81       0.60
llamagen  XXL   384     50      2.89  236.2  0.80       0.56
iar       B     256     300     5.14  202.0  0.85       0.45
iar       B     256     50      6.90  179.2  0.86       0.40
iar       B     384     300     5.77  192.5  0.85       0.42
iar       B     384     50      7.80  153.3  0.84       0.39
iar       L     256     300     3.40  271.3  0.84       0.51
iar       L     256     50      4.10  207.1  0.82       0.51
iar       L     384     300     3.18  234.8  0.82       0.53
iar       L     384     50      4.35  197.2  0.81       0.51
iar       XL    256     50      3.36  228.9  0.82       0.54
iar       XL    384     300     2.52  248.1  0.82       0.58
iar       XL    384     50      3.15  228.8  0.81       0.54
iar       XXL   256     50      3.01  257.4  0.83       0.53
iar       XXL   384     300     2.19  265.6  0.81       0.58
iar       XXL   384     50      2.87  249.9  0.82       0.56
strong    L     256     450     2.48  -      -          -
strong    XL    256     450     2.12  -      -          -
strong    XXL   256     450     2.01  -      -          -
"""


@dataclass(frozen=True)
class Recipe:
    """How models are trained; find_guidance says how they are sampled.

    Attributes:
        title: how names of presets begin.
        training: flags of train_c2i.py.
        num_crops: of an image in the codes that it is trained on.
        extraction: how these are made.
    """

    title: str
    training: dict[str, Any]
    num_crops: int
    extraction: str


IAR_TRAINING = {
    "epochs": 300, "global_batch_size": 256, "lr": 1e-4, "lr_schedule": "constant",
    "lr_decay_from": 0.0, "min_lr": 0.0, "warmup_epochs": 0.0, "weight_decay": 0.05,
    "max_grad_norm": 1.0, "dropout_p": 0.1, "token_dropout_p": 0.1, "drop_path_rate": 0.0,
    "lambda_cce": 1.0}
RECIPES = {
    "iar": Recipe("IAR", IAR_TRAINING, 10, "with --ten-crop"),
    "llamagen": Recipe("LlamaGen", IAR_TRAINING | {"lambda_cce": 0.0}, 10, "with --ten-crop"),
    # Published for lambda 0. Here it is 1 unless --lambda-cce says otherwise.
    "strong": Recipe("strong", IAR_TRAINING | {
        "epochs": 450, "lr_schedule": "cosine", "lr_decay_from": 400 / 450, "min_lr": 1e-5,
        "warmup_epochs": 50.0, "weight_decay": 0.02, "max_grad_norm": 3.0},
        2, "without --ten-crop"),
}
# Best constant guidance by size; the paper gives three, at 384 pixels.
LLAMAGEN_GUIDANCE = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}
IAR_GUIDANCE = {("B", 384): 2.25, ("L", 384): 1.75, ("XXL", 384): 1.7}
STRONG_GUIDANCE = {"cfg_scale": 4.5, "cfg_schedule": "linear", "cfg_start": 1.0}


def read_published() -> list[dict[str, str]]:
    """Returns the rows of PUBLISHED, each by the names of its columns."""
    names, *rows = [line.split() for line in PUBLISHED.strip().splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _presets() -> dict[str, tuple[str, str, int]]:
    """Returns recipe, size and pixels of every published model, by the name of its preset."""
    presets = {}
    for row in read_published():
        name = f"{RECIPES[row['recipe']].title}-{row['size']}-{row['pixels']}"
        presets[name] = (row["recipe"], row["size"], int(row["pixels"]))
    return presets


PRESETS = _presets()


def published_numbers(recipe: str, size: str, pixels: int) -> str:
    """Returns what was published for a model, as a text."""
    texts = []
    for row in read_published():
        if (row["recipe"], row["size"], row["pixels"]) == (recipe, size, str(pixels)):
            numbers = [f"{name} {row[name]}" for name in ("FID", "IS", "precision", "recall")
                       if row[name] != "-"]
            texts.append(f"{', '.join(numbers)} after {row['epochs']} epochs")
    found = "; ".join(texts) or f"nothing for GPT-{size} at {pixels} pixels"
    without = " (at lambda 0)" if recipe == "strong" else ""
    return f"published{without}: {found}"


def find_guidance(recipe: str, size: str, pixels: int) -> tuple[dict[str, Any], str]:
    """Returns the flags of the guidance that goes with a recipe, and where they come from.

    There are none for sizes of which nothing was published.
    """
    if recipe == "strong":
        return STRONG_GUIDANCE, "our own starting point for a sweep"
    if recipe == "iar" and (size, pixels) in IAR_GUIDANCE:
        return {"cfg_scale": IAR_GUIDANCE[size, pixels]}, "the paper's"
    if size in LLAMAGEN_GUIDANCE:
        return {"cfg_scale": LLAMAGEN_GUIDANCE[size]}, "LlamaGen's"
    return {}, "none published"


def _as_flags(values: dict[str, Any]) -> str:
    words = []
    for name, value in values.items():
        words.append(f"{flag_of(name)} {value:g}" if isinstance(value, float) else
                     f"{flag_of(name)} {value}")
    return " ".join(words)


def add_recipe_arg(parser: Parser) -> None:
    """Declares the recipe of a training."""
    parser.add_argument("--recipe", choices=RECIPES,
                        help="settings of published trainings; flags that are given win")


def add_preset_arg(parser: Parser) -> None:
    """Declares the preset of the sampling scripts."""
    # It may vary, since a preset only sets flags, and those that are given win.
    may_vary(parser.add_argument("--preset", choices=PRESETS,
                                 help="settings of a published row: recipe, size, pixels"))


def training_flags(recipe: str | None) -> dict[str, Any]:
    """Returns the flags that a recipe sets; none without one."""
    return RECIPES[recipe].training if recipe else {}


def log_recipe(name: str | None, values: dict[str, Any], num_crops: list[int]) -> None:
    """Says in the log what a recipe stands for, what was published, and what does not fit it.

    Args:
        name: of the recipe; None is none.
        values: of all flags, as they are used.
        num_crops: of an image in each store of codes.
    """
    if name is None:
        return
    recipe = RECIPES[name]
    used = {flag: values[flag] for flag in recipe.training}
    LOGGER.info("recipe %s: %s; %s", name, _as_flags(used), _published_for(name, values))
    if set(num_crops) != {recipe.num_crops}:
        LOGGER.warning("recipe %s: expected codes extracted %s, %d crops of an image, found %s",
                       name, recipe.extraction, recipe.num_crops, " and ".join(map(str, num_crops)))


def sampling_flags(preset: str | None, recorded: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags that a preset sets, or without one the guidance of a recorded recipe.

    Args:
        preset: one of PRESETS, or None.
        recorded: settings of the checkpoint.
    """
    if preset:
        recipe, size, pixels = PRESETS[preset]
        guidance, _ = find_guidance(recipe, size, pixels)
        return {"gpt_model": f"GPT-{size}", "image_size": pixels, "image_size_eval": 256,
                "downsample_size": 16, "cluster_size": 128, "top_k": 0, "top_p": 1.0,
                "temperature": 1.0, **guidance}
    recipe = recorded.get("recipe")
    if recipe not in RECIPES or not {"gpt_model", "image_size"} <= recorded.keys():
        return {}
    size = recorded["gpt_model"].removeprefix("GPT-")
    guidance, _ = find_guidance(recipe, size, recorded["image_size"])
    return guidance


def log_sampling(preset: str | None, recorded: dict[str, Any], values: dict[str, Any]) -> None:
    """Says in the log what sampling_flags stands for, and what was published for a preset.

    Args:
        preset, recorded: as for sampling_flags.
        values: of all flags, as they are used.
    """
    is_free = values.get("beta") is not None
    used = {flag: values[flag] for flag in sampling_flags(preset, {} if is_free else recorded)}
    trained_by = recorded.get("recipe")
    if is_free:
        LOGGER.info("trained guidance-free: one pass at --beta %g, which stands for --cfg-scale "
                    "%g", values["beta"], values["cfg_scale"])
    if preset:
        recipe, size, pixels = PRESETS[preset]
        _, source = find_guidance(recipe, size, pixels)
        LOGGER.info("%s: %s (best guidance: %s); %s", preset, _as_flags(used), source,
                    _published_for(recipe, values))
        if trained_by not in (None, recipe):
            LOGGER.warning("--preset %s: the checkpoint was trained by recipe %s", preset,
                           trained_by)
    elif used:
        LOGGER.info("trained by recipe %s, so: %s", trained_by, _as_flags(used))


def _published_for(recipe: str, values: dict[str, Any]) -> str:
    return published_numbers(recipe, values["gpt_model"].removeprefix("GPT-"), values["image_size"])
