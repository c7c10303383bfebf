"""report.html: a whole page that needs no other file, and shows the numbers that the files hold."""

import base64
import errno
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from processes import run_here
from scripts.pages.chart import MOST_POINTS, Line, chart, thin_out
from scripts.pages.page import element, write_page
from scripts.pages.quickstart import ACCURACY, LOSSES, METRICS

REPORT = "scripts/report.py"
EMPTY = {"meta", "img", "br", "hr", "link", "input"}            # elements of HTML without an end
HOSTILE = "</script><script>alert(1)</script><img src=x onerror='alert(1)'>\" & ü"
CODES = {"dataset": HOSTILE, "num_images": 3, "image_size": 16, "codebook_size": 16}
PICTURES = ("digits.png", "codebook-x.png", "vq/000-x/reconstructions.png",
            "samples-lambda1/x.png", "samples-lambda0/x.png")


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        elements: (tag, attributes) of each, in their order.
        texts: (the tags around it, text) of each text.
    """

    def __init__(self, path):
        super().__init__()
        self.elements = []
        self.texts = []
        self._open = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self._open), data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def texts_in(self, tag):
        return [text for around, text in self.texts if around and around[-1] == tag]

    def table(self, number=0):
        """Returns the rows of a table, each as its texts; empty cells have none."""
        whole = self.text.split("<tbody>")[number + 1].split("</tbody>")[0]
        return [[cell.split(">")[-1] for cell in row.replace("</th>", "</td>").split("</td>")[:-1]]
                for row in whole.split("</tr>")[:-1]]

    def curves(self):
        """Returns the lines of the charts: (title of the chart, name) -> points."""
        found = {}
        title = ""
        for figure in self.text.split('<figure class="chart">')[1:]:
            title = figure.split("<figcaption>")[1].split("<")[0]
            lines = Lines()
            lines.feed(figure)
            for attributes in lines.found:
                points = [tuple(point) for point in json.loads(attributes["data-values"])]
                found[title, attributes["data-name"]] = points
        return found


class Lines(HTMLParser):
    """The attributes of the lines of a chart."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        if tag == "polyline" and "data-values" in dict(attributes):
            self.found.append(dict(attributes))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def write_metrics(path, seed):
    """Writes a run's metrics of random numbers; every third line is of val."""
    numbers = np.random.default_rng(seed).random((9, 4)).tolist()
    lines = []
    for row, (first, second, third, fourth) in enumerate(numbers):
        line = {"step": 10 * (row + 1), "token_loss": 9 * first, "lr": third / 1000, "entropy": 0.0,
                "images_seen": row, "images_per_second": 100 + fourth}
        if row % 3 == 2:
            line = {"step": 10 * row, "val_token_loss": 5 * first, "val_psnr": second}
        lines.append(json.dumps(line))
    write(path, "\n".join(lines) + "\n")


def write_quickstart(folder):
    """Writes what a quickstart leaves, small, with hostile names; returns its report."""
    generator = np.random.default_rng(0)
    runs = {}
    for weight in (1, 0):
        numbers = {title: float(generator.random()) for title in (*METRICS, ACCURACY)}
        runs[f"lambda {weight}"] = {
            "training": {loss: float(generator.random()) for loss in LOSSES},
            "config": {"code_path": [f"/data/{HOSTILE}"]}, "evaluation": {"numbers": numbers}}
        write_metrics(folder / f"gpt-lambda{weight}/000-x/metrics.jsonl", weight)
    report = {"tokenizer": {"psnr": 20.5, "codes_used": 7},
              "codes": CODES | {"class_names": [HOSTILE, "ß"]}, "runs": runs,
              "files_sha256": {f"{HOSTILE}.pt": "0" * 64}}
    write(folder / "report.json", report)
    for number, name in enumerate(PICTURES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8 + number, 6), (number, 0, 0)).save(folder / name)
    return report


