"""Charts as inline SVG; chart.js shows the values of their points under the pointer."""

import json
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from autoregressive.runtime.log import Points
from scripts.pages.page import element

# Of the drawing, in its own units; it is shown at about that many pixels.
WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 340, 10, 180         # of the axes
NUM_COLORS = 8                  # that page.css has
MOST_POINTS = 1000              # of a line; longer ones are thinned out
MOST_DOTS = 30                  # points of a line that are marked


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: in the legend.
        points: at least one, finite.
        color: number of its color.
        is_dashed: how it is drawn.
    """

    name: str
    points: Points
    color: int
    is_dashed: bool = False

    @property
    def css(self) -> str:
        """Its classes in page.css."""
        return f"color-{self.color % NUM_COLORS}" + " dashed" * self.is_dashed


@dataclass(frozen=True)
class Axis:
    """Values along an axis, and where they are drawn.

    Attributes:
        ticks: round values, evenly spaced; the first and the last enclose all values.
        start, end: where these two are drawn.
    """

    ticks: list[float]
    start: float
    end: float

    def place(self, value: float) -> float:
        """Returns where a value is drawn."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return round(self.start + share * (self.end - self.start), 2)


def axis_of(values: list[float], start: float, end: float) -> Axis:
    """Returns the axis of some values, see Axis."""
    from matplotlib.ticker import MaxNLocator  # here: it takes half a second

    least = min(values)
    most = max(values)
    if least == most:
        margin = abs(least) / 2 or 1.0
        least -= margin
        most += margin
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(least, most).tolist()
    step = ticks[1] - ticks[0]
    return Axis([round(tick / step) * step for tick in ticks], start, end)      # no 5.6e-17


def chart(xlabel: str, ylabel: str, lines: list[Line]) -> Element:
    """Returns a figure of lines over a common axis.

    Args:
        xlabel, ylabel: of the axes; the latter is its title, too.
        lines: at least one.
    """
    x_axis = axis_of([x for line in lines for x, _ in line.points], LEFT, RIGHT)
    y_axis = axis_of([y for line in lines for _, y in line.points], BOTTOM, TOP)
    parts = [*_draw_axes(x_axis, y_axis, xlabel),
             element("line", class_="rule", y1=str(TOP), y2=str(BOTTOM), visibility="hidden")]
    for line in lines:
        parts += _draw_line(line, x_axis, y_axis)
    ends = [f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}"
            for line in lines]
    drawing = element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", tabindex="0",
                      aria_label=f"{ylabel} over {xlabel}: {', '.join(ends)}", data_x=xlabel)
    return element("figure", element("figcaption", ylabel), drawing,
                   element("div", class_="readout", aria_live="polite", hidden="hidden"),
                   class_="chart")


def _draw_axes(x_axis: Axis, y_axis: Axis, xlabel: str) -> list[Element]:
    parts = []
    for tick in y_axis.ticks:
        y = str(y_axis.place(tick))
        parts.append(element("line", class_="grid", x1=str(LEFT), x2=str(RIGHT), y1=y, y2=y))
        parts.append(element("text", f"{tick:g}", class_="y", x=str(LEFT - 6), y=y))
    for tick in x_axis.ticks:
        x = str(x_axis.place(tick))
        parts.append(element("line", class_="grid", x1=x, x2=x, y1=str(BOTTOM), y2=str(BOTTOM + 4)))
        parts.append(element("text", f"{tick:g}", class_="x", x=x, y=str(BOTTOM + 17)))
    middle = str((LEFT + RIGHT) / 2)
    return [*parts, element("text", xlabel, class_="x", x=middle, y=str(BOTTOM + 34))]


def _draw_line(line: Line, x_axis: Axis, y_axis: Axis) -> list[Element]:
    points = thin_out(line.points)
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in points]
    parts = [element("polyline", class_=line.css, points=" ".join(f"{x},{y}" for x, y in places),
                     data_name=line.name, data_values=json.dumps(points))]
    if len(places) <= MOST_DOTS:
        parts += [element("circle", class_=line.css, cx=str(x), cy=str(y), r="2.2")
                  for x, y in places]
    return parts


def thin_out(points: Points) -> Points:
    """Returns at most MOST_POINTS + 1 points, evenly spread; the last one stays."""
    every = -(-len(points) // MOST_POINTS)
    thinned = points[::every]
    return thinned if thinned[-1] == points[-1] else [*thinned, points[-1]]


def legend(lines: list[Line]) -> list[Element]:
    """Returns the names in some charts beside what their lines look like; nothing of a single one.

    Args:
        lines: of all charts; those of one name look the same.
    """
    by_name = {line.name: line for line in lines}
    if len(by_name) < 2:
        return []
    entries = []
    for line in by_name.values():
        sample = element("polyline", class_=line.css, points="0,6 28,6")
        swatch = element("svg", sample, viewBox="0 0 28 12", width="28", height="12",
                         aria_hidden="true")
        entries.append(element("li", swatch, line.name))
    return [element("ul", *entries, class_="legend")]
