"""Pieces of a page of HTML that needs no other file: tables, pictures, folded parts.

They are elements of the standard library's ElementTree, which escapes every text and attribute.
"""

import base64
import io
import json
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, tostring

from PIL import Image

from autoregressive.runtime.files import atomic_write

HERE = Path(__file__).parent


def element(tag: str, *content: Element | str, **attributes: str) -> Element:
    """Returns an element of HTML.

    Args:
        tag: its name.
        content: elements and texts, in their order.
        attributes: their names may end in _ (class_), and _ inside stands for - (aria_label).
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items()}
    made = Element(tag, named)
    for item in content:
        if isinstance(item, Element):
            made.append(item)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + item
        else:
            made.text = (made.text or "") + item
    return made


def section(heading: str, *content: Element) -> list[Element]:
    """Returns a part of the page with its heading; nothing if it has no content."""
    return [element("section", element("h2", heading), *content)] if content else []


def folded(summary: str, *content: Element) -> Element:
    """Returns a part that shows its summary until it is opened."""
    return element("details", element("summary", summary), *content)


def table(caption: str, head: list[str], rows: list[list[str]], kind: str = "numbers") -> Element:
    """Returns a table that scrolls to the side where it is wider than the page.

    Args:
        caption: what it shows.
        head: a title for each column.
        rows: the cells of each row; the first one says what the row is about.
        kind: "numbers", or "texts", which may be long.
    """
    titles = [element("th", title, scope="col") for title in head]
    lines = []
    for first, *others in rows:
        cells = [element("td", cell) for cell in others]
        lines.append(element("tr", element("th", first, scope="row"), *cells))
    whole = element("table", element("caption", caption),
                    element("thead", element("tr", *titles)), element("tbody", *lines), class_=kind)
    return _wide(caption, whole)


def facts_list(facts: dict[str, str]) -> Element:
    """Returns a list of facts: what each is about, and its text."""
    terms = []
    for title, text in facts.items():
        terms += [element("dt", title), element("dd", text)]
    return element("dl", *terms)


def folded_settings(title: str, columns: dict[str, dict[str, Any]]) -> Element:
    """Returns a folded table with a column for each plain dict; inner dicts are flattened."""
    flat = {title: _flatten(settings) for title, settings in columns.items()}
    names = dict.fromkeys(name for settings in flat.values() for name in settings)
    rows = [[name, *(settings.get(name, "") for settings in flat.values())] for name in names]
    return folded(title, table(title, ["setting", *flat], rows, kind="texts"))


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _as_text(value)
    return flat


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def picture(path: Path, caption: str) -> Element:
    """Returns a figure that holds a PNG.

    Raises:
        ValueError: the file is no PNG.
    """
    content = path.read_bytes()
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            width, height = image.size
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: expected a PNG, found other content; remove it or make it "
                         "again") from error
    image = element("img", src="data:image/png;base64," + base64.b64encode(content).decode(),
                    alt=caption, width=str(width), height=str(height))
    return element("figure", _wide(path.name, image), element("figcaption", caption))


def _wide(label: str, content: Element) -> Element:
    """Returns a part that scrolls to the side, by keys too, where it is wider than the page."""
    return element("div", content, class_="wide", role="region", aria_label=label, tabindex="0")


def write_page(path: Path, title: str, content: list[Element]) -> None:
    """Writes a whole page, atomically.

    Args:
        path: of the file.
        title: of the page.
        content: what follows its heading.
    """
    head = element("head", element("meta", charset="utf-8"),
                   element("meta", name="viewport", content="width=device-width, initial-scale=1"),
                   element("title", title),
                   element("style", (HERE / "page.css").read_text("utf-8")))
    body = element("body", element("main", element("h1", title), *content),
                   element("script", (HERE / "chart.js").read_text("utf-8")))
    text = tostring(element("html", head, body, lang="en"), encoding="unicode", method="html")
    with atomic_write(path) as file:
        file.write(("<!DOCTYPE html>\n" + text + "\n").encode("utf-8", "backslashreplace"))
