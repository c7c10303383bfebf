"""Writes report.html, a page to look at, into the folder of a quickstart, of a run, or of a sweep.

    python scripts/report.py results/quickstart
    python scripts/report.py results/000-GPT-B
    python scripts/report.py sweep

The folder of a run is what train_c2i.py or vq_train.py wrote, that of a sweep what sweep_cfg.sh
wrote; what own_images.sh wrote is shown like a quickstart. The page holds all that it shows, so it
can be moved and sent. A second call writes it anew.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])      # the root, not this folder

from xml.etree.ElementTree import Element

from autoregressive.runtime.distributed import Session
from autoregressive.runtime.entry import Flags, Parser, checks, run
from autoregressive.runtime.files import Kinds, check_kinds, check_output, read_json
from autoregressive.runtime.identity import RunFolder
from scripts.experiments.sweep import best_in_words, columns_of, panels_of, read_sweep, table_of
from scripts.pages.chart import Line, chart, legend
from scripts.pages.page import (
    element,
    facts_list,
    folded_settings,
    picture,
    section,
    table,
    write_page,
)
from scripts.pages.quickstart import CAVEAT, NUMBER, TOKENIZER, facts, read_report, results
from scripts.pages.runs import curves, last_values, read_logged

# Of a quickstart or of own_images.sh: name -> the run folder; heading -> pictures and captions.
RUNS = {"lambda 1": "gpt-lambda1/[0-9]*", "lambda 0": "gpt-lambda0/[0-9]*", "GPT": "gpt/[0-9]*"}
PICTURES = {
    "Digits by class": {
        "digits.png": "A row for each digit: four pictures of val, four that the tokenizer has "
                      "rebuilt, and four samples of each GPT."},
    "Samples": {
        "samples.png": "One sample of every class.",
        "samples/*.png": "The first of the samples that are scored, with their classes.",
        "samples-lambda1/*.png": "The first samples of lambda 1, with their classes.",
        "samples-lambda0/*.png": "The first samples of lambda 0, with their classes."},
    "Reconstructions": {
        "vq/[0-9]*/reconstructions.png": "Pictures of val above, what the tokenizer makes of them "
                                     "below."},
    "Codebook before and after": {
        "codebook-*.png": "Distances between codes, in the order of the tokenizer and in that of "
                          "the clusters, where neighbours are similar."}}
PICTURES_OF_A_RUN = {
    "Pictures": {
        "data.png": "The first rows of the training data, decoded.",
        "reconstructions.png": "Pictures of val above, what the tokenizer makes of them below.",
        "pictures/*.png": "What the run had learned when it last drew pictures."}}

PLAN: Kinds = {"image_size": int, "codebook_size": int, "cluster_size": int}


def build_parser() -> Parser:
    """Returns the parser of this script's command line."""
    parser = Parser("Write report.html, a page of results.", has_seed=False)
    parser.add_argument("folder", type=Path,
                        help="of scripts/quickstart.sh, of one training run, or of sweep_cfg.sh")
    return parser


def newest(folder: Path, pattern: str) -> Path | None:
    """Returns the last path of `folder` that matches, in the order of names; None if none does."""
    return max(folder.glob(pattern), default=None)


def pictures(folder: Path, shown: dict[str, dict[str, str]]) -> list[Element]:
    """Returns a section for each heading that has pictures.

    Args:
        folder: of the pictures.
        shown: heading -> pattern -> caption.
    """
    sections = []
    for heading, captions in shown.items():
        figures = []
        for pattern, caption in captions.items():
            if path := newest(folder, pattern):
                figures.append(picture(path, caption))
        if figures:
            sections += section(heading, element("div", *figures, class_="pictures"))
    return sections


def quickstart_page(folder: Path) -> list[Element]:
    """Returns the page of a quickstart, or of what own_images.sh wrote."""
    run_folders = {name: newest(folder, pattern) for name, pattern in RUNS.items()}
    run_folders = {name: path for name, path in run_folders.items() if path}
    logged = {name: read_logged(RunFolder(path).metrics) for name, path in run_folders.items()}
    content = []
    details = []
    if (folder / "report.json").is_file():
        report = read_report(folder / "report.json")
        content.append(facts_list(facts(report) | {"read with care": CAVEAT}))
        content += section("Results", table(
            "Lower is better for losses, FID and sFID, higher for the others.",
            ["", *report["runs"]], results(report)))
        for name, value in report.items():
            columns = value if name == "runs" else {"value": value}
            details.append(folded_settings(name.replace("_", " "), columns))
    else:
        content += own_results(folder)
        content += section("Last numbers", *last_values(logged))
        for name, path in run_folders.items():
            details += config_of(path, name)
    tokenizer = newest(folder, "vq/[0-9]*/metrics.jsonl")
    trained = {"tokenizer": read_logged(tokenizer)} if tokenizer else {}
    return [*content,
            *pictures(folder, PICTURES),
            *section("Curves", *curves(logged)),
            *section("Curves of the tokenizer", *curves(trained)),
            *section("Settings and hashes", *details)]


