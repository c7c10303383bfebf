// Shows the values of a chart where the pointer is, or where the arrow keys have moved.
"use strict";

function write(value) {
    return String(Number(value.toPrecision(5)));
}

function listen(figure) {
    const drawing = figure.querySelector("svg");
    const rule = figure.querySelector(".rule");
    const readout = figure.querySelector(".readout");
    const width = drawing.viewBox.baseVal.width;
    const lines = Array.from(figure.querySelectorAll("polyline"), (line) => ({
        name: line.dataset.name,
        css: line.getAttribute("class"),
        values: JSON.parse(line.dataset.values),
        lefts: Array.from(line.points, (point) => point.x),
    }));
    // Where points are across the drawing -> their value on the axis, from left to right.
    const found = new Map();
    for (const line of lines) {
        line.lefts.forEach((left, number) => found.set(left, line.values[number][0]));
    }
    const places = Array.from(found).sort((one, other) => one[0] - other[0]);
    let shown = -1;

    function addRow(css, text) {
        const row = document.createElement("div");
        row.className = css;
        row.textContent = text;
        readout.append(row);
    }

    function show(number) {
        if (number === shown) {
            return;
        }
        shown = number;
        const [left, value] = places[number];
        rule.setAttribute("x1", left);
        rule.setAttribute("x2", left);
        rule.setAttribute("visibility", "visible");
        readout.replaceChildren();
        addRow("", `${drawing.dataset.x} ${write(value)}`);
        for (const line of lines) {
            line.lefts.forEach((place, at) => {
                if (place === left) {
                    addRow(`key ${line.css}`, `${line.name} ${write(line.values[at][1])}`);
                }
            });
        }
        const isLeft = left < width / 2;
        readout.style.left = isLeft ? `calc(${100 * left / width}% + 8px)` : "auto";
        readout.style.right = isLeft ? "auto" : `calc(${100 - 100 * left / width}% + 8px)`;
        readout.hidden = false;
    }

    function hide() {
        shown = -1;
        rule.setAttribute("visibility", "hidden");
        readout.hidden = true;
    }

    function follow(event) {
        const box = drawing.getBoundingClientRect();
        const at = (event.clientX - box.left) / box.width * width;
        let nearest = 0;
        places.forEach(([left], number) => {
            if (Math.abs(left - at) < Math.abs(places[nearest][0] - at)) {
                nearest = number;
            }
        });
        show(nearest);
    }

    drawing.addEventListener("pointermove", follow);
    drawing.addEventListener("pointerdown", follow);
    drawing.addEventListener("pointerleave", (event) => {
        if (event.pointerType === "mouse") {            // a finger leaves when it is lifted
            hide();
        }
    });
    drawing.addEventListener("blur", hide);
    drawing.addEventListener("keydown", (event) => {
        const step = {ArrowLeft: -1, ArrowRight: 1}[event.key];
        if (step) {
            event.preventDefault();
            show(Math.min(Math.max(shown + step, 0), places.length - 1));
        } else if (event.key === "Escape") {
            hide();
        }
    });
}

document.querySelectorAll("figure.chart").forEach(listen);
