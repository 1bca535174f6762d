// Draws the memory map of a device: a box a segment, coloured by checkpoint, striped where shared, grey where free.

import { OTHERS, PLENTY, stripes, valuesOf } from "weightd/colours.js";
import { element, plainTable, redraw } from "weightd/dom.js";
import { brief, called, number, plural, printable, size } from "weightd/format.js";
import { BAR, placed, segmentsOf, under } from "weightd/map-layout.js";

export const KINDS = {
  blobs: "in use",
  hole: "free, for the next load",
  hollow: "free, no memory behind it",
  leaving: "free, memory being given back",
  in_flight: "being loaded",
  set_aside: "set aside",
  others: "of other users",
};
const COLOURS = [
  ...Array.from({ length: PLENTY }, (_, slot) => `--colour-${slot}`),
  OTHERS, "--surface", "--ink", "--muted", "--line", "--hole", "--faded", "--alarm", "--accent",
];
const FONT = "12px system-ui, sans-serif";
const MOST_ROWS = 1000; // of the table of segments

/** One device's map. `colours` says which checkpoint has which; `onPick` is called with the digests of a click. */
export class MemoryMap {
  #colours;
  #map = null;
  #segments = [];
  #layout = { boxes: [], height: 0 };
  #selected = new Set();
  #canvas;
  #tip;
  #legend;
  #table;
  #sentence;
  #drawn = "";
  draws = 0; // how often pixels were drawn, for tests

  constructor(colours, onPick) {
    this.#colours = colours;
    this.#canvas = element("canvas", { class: "map", role: "img" });
    this.#tip = element("div", { class: "tip", hidden: true });
    this.#legend = element("ul", { class: "legend", "aria-label": "Kinds of memory on the map" });
    this.#sentence = element("p", { class: "hint" });
    this.#table = element("details", { ontoggle: () => this.#fillTable() }, element("summary", {}, "Segments as a table"), element("div"));
    this.node = element("div", {}, this.#sentence, element("div", { class: "map-frame" }, this.#canvas, this.#tip), this.#legend, this.#table);
    this.#canvas.addEventListener("mousemove", (event) => this.#point(event));
    this.#canvas.addEventListener("mouseleave", () => { this.#tip.hidden = true; });
    this.#canvas.addEventListener("click", (event) => {
      const found = this.#at(event);
      if (found?.extent.users.length) onPick(found.extent.users);
    });
    new ResizeObserver(() => this.draw()).observe(this.node);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  /** Takes a new map: {device, segments, extents, users, checkpoints, names}. */
  show(map) {
    this.#map = map;
    this.#segments = segmentsOf(map);
    this.draw();
  }

  /** The segments with their extents. */
  get segments() {
    return this.#segments;
  }

  /** Marks checkpoints, a Set of digests: all others fade. An empty set marks none. */
  mark(selected) {
    this.#selected = selected;
    this.draw();
  }