def own_results(folder: Path) -> list[Element]:
    """Returns what own_images.sh chose and how its samples score, as far as it is there.

    Raises:
        ValueError: a record lacks something.
    """
    parts = []
    if (folder / "plan.json").is_file():
        plan = read_json(folder / "plan.json", PLAN)
        known = {"pictures": f"{plan['image_size']} pixels, {plan['codebook_size']} codes in "
                             f"clusters of {plan['cluster_size']}"}
        if (folder / "vq.json").is_file():
            tokenizer = read_json(folder / "vq.json", TOKENIZER)
            known["reconstruction (val)"] = (f"{tokenizer['psnr']:.2f} dB, "
                                             f"{tokenizer['codes_used']} codes used")
        parts.append(facts_list(known))
    if scores := newest(folder, "samples/*.json"):
        numbers = read_json(scores, {"numbers": dict})["numbers"]
        check_kinds(numbers, dict.fromkeys(numbers, NUMBER), scores)
        rows = [[title, f"{number:.4f}"] for title, number in numbers.items()]
        parts += section("Results", table("All scores are from a small classifier of these "
                                          "images, not from Inception.", ["", "samples"], rows))
    return parts


def run_page(folder: Path) -> list[Element]:
    """Returns the page of one training run."""
    logged = {folder.name: read_logged(RunFolder(folder).metrics)}
    result = RunFolder(folder).result
    state = f"Finished after {result['steps']} steps." if result else "Not finished."
    return [element("p", state),
            *section("Results", *last_values(logged)),
            *pictures(folder, PICTURES_OF_A_RUN),
            *section("Curves", *curves(logged)),
            *section("Settings and hashes", *config_of(folder, "config.json"))]


def config_of(run_folder: Path, title: str) -> list[Element]:
    """Returns the folded settings of a run, if they are there."""
    path = run_folder / "config.json"
    if not path.is_file():
        return []
    return [folded_settings(title, {"value": read_json(path)})]


def sweep_page(folder: Path) -> list[Element]:
    """Returns the page of a sweep over guidance."""
    scores = read_sweep(folder / "sweep.json")
    columns = columns_of(scores)
    head, *rows = table_of(scores, columns)
    sentences = [element("p", sentence) for sentence in best_in_words(scores, columns)]
    charts = []
    lines: list[Line] = []
    for panel in panels_of(scores, columns):
        drawn = [Line(name, points, number)
                 for number, (name, points) in enumerate(panel.curves.items())]
        charts.append(chart(panel.xlabel, panel.ylabel, drawn))
        lines += drawn
    return [*sentences,
            *section("Scores", table("A row for each setting.", head, rows)),
            *section("Curves", *legend(lines), element("div", *charts, class_="charts")),
            *section("Settings and hashes", folded_settings(
                "what all have in common", {"value": scores[0].conditions}))]


def page_of(folder: Path) -> list[Element]:
    """Returns the page of a folder.

    Raises:
        ValueError: it is none of the three kinds, or a file in it is damaged.
    """
    if (folder / "sweep.json").is_file():
        return sweep_page(folder)
    if RunFolder(folder).metrics.is_file():
        return run_page(folder)
    if (folder / "report.json").is_file() or any(newest(folder, each) for each in RUNS.values()):
        return quickstart_page(folder)
    raise ValueError(f"{folder}: expected the folder of a quickstart (report.json), of one run "
                     "(metrics.jsonl) or of a sweep (sweep.json), found none of these files")


def main(args: Flags, session: Session) -> None:
    """Reads the folder and writes its page."""
    with checks(session):
        content = page_of(args.folder)
        path = args.folder / "report.html"
        check_output(path)
    write_page(path, args.folder.resolve().name, content)
    print(f"page in {path}")


if __name__ == "__main__":
    run(main, build_parser())