@pytest.fixture
def quickstart(tmp_path):
    write_quickstart(tmp_path / "quick")
    return tmp_path / "quick"


def page_of(folder):
    assert run_here(REPORT, folder) == 0
    return Page(folder / "report.html")


def test_a_page_needs_no_other_file(quickstart):
    page = page_of(quickstart)
    pictures = [(quickstart / name).read_bytes() for name in PICTURES]
    shown = [image["src"].partition("data:image/png;base64,") for image in page.all("img")]
    assert all(not before for before, _, _ in shown)
    assert sorted(base64.b64decode(code) for _, _, code in shown) == sorted(pictures)
    assert all(image["alt"] and image["width"] and image["height"] for image in page.all("img"))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "form")
        assert "href" not in attributes and ("src" not in attributes or tag == "img")
    style, = page.texts_in("style")
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme" in style
    assert "http" not in page.text
    assert page.all("html") == [{"lang": "en"}]
    assert "width=device-width" in " ".join(meta.get("content", "") for meta in page.all("meta"))
    assert all(cell["scope"] in ("col", "row") for cell in page.all("th"))
    assert all(chart["aria-label"] for chart in page.all("svg") if "role" in chart)


def test_names_of_users_are_texts_and_nothing_else(tmp_path):
    folder = tmp_path / HOSTILE.replace("/", "")
    report = write_quickstart(folder)
    page = page_of(folder)
    assert page.all("script") == [{}] and len(page.all("img")) == len(PICTURES)
    assert not [name for _, attributes in page.elements for name in attributes if name == "onerror"]
    assert page.texts_in("title") == page.texts_in("h1") == [folder.name]
    cells = page.texts_in("td") + page.texts_in("th")
    names, = [json.loads(cell) for cell in cells if "ß" in cell]
    assert names == report["codes"]["class_names"]
    assert f"{HOSTILE}.pt" in cells


def test_a_folder_whose_name_is_no_unicode_has_a_page(tmp_path):
    folder = tmp_path / os.fsdecode(b"run \xff")
    write_metrics(folder / "metrics.jsonl", seed=1)
    assert r"run \udcff" in page_of(folder).texts_in("h1")


def test_the_table_shows_the_numbers_of_the_report(quickstart):
    report = json.loads((quickstart / "report.json").read_text())
    rows = {title: cells for title, *cells in page_of(quickstart).table()}
    assert set(rows) == {"training token loss", "training cluster loss", *METRICS}
    for metric in METRICS:
        numbers = [run["evaluation"]["numbers"][metric] for run in report["runs"].values()]
        assert [float(cell) for cell in rows[metric]] == pytest.approx(numbers, abs=5e-5)
    losses = [run["training"]["cluster_loss"] for run in report["runs"].values()]
    shown = [float(cell) for cell in rows["training cluster loss"]]
    assert shown == pytest.approx(losses, abs=5e-4)


def test_the_curves_hold_the_points_of_the_metrics(quickstart):
    expected = {}
    for run in ("lambda 1", "lambda 0"):
        path = quickstart / f"gpt-{run.replace(' ', '')}" / "000-x" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for name in ("token_loss", "lr", "images_per_second", "val_token_loss", "val_psnr"):
            legend = f"{run}, val" if name.startswith("val_") else run
            key = (name.removeprefix("val_").replace("_", " "), legend)
            expected[key] = [(line["step"], line[name]) for line in lines if name in line]
    assert page_of(quickstart).curves() == expected


