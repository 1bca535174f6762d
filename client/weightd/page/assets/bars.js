// Draws a bar of parts that follow each other, with a legend that says the figures.

import { element, redraw } from "weightd/dom.js";
import { size } from "weightd/format.js";

/**
 * A bar of `parts` {label, bytes, kind} of `whole` bytes; `kind` is the class that gives a part its colour. Empty parts
 * are left out of both. Draws into `target`, and only if something has changed.
 */
export function drawBar(target, title, parts, whole) {
  const seen = parts.filter(({ bytes }) => bytes > 0);
  redraw(target, JSON.stringify([title, seen, whole]), () => {
    const bar = element("div", { class: "bar", "aria-hidden": "true" }, seen.map(({ label, bytes, kind }) => {
      const part = element("i", { class: kind, title: `${label}: ${size(bytes)}` });
      part.style.flexGrow = String(bytes / Math.max(whole, 1));
      return part;
    }));
    const legend = element("ul", { class: "legend", "aria-label": title }, seen.map(({ label, bytes, kind }) =>
      element("li", {}, element("i", { class: `swatch ${kind}` }), `${label} `, element("b", {}, size(bytes)))));
    return [bar, legend];
  });
}

/** A bar of one part: progress of `done` of `total`, which screen readers read as such. */
export function progressBar(label, done, total) {
  const bar = element("progress", { max: String(Math.max(total, 1)), value: String(done), "aria-label": label });
  return bar;
}
