// Parts that both pages are made of: sections with headings, tiles with a figure.

import { element } from "weightd/dom.js";

let sections = 0;

/** A section with a heading, which names it for screen readers, too. */
export function section(title, ...children) {
  sections += 1;
  const id = `section-${sections}`;
  return element("section", { "aria-labelledby": id }, element("h2", { id }, title), ...children.filter(Boolean));
}

/** One figure with its label, and a second figure in small. */
export function tile(label, value, more = "") {
  return element("div", { class: "tile" }, element("span", {}, label), element("b", {}, value), element("small", {}, more));
}

/** Names and what they mean, as a list of definitions; rows without a value are left out. */
export function facts(rows) {
  return element("dl", {}, rows.filter(([, value]) => value !== null && value !== "").map(([name, value]) =>
    element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}
