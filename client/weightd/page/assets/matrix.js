// Draws the sharing matrix: how much of each checkpoint's bytes each other one uses as well.

import { element, redraw } from "weightd/dom.js";
import { brief, percent, plural, printable, size } from "weightd/format.js";

export const MOST = 16; // checkpoints that the matrix has; people cannot read more at once

/**
 * Chooses what the matrix shows. `items` are {key, name, bytes, alone}, `pairs` are {one, other, bytes} with keys.
 * Returns the items that have most in common with others, at most MOST, in their own order, and bytes by pair of keys.
 */
export function chosen(items, pairs) {
  const known = new Set(items.map(({ key }) => key));
  const common = new Map();
  const bytes = new Map();
  for (const pair of pairs) {
    if (!known.has(pair.one) || !known.has(pair.other)) continue;
    for (const [row, column] of [[pair.one, pair.other], [pair.other, pair.one]]) {
      common.set(row, (common.get(row) ?? 0) + pair.bytes);
      bytes.set(JSON.stringify([row, column]), pair.bytes);
    }
  }
  const best = [...common.keys()].sort((one, other) => common.get(other) - common.get(one)).slice(0, MOST);
  const kept = new Set(best);
  return { rows: items.filter(({ key }) => kept.has(key)), bytes, left: items.length - kept.size, sharing: common.size };
}

/** A sharing matrix. `onPick` is called with the keys of a row and a column, or of a row alone. */
export class SharingMatrix {
  #onPick;

  constructor(onPick, prefix = "") {
    this.#onPick = onPick;
    this.#prefix = prefix;
    this.node = element("div", { class: "matrix" });
  }

  #prefix; // "at most " where figures come from names and shapes alone

  /** Shows items and pairs as `chosen` takes them. Draws only what has changed. */
  show(items, pairs) {
    const { rows, bytes, left, sharing } = chosen(items, pairs);
    const cells = rows.map((row) => rows.map((column) => bytes.get(JSON.stringify([row.key, column.key])) ?? 0));
    redraw(this.node, JSON.stringify([rows, cells, left]), () => this.#make(rows, cells, left, sharing));
  }

  #make(rows, cells, left, sharing) {
    if (rows.length === 0) return element("p", { class: "hint" }, "No two checkpoints share bytes.");
    const heads = rows.map((row, at) =>
      element("th", { scope: "col", class: "column", title: printable(row.name), "aria-label": printable(row.name) }, String(at + 1)));
    const lines = rows.map((row, at) => element("tr", {}, this.#lineHead(row, at), this.#alone(row), cells[at].map((shared, column) =>
      at === column ? element("td", { class: "self", "aria-label": "itself" }, "") : this.#cell(row, rows[column], shared))));
    return [
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Sharing matrix" },
        element("table", { class: "sharing" },
          element("caption", { class: "unseen" }, `How much of each checkpoint ${this.#prefix}each other one shares`),
          element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "Of the bytes of"), element("th", { scope: "col", class: "number" }, "only here"), heads)),
          element("tbody", {}, lines))),
      left > 0 ? element("p", { class: "hint" }, sharing > rows.length
        ? `The ${rows.length} checkpoints that share most; ${plural(left, "other")} are left out.`
        : `Left out: ${plural(left, "checkpoint")} with nothing in common with any other.`) : null,
    ];
  }

  #lineHead(row, at) {
    const name = printable(row.name);
    return element("th", { scope: "row" },
      element("button", { class: "link", title: name, data: { key: `row ${row.key}` }, onclick: () => this.#onPick(row.key) },
        element("b", {}, `${at + 1} `), element("span", { class: "name" }, brief(row.name))),
      element("small", {}, size(row.bytes)));
  }

  #alone(row) {
    const fraction = row.bytes ? row.alone / row.bytes : 0;
    return element("td", { class: "number alone", title: `${size(row.alone)} that no other uses` }, percent(fraction));
  }

  #cell(row, column, shared) {
    if (shared === 0) return element("td", { class: "cell none" }, "·");
    const fraction = Math.min(1, row.bytes ? shared / row.bytes : 0);
    const title = `${this.#prefix}${size(shared)} of ${printable(row.name)}, ${percent(fraction)}, are also of ${printable(column.name)}`;
    return element("td", { class: `cell level-${Math.ceil(fraction * 5)}` },
      element("button", { title, "aria-label": title, data: { key: `${row.key} ${column.key}` }, onclick: () => this.#onPick(row.key, column.key) }, percent(fraction)));
  }
}