def test_the_page_of_a_run_shows_its_last_numbers_and_val_beside_train(tmp_path):
    folder = tmp_path / "000-x"
    write_metrics(folder / "metrics.jsonl", seed=1)
    write(folder / "config.json", {"lr": 0.5, "nested": {"path": HOSTILE}})
    write(folder / "finished.json", {"steps": 90})
    page = page_of(folder)
    rows = {title: cells for title, *cells in page.table()}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = (lines[7]["token_loss"], lines[8]["val_token_loss"])
    assert rows["token loss"] == [f"{loss:.4g}" for loss in losses]
    assert rows["step"] == ["80", "80"] and rows["psnr"][0] == "" and "entropy" not in rows
    assert {name for title, name in page.curves() if title == "token loss"} == {"train", "val"}
    assert {line["class"] for line in page.all("polyline")} == {"color-0", "color-0 dashed"}
    assert "Finished after 90 steps." in page.texts_in("p")
    assert "nested.path" in page.texts_in("th") and HOSTILE in page.texts_in("td")


def test_numbers_that_are_none_are_left_out(tmp_path):
    large = "1" + "0" * 400
    write(tmp_path / "metrics.jsonl", f"""\
{{"step": 1, "loss": NaN, "lr": 1}}
{{"step": 2, "loss": 2.5}}
{{"step": 3, "loss": 1e999, "lr": {large}}}
{{"step": 4, "loss": 3, "lr": "x"}}
{{"step": {large}, "loss": 7}}
""")
    page = page_of(tmp_path)
    assert page.curves() == {("loss", "train"): [(2, 2.5), (4, 3)]}
    assert page.table() == [["step", "4"], ["lr", "1"], ["loss", "3"]]


def test_the_page_of_a_sweep_shows_its_scores(tmp_path):
    for scale, fid in ((2.0, 3.5), (1.0, 9.0), (3.0, 4.0)):
        record = {"numbers": {"FID": fid, "Recall": 0.5},
                  "samples": {"settings": {"cfg_scale": scale, "num_fid_samples": 10,
                                           "global_seed": 3, "class_names": [HOSTILE]}}}
        write(tmp_path / "10-samples" / f"{scale}" / "x.json", record)
    assert run_here("scripts/sweep_report.py", tmp_path) == 0
    page = page_of(tmp_path)
    scores = json.loads((tmp_path / "sweep.json").read_text())["scores"]
    assert [list(map(float, row)) for row in page.table()] == [
        [score["cfg_scale"], score["FID"], score["Recall"]] for score in scores]
    points = [(score["cfg_scale"], score["FID"]) for score in scores]
    assert page.curves() == {("FID", "all"): points}
    assert any("3.5000 at scale 2.0" in text for text in page.texts_in("p"))


def test_a_point_lies_where_the_ticks_say():
    points = [(100, -0.3), (250, 0.17), (1500, 0.05)]
    drawing = chart("step", "loss", [Line("a", points, 0)]).find("svg")
    for axis, values in zip("xy", zip(*points, strict=True), strict=True):
        ticks = [(float(text.get(axis)), text.text) for text in drawing.findall("text")
                 if text.get("class") == axis and text.text != "step"]
        places = [float(place.split(",")["xy".index(axis)])
                  for place in drawing.find("polyline").get("points").split()]
        known = sorted((place, float(text)) for place, text in ticks)
        assert len(known) >= 4 and all(len(text) < 6 for _, text in ticks)      # round
        assert np.interp(places, *zip(*known, strict=True)) == pytest.approx(values, rel=1e-2)
        assert known[0][0] <= min(places) and max(places) <= known[-1][0]
        rises = np.diff([value for _, value in known]) > 0
        assert all(rises) if axis == "x" else not any(rises)    # y is counted from above