  /** Draws, if anything that is seen has changed. */
  draw() {
    if (this.#map === null || !this.node.isConnected) return;
    const width = Math.floor(this.node.clientWidth);
    if (width === 0) return;
    const ratio = window.devicePixelRatio || 1;
    const values = valuesOf(COLOURS);
    const names = this.#map.checkpoints.map((digest) => [this.#map.names[digest], this.#colours.variable(digest)]);
    const key = JSON.stringify([width, ratio, values, names, [...this.#selected], this.#map.segments, this.#map.extents, this.#map.users]);
    if (key === this.#drawn) return;
    this.#drawn = key;
    this.#paint(width, ratio, values);
    this.#describe();
    this.#fillTable();
  }

  #paint(width, ratio, values) {
    this.draws += 1;
    this.#layout = placed(this.#segments.map((segment) => segment.size), width);
    this.#canvas.width = width * ratio;
    this.#canvas.height = Math.max(1, this.#layout.height * ratio);
    this.#canvas.style.width = `${width}px`;
    this.#canvas.style.height = `${this.#layout.height}px`;
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.font = FONT;
    const fills = new Map();
    for (const [at, box] of this.#layout.boxes.entries()) {
      const segment = this.#segments[at];
      const label = `${number(segment.segment)} · ${size(segment.size)}`;
      context.fillStyle = values["--muted"];
      if (context.measureText(label).width <= box.width) context.fillText(label, box.x, box.y - 4);
      this.#paintSegment(context, box, segment, values, fills, ratio);
    }
  }

  #paintSegment(context, box, segment, values, fills, ratio) {
    let painted = box.x; // extents of less than a pixel are drawn once for all of them
    for (const extent of segment.extents) {
      const begin = box.x + (extent.offset / segment.size) * box.width;
      const end = box.x + ((extent.offset + extent.length) / segment.size) * box.width;
      if (end - painted < 0.5) continue;
      const from = Math.max(begin, painted);
      const faded = this.#selected.size > 0 && extent.kind === "blobs" && !extent.users.some((digest) => this.#selected.has(digest));
      context.globalAlpha = faded ? 0.22 : 1;
      context.fillStyle = this.#fill(context, extent, values, fills, ratio);
      context.fillRect(from, box.y, end - from, BAR);
      context.globalAlpha = 1;
      if (end - from > 6) {
        context.fillStyle = values["--surface"]; // a thin line between extents
        context.fillRect(end - 1, box.y, 1, BAR);
      }
      this.#paintName(context, extent, from, end, box.y, values, faded);
      painted = end;
    }
    context.strokeStyle = values["--muted"];
    context.lineWidth = 1;
    context.strokeRect(box.x + 0.5, box.y + 0.5, box.width - 1, BAR - 1);
  }

  #fill(context, extent, values, fills, ratio) {
    const { kind, users } = extent;
    if (kind !== "blobs") {
      if (kind === "in_flight") return this.#pattern(context, fills, kind, [values["--accent"], values["--surface"]], ratio);
      if (kind === "leaving") return this.#pattern(context, fills, kind, [values["--hole"], values["--surface"]], ratio);
      if (kind === "set_aside") return values["--alarm"];
      return { hole: values["--hole"], hollow: values["--surface"] }[kind] ?? values["--faded"];
    }
    const colours = [...new Set(users.map((digest) => values[this.#colours.variable(digest)]))];
    if (users.length + extent.others < 2) return colours[0] ?? values["--faded"];
    if (colours.length < 2) colours.push(values["--surface"]);
    return this.#pattern(context, fills, users.join(), colours.slice(0, 3), ratio);
  }

  #pattern(context, fills, key, colours, ratio) {
    if (!fills.has(key)) {
      const pattern = stripes(context, colours, ratio);
      pattern.setTransform(new DOMMatrix().scale(1 / ratio));
      fills.set(key, pattern);
    }
    return fills.get(key);
  }

  #paintName(context, extent, from, end, y, values, faded) {
    if (extent.kind !== "blobs" || faded) return;
    const text = this.#users(extent, 2);
    const width = context.measureText(text).width;
    if (width + 14 > end - from) return;
    context.fillStyle = values["--surface"];
    context.beginPath();
    context.roundRect((from + end - width) / 2 - 5, y + 6, width + 10, BAR - 12, 4);
    context.fill();
    context.fillStyle = values["--ink"];
    context.fillText(text, (from + end - width) / 2, y + BAR / 2 + 4);
  }

  /** `base + tuned`, or `5 checkpoints` where they are more than `most`. */
  #users(extent, most) {
    const { users, others } = extent;
    if (users.length + others > most) return plural(users.length + others, "checkpoint");
    return [...users.map((digest) => brief(called(this.#map.names[digest], digest))), ...(others ? [plural(others, "other")] : [])].join(" + ");
  }

  #at(event) {
    const frame = this.#canvas.getBoundingClientRect();
    return under(this.#segments, this.#layout, event.clientX - frame.x, event.clientY - frame.y);
  }

  #point(event) {
    const found = this.#at(event);
    this.#tip.hidden = found === null;
    if (found === null) return;
    const { segment, extent } = found;
    const users = extent.kind === "blobs" ? this.#users(extent, 6) : KINDS[extent.kind] ?? extent.kind;
    const blobs = extent.blobs ? `, ${plural(extent.blobs, "tensor")}` : "";
    this.#tip.replaceChildren(
      element("strong", {}, users),
      element("span", {}, `${size(extent.length)}${blobs} at ${size(extent.offset)} of segment ${number(segment.segment)}`));
    const frame = this.#canvas.getBoundingClientRect();
    const left = Math.min(event.clientX - frame.x + 12, Math.max(0, frame.width - this.#tip.offsetWidth));
    this.#tip.style.left = `${left}px`;
    this.#tip.style.top = `${event.clientY - frame.y + 18}px`;
  }

  /** Writes the legend, and the sentence for those who do not see the map. */
  #describe() {
    const kinds = new Set(this.#segments.flatMap(({ extents }) => extents.map(({ kind }) => kind)));
    const shared = this.#segments.some(({ extents }) => extents.some(({ users, others }) => users.length + others > 1));
    const shown = ["hole", "hollow", "leaving", "in_flight", "set_aside", "others"].filter((kind) => kinds.has(kind));
    redraw(this.#legend, JSON.stringify([shown, shared]), () => [
      shared ? element("li", {}, element("i", { class: "swatch shared" }), "striped: shared") : null,
      ...shown.map((kind) => element("li", {}, element("i", { class: `swatch ${kind}` }), KINDS[kind])),
    ]);
    const free = (kind) => this.#segments.flatMap(({ extents }) => extents).filter((extent) => extent.kind === kind);
    const holes = free("hole");
    const bytes = holes.reduce((sum, extent) => sum + extent.length, 0);
    const largest = Math.max(0, ...holes.map((extent) => extent.length));
    const pieces = holes.length ? `, with ${size(bytes)} free for the next load in ${plural(holes.length, "piece")}, the largest ${size(largest)}` : "";
    const text = `${plural(this.#segments.length, "segment")}${pieces}.`;
    if (this.#sentence.textContent !== text) this.#sentence.textContent = text;
    this.#canvas.setAttribute("aria-label", `Memory map of ${printable(this.#map.device)}: ${text} The table of segments below says the same.`);
  }

  #fillTable() {
    if (!this.#table.open) return;
    const rows = this.#segments.slice(0, MOST_ROWS).map((segment) => {
      const sums = new Map();
      for (const extent of segment.extents) {
        const what = extent.kind === "blobs" ? this.#users(extent, 3) : KINDS[extent.kind] ?? extent.kind;
        sums.set(what, (sums.get(what) ?? 0) + extent.length);
      }
      const parts = [...sums].sort((one, other) => other[1] - one[1]).map(([what, bytes]) => `${what} ${size(bytes)}`);
      return [{ value: number(segment.segment), header: true }, { value: size(segment.size), class: "number" }, parts.join(", ")];
    });
    const caption = `Segments of ${printable(this.#map.device)}${this.#segments.length > MOST_ROWS ? `, the first ${number(MOST_ROWS)}` : ""}`;
    this.#table.lastElementChild.replaceChildren(plainTable(caption, ["Segment", { value: "Size", class: "number" }, "What lies there"], rows));
  }
}
