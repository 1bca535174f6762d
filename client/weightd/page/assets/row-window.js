// A table of any length that holds only the rows that are seen, sorted by its heads.

import { element, setText } from "weightd/dom.js";

const HEIGHT = 34; // pixels of a row
const MORE = 8; // rows kept above and below those that are seen

/**
 * A sorted table. `columns` are {key, title, value(row), sort(row), class, make(row)}: `value` gives a cell's text, or
 * `make` gives its node and `value` the text that says whether it has changed. `identify(row)` is a row's key.
 */
export class RowWindow {
  #columns;
  #identify;
  #rows = [];
  #sorted = [];
  #order;
  #made = new Map();
  #body = element("tbody");
  #above = element("tr", { "aria-hidden": "true" }, element("td", { class: "spacer" }));
  #below = element("tr", { "aria-hidden": "true" }, element("td", { class: "spacer" }));
  #frame;
  #heads;
  #table;
  #classOf;
  draws = 0; // how many rows were drawn, for tests

  constructor(caption, columns, identify, { order, classOf = () => "", rows = 12 } = {}) {
    this.#columns = columns;
    this.#identify = identify;
    this.#classOf = classOf;
    this.#order = order ?? { key: columns[0].key, down: false };
    this.#heads = columns.map((column) => element("th", { scope: "col", class: column.class },
      column.sort ? element("button", { class: "sort", onclick: () => this.#sortBy(column.key) }, column.title) : column.title));
    this.#table = element("table", { class: "rows" }, element("caption", { class: "unseen" }, caption),
      element("thead", {}, element("tr", { "aria-rowindex": "1" }, this.#heads)), this.#body);
    this.#frame = element("div", { class: "scroll window", tabindex: "0", role: "region", "aria-label": caption, onscroll: () => this.#draw() }, this.#table);
    this.#frame.style.maxHeight = `${(rows + 1.5) * HEIGHT}px`;
    this.node = this.#frame;
    new ResizeObserver(() => this.#draw()).observe(this.#frame);
  }

  /** Shows rows; those that are drawn and have not changed stay. */
  show(rows) {
    this.#rows = rows;
    this.#sort();
  }

  /** Brings a row into view. */
  reveal(key) {
    const at = this.#sorted.findIndex((row) => this.#identify(row) === key);
    const top = at * HEIGHT;
    if (at >= 0 && (top < this.#frame.scrollTop || top > this.#frame.scrollTop + this.#frame.clientHeight - 2 * HEIGHT)) {
      this.#frame.scrollTop = Math.max(0, top - HEIGHT);
    }
    this.#draw();
  }

  #sortBy(key) {
    this.#order = { key, down: this.#order.key === key ? !this.#order.down : true };
    this.#sort();
  }

  #sort() {
    const column = this.#columns.find(({ key }) => key === this.#order.key);
    const sign = this.#order.down ? -1 : 1;
    const first = this.#columns[0];
    const keyed = this.#rows.map((row) => [column.sort(row), first.sort(row), row]);
    keyed.sort((one, other) => sign * compared(one[0], other[0]) || compared(one[1], other[1]));
    this.#sorted = keyed.map(([, , row]) => row);
    this.#heads.forEach((head, at) => {
      if (this.#columns[at].key === this.#order.key) head.setAttribute("aria-sort", this.#order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    this.#table.setAttribute("aria-rowcount", String(this.#sorted.length + 1));
    this.#draw();
  }

  #draw() {
    const first = Math.max(0, Math.floor(this.#frame.scrollTop / HEIGHT) - MORE);
    const last = Math.min(this.#sorted.length, Math.ceil((this.#frame.scrollTop + (this.#frame.clientHeight || 600)) / HEIGHT) + MORE);
    const made = new Map();
    const lines = [];
    for (let at = first; at < last; at += 1) {
      const row = this.#sorted[at];
      const key = this.#identify(row);
      const line = this.#made.get(key) ?? this.#make(key);
      this.#update(line, row, at);
      made.set(key, line);
      lines.push(line.node);
    }
    this.#made = made;
    this.#above.firstChild.style.height = `${first * HEIGHT}px`;
    this.#below.firstChild.style.height = `${(this.#sorted.length - last) * HEIGHT}px`;
    place(this.#body, [...(first ? [this.#above] : []), ...lines, ...(last < this.#sorted.length ? [this.#below] : [])]);
  }

  #make(key) {
    const cells = this.#columns.map((column, at) => (at === 0 ? element("th", { scope: "row", class: column.class }) : element("td", { class: column.class })));
    return { node: element("tr", { data: { row: key } }, cells), cells, values: [] };
  }

  #update(line, row, at) {
    const values = this.#columns.map((column) => String(column.value(row)));
    const kind = this.#classOf(row);
    if (line.node.className !== kind) line.node.className = kind;
    line.node.setAttribute("aria-rowindex", String(at + 2));
    if (values.every((value, cell) => value === line.values[cell])) return;
    this.draws += 1;
    this.#columns.forEach((column, cell) => {
      if (values[cell] === line.values[cell]) return;
      if (column.make) line.cells[cell].replaceChildren(column.make(row));
      else {
        setText(line.cells[cell], values[cell]);
        line.cells[cell].title = values[cell];
      }
    });
    line.values = values;
  }
}

function compared(one, other) {
  return one < other ? -1 : one > other ? 1 : 0;
}

/** Makes `nodes` the children of `parent`, and moves none that is in its place: focus and selection stay. */
function place(parent, nodes) {
  const kept = new Set(nodes);
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  nodes.forEach((node, at) => {
    if (parent.children[at] !== node) parent.insertBefore(node, parent.children[at] ?? null);
  });
}