def test_long_lines_are_thinned_out_and_keep_their_ends():
    points = [(float(step), 0.0) for step in range(10 * MOST_POINTS + 3)]
    thinned = thin_out(points)
    assert thinned[0] == points[0] and thinned[-1] == points[-1]
    assert MOST_POINTS / 2 < len(thinned) <= MOST_POINTS + 1
    gaps = np.diff([step for step, _ in thinned])
    assert len(set(gaps[:-1])) == 1
    assert thin_out(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_files_that_are_missing_are_left_out(quickstart):
    for name in PICTURES[1:]:
        (quickstart / name).unlink()
    (quickstart / "gpt-lambda0/000-x/metrics.jsonl").unlink()
    page = page_of(quickstart)
    assert len(page.all("img")) == 1
    assert page.texts_in("h2") == ["Results", "Digits by class", "Curves", "Settings and hashes"]
    assert {name for _, name in page.curves()} == {"lambda 1", "lambda 1, val"}
    (quickstart / "report.json").unlink()           # as own_images.sh leaves it
    page = page_of(quickstart)
    assert page.texts_in("h2") == ["Last numbers", "Digits by class", "Curves"]


def test_the_page_of_own_images_shows_what_was_chosen_and_how_samples_score(tmp_path, capsys):
    write(tmp_path / "gpt/000-x/metrics.jsonl", "")
    write(tmp_path / "plan.json", {"image_size": 64, "codebook_size": 512, "cluster_size": 16})
    write(tmp_path / "vq.json", {"psnr": 21.5, "codes_used": 300})
    write(tmp_path / "samples/x.json", {"numbers": {"FID": 3.25, "Recall": 0.5}})
    page = page_of(tmp_path)
    assert page.texts_in("dd") == ["64 pixels, 512 codes in clusters of 16",
                                   "21.50 dB, 300 codes used"]
    assert page.texts_in("td") == ["3.2500", "0.5000"]
    lines = [{"step": 50, "reconstruction": 0.5}, {"step": 100, "reconstruction": 0.25}]
    write(tmp_path / "vq/000-y/metrics.jsonl", "\n".join(map(json.dumps, lines)))
    assert "Curves of the tokenizer" in page_of(tmp_path).texts_in("h2")
    write(tmp_path / "samples/x.json", {"numbers": {"FID": "3"}})
    assert run_here(REPORT, tmp_path) == 2
    assert "samples/x.json: expected FID as int or float, found str" in capsys.readouterr().err


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    write(tmp_path / "metrics.jsonl", "")
    page = page_of(tmp_path)
    assert not page.texts_in("h2") and page.texts_in("p") == ["Not finished."]


@pytest.mark.parametrize("name, content, message", [
    ("report.json", "{", "report.json: expected JSON"),
    ("report.json", {"runs": {}}, "report.json: expected tokenizer as dict, found none"),
    ("report.json", {"tokenizer": {"psnr": 1, "codes_used": 1}, "codes": CODES,
                     "runs": {"lambda 1": {"training": 3}}},
     "report.json: expected lambda 1.training as dict, found int"),
    ("report.json", {"tokenizer": {"psnr": 1, "codes_used": 1}, "codes": CODES, "runs": {},
                     "versions": "2"}, "report.json: expected versions as dict, found str"),
    ("digits.png", "no picture", "digits.png: expected a PNG, found other content"),
    ("report.html/x", "", "report.html: expected the name of a file to write, found a folder"),
    ("sweep.json", {"conditions": {}, "scores": []}, "expected the same numbers of each score"),
    ("sweep.json", {"conditions": {}, "scores": [3]}, "hold a number under cfg_scale, found 3"),
    ("sweep.json", {"conditions": {}, "scores": [{"cfg_scale": 1, "FID": "x"}]},
     "expected the same numbers of each score"),
    ("sweep.json", {"conditions": {}, "scores": [{"cfg_scale": 1, "top_p": [1], "FID": 2}]},
     "expected a number or a word as top_p, found [1]"),
])
def test_a_damaged_file_is_named_in_one_line(quickstart, capsys, name, content, message):
    write(quickstart / name, content)
    assert run_here(REPORT, quickstart) == 2
    line = capsys.readouterr().err
    assert message in line and len(line.splitlines()) == 1
    assert not (quickstart / "report.html").is_file()


def test_a_page_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    write_page(path, "first", [element("p", "a")])
    before = path.read_bytes()

    def full_disk(_file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="No space left"):
            write_page(path, "second", [])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write_page(path, "second", [])
    assert Page(path).texts_in("h1") == ["second"]
