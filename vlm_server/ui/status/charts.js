/** Small charts of the last minutes in SVG, with a legend that tells the values: of now, or of the moment under the pointer. */

import { element } from "../dom.js";
import { SPAN_S } from "./samples.js";

const SVG = "http://www.w3.org/2000/svg";
const WIDTH = 300;
const HEIGHT = 72;
const HEADROOM = 1.3; // the axis is named above the lines
const GAP_S = 20; // between two points of one line

let count = 0;

/**
 * A chart. `series`: `{name, color}` each, `color` one of the classes of style.css. `format(value)`: as text. `isStacked`: each series
 * stands on the one before, as areas, up to a whole. `ceiling()`: the least that the axis reaches to, or that whole.
 */
export class Chart {
  #svg;
  #lines;
  #cursor;
  #values;
  #axis = element("span", { class: "axis-top" });
  #when = element("span", { class: "axis-when" }, "now");
  #points = [];
  #end = 0;
  #options;
  #pointed = null; // seconds of the server's clock

  constructor(label, series, { format, isStacked = false, ceiling = () => 0, isSmall = false }) {
    this.#options = { label, series, format, isStacked, ceiling };
    const id = `chart-${++count}`;
    this.#svg = shape("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img" });
    this.#svg.setAttribute("aria-labelledby", id);
    this.#svg.append(shape("title", { id }), shape("path", { class: "grid-line", d: `M0 ${HEIGHT / 2}H${WIDTH}M0 ${HEIGHT - 0.5}H${WIDTH}` }));
    this.#lines = series.map(({ color }) => {
      const line = { area: shape("path", { class: `area ${color}` }), stroke: shape("path", { class: `line ${color}` }) };
      this.#svg.append(line.area, line.stroke);
      return line;
    });
    this.#cursor = shape("path", { class: "cursor" });
    this.#svg.append(this.#cursor);
    this.#values = series.map(() => element("span", { class: "value" }, "–"));
    const legend = element("ul", { class: "legend" });
    for (const [at, { name, color }] of series.entries()) {
      legend.append(element("li", {}, element("span", { class: `swatch ${color}` }), `${name} `, this.#values[at]));
    }
    const plot = element("div", { class: "plot" }, this.#axis, this.#svg);
    const foot = element("div", { class: "axis" }, element("span", {}, `${SPAN_S / 60} min ago`), this.#when);
    this.element = element("div", { class: isSmall ? "figure small" : "figure" }, legend, plot, foot);
    this.#svg.addEventListener("pointermove", (event) => this.#point(event));
    this.#svg.addEventListener("pointerleave", () => this.#leave());
  }

  /** `points`: `{at, values}` in the order of time, a value null where none is known. `end`: the time at the right edge. */
  draw(points, end) {
    this.#points = points.filter(({ at }) => at >= end - SPAN_S);
    this.#end = end;
    const highest = Math.max(this.#options.ceiling(), ...this.#points.map(({ values }) => this.#height(values)), 0);
    const top = this.#options.isStacked ? highest || 1 : nice(HEADROOM * highest);
    this.#axis.textContent = this.#options.format(top);
    for (const [at, line] of this.#lines.entries()) {
      const runs = this.#runs(at, top);
      line.stroke.setAttribute("d", runs.map((run) => outline(run.map(({ x, y }) => [x, y]))).join(""));
      line.area.setAttribute("d", this.#options.isStacked || at === 0 ? runs.map(area).join("") : "");
    }
    this.#showValues();
    this.#svg.querySelector("title").textContent = this.#summary();
  }

  #height(values) {
    const known = values.map((value) => value ?? 0);
    return this.#options.isStacked ? known.reduce((sum, value) => sum + value, 0) : Math.max(...known);
  }

  /** Unbroken parts of one series as `{x, y, base}`. */
  #runs(at, top) {
    const runs = [];
    let last = null;
    for (const { at: time, values } of this.#points) {
      if (values[at] === null || values[at] === undefined) continue;
      if (last === null || time - last > GAP_S) runs.push([]);
      last = time;
      const below = this.#options.isStacked ? values.slice(0, at).reduce((sum, value) => sum + (value ?? 0), 0) : 0;
      const y = (value) => round(HEIGHT - 1 - ((HEIGHT - 4) * value) / top);
      runs.at(-1).push({ x: round(WIDTH * (1 - (this.#end - time) / SPAN_S)), y: y(below + values[at]), base: y(below) });
    }
    return runs;
  }

  #point(event) {
    const box = this.#svg.getBoundingClientRect();
    this.#pointed = this.#end - SPAN_S * (1 - (event.clientX - box.left) / box.width);
    this.#showValues();
  }

  #leave() {
    this.#pointed = null;
    this.#showValues();
  }

  /** Of the point that is nearest to the pointer, or of the last one. */
  #showValues() {
    const distance = ({ at }) => Math.abs(at - this.#pointed);
    const nearest = this.#pointed === null ? null : this.#points.reduce((a, b) => (distance(b) < distance(a) ? b : a), this.#points[0]);
    const shown = nearest ?? this.#points.at(-1);
    for (const [at, value] of this.#values.entries()) value.textContent = this.#text(shown?.values[at]);
    this.#when.textContent = nearest ? `${Math.round(this.#end - nearest.at)} s ago` : "now";
    const x = nearest ? round(WIDTH * (1 - (this.#end - nearest.at) / SPAN_S)) : 0;
    this.#cursor.setAttribute("d", nearest ? `M${x} 0V${HEIGHT}` : "");
  }

  #text = (value) => (value === null || value === undefined ? "–" : this.#options.format(value));

  #summary() {
    const parts = this.#options.series.map(({ name }, at) => {
      const known = this.#points.map(({ values }) => values[at]).filter((value) => value !== null && value !== undefined);
      if (!known.length) return `${name}: nothing yet`;
      return `${name}: ${this.#text(this.#points.at(-1).values[at])} now, at most ${this.#text(Math.max(...known))}`;
    });
    return `${this.#options.label}, last ${SPAN_S / 60} minutes. ${parts.join(". ")}`;
  }
}

/** A bar of shares of a whole. `set(parts, whole)`: each part's `{name, color, value, text}`. */
export class Bar {
  element = element("div", { class: "bar", role: "img" });

  set(parts, whole, label) {
    this.element.setAttribute("aria-label", label);
    this.element.replaceChildren(
      ...parts.map(({ color, value }) => {
        const part = element("span", { class: color });
        part.style.width = `${whole ? Math.min(100, (100 * value) / whole) : 0}%`;
        return part;
      }),
    );
  }
}

export function shape(tag, attributes = {}) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** The next round number. */
export function nice(value) {
  if (value <= 0) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

const outline = (corners) => corners.map(([x, y], at) => `${at ? "L" : "M"}${x} ${y}`).join("");
const area = (run) => `${outline([...run.map(({ x, y }) => [x, y]), ...run.toReversed().map(({ x, base }) => [x, base])])}Z`;
const round = (value) => Math.round(value * 10) / 10;

