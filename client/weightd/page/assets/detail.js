// The part of the page that shows one checkpoint: what it is, who holds it, who shares with it, and its tensors.

import { element, plainTable, redraw } from "weightd/dom.js";
import { ago, called, number, percent, plural, printable, shortDigest, size } from "weightd/format.js";
import { facts, section } from "weightd/parts.js";
import { RowWindow } from "weightd/row-window.js";
import { keyOf, nameOf } from "weightd/checkpoints.js";

const TENSOR_COLUMNS = [
  { key: "name", title: "Tensor", class: "grow", value: (row) => fullName(row), sort: (row) => row[8] },
  { key: "dtype", title: "Type", class: "spare", value: (row) => row[2], sort: (row) => row[2] },
  { key: "shape", title: "Shape", class: "spare", value: (row) => row[3].join(" × ") || "scalar", sort: (row) => row[3].reduce((product, side) => product * side, 1) },
  { key: "size", title: "Size", class: "number", value: (row) => size(row[4]), sort: (row) => row[4] },
  { key: "users", title: "Used by", class: "number", value: (row) => (row[7] > 1 ? plural(row[7], "checkpoint") : "only this"), sort: (row) => row[7] },
  { key: "segment", title: "Segment", class: "number spare", value: (row) => number(row[5]), sort: (row) => row[5] },
];

function fullName([component, name]) {
  return printable(component ? `${component}: ${name}` : name);
}

/** One checkpoint in detail. `ask` asks the command; `onPick` is called with the digest and device of a partner. */
export class Detail {
  #ask;
  #onPick;
  #onClose;
  #row = null;
  #asked = 0;
  #heading;
  #facts = element("div");
  #parts = element("div");
  #tensors = element("div");

  constructor(ask, onPick, onClose) {
    this.#ask = ask;
    this.#onPick = onPick;
    this.#onClose = onClose;
    this.node = section("Checkpoint", element("p", {}, element("button", { onclick: () => this.#onClose() }, "Close")), this.#facts, this.#parts, this.#tensors);
    this.node.classList.add("detail");
    this.#heading = this.node.querySelector("h2");
    this.#heading.tabIndex = -1;
    this.node.hidden = true;
  }

  /** The key of the checkpoint that is shown; "" for none. */
  get key() {
    return this.#row === null ? "" : keyOf(this.#row);
  }

  /** Shows a checkpoint of the list, and moves there. */
  open(row) {
    this.#row = row;
    this.node.hidden = false;
    this.#tensors.replaceChildren();
    redraw(this.#parts, null, () => []);
    this.#update([]);
    this.#read();
    this.node.scrollIntoView({ block: "nearest" });
    this.#heading.focus({ preventScroll: true });
  }

  /** Shows no checkpoint. */
  close() {
    this.#row = null;
    this.#asked += 1;
    this.node.hidden = true;
  }

  /** Takes the lists anew. Whatever has changed, the partners may have, too. */
  show(rows, leases) {
    if (this.#row === null) return;
    const found = rows.find((row) => keyOf(row) === this.key);
    if (found === undefined) {
      this.#heading.textContent = `${nameOf(this.#row)}: no longer here`;
      return;
    }
    this.#row = found;
    this.#update(leases.filter((lease) => lease.device === found.device && (found.names.includes(lease.checkpoint) || lease.checkpoint === found.content_digest)));
  }

  /** Asks for partners and parts again. */
  refresh() {
    if (this.#row !== null && !this.#heading.textContent.endsWith("no longer here")) this.#read();
  }

  #update(leases) {
    const row = this.#row;
    const title = nameOf(row);
    if (this.#heading.textContent !== title) this.#heading.textContent = title;
    const key = JSON.stringify([row, leases, ago(row.last_used_at)]);
    redraw(this.#facts, key, () => [
      facts([
        ["Digest", shortDigest(row.content_digest)], ["Device", printable(row.device)], ["State", row.state], ["Owner", printable(row.owner)],
        ["Tensors", number(row.tensors)], ["Size", size(row.total_bytes)], ["Only here", size(row.exclusive_bytes)], ["Shared", size(row.shared_bytes)],
        ["Pinned", row.pinned ? "yes" : "no"], ["Leases", number(row.leases)], ["Loaded", ago(row.loaded_at)], ["Last used", ago(row.last_used_at)],
      ]),
      element("p", { class: "answer" }, this.#removal(row)),
      leases.length ? plainTable("Who holds it", ["Process", "User", "Since", "Command"], leases.map((lease) => [
        { value: lease.pid === null ? "unknown" : String(lease.pid), header: true }, printable(lease.user), ago(lease.since), { value: printable(lease.command), class: "path" }])) : null,
    ]);
  }

  #removal(row) {
    if (row.leases > 0) return `Processes hold it: it cannot be removed now. Without it, ${size(row.exclusive_bytes)} would be free.`;
    return `Removing it frees ${size(row.exclusive_bytes)}: what it shares stays for the others.${row.pinned ? " It is pinned: no load evicts it." : ""}`;
  }

  async #read() {
    this.#asked += 1;
    const asked = this.#asked;
    const query = { digest: this.#row.content_digest, device: this.#row.device };
    try {
      const found = await this.#ask("/api/checkpoint", query);
      if (asked === this.#asked) redraw(this.#parts, JSON.stringify(found), () => this.#describe(found, query));
    } catch (error) {
      if (asked === this.#asked) redraw(this.#parts, String(error), () => element("p", { class: "hint" }, printable(error.message)));
    }
  }

  #describe(found, query) {
    const number_ = (value) => ({ value, class: "number" });
    const { partners } = found;
    const components = found.components.filter(({ name }) => name);
    const rows = partners.missing ? [] : partners.map((pair) => [
      { value: element("button", { class: "link", data: { key: pair.other }, onclick: () => this.#onPick(pair.other, pair.device) }, called(pair.other_name, pair.other)), header: true },
      number_(size(pair.shared_bytes)), number_(percent(pair.shared_bytes / Math.max(1, this.#row.total_bytes))), number_(size(pair.only_bytes)),
      pair.components.filter(([one, other]) => one || other).map(([one, other, bytes]) => `${printable([...new Set([one, other].filter(Boolean))].join(" = "))} ${size(bytes)}`).join(", ") || "–",
    ]);
    const list = element("button", { onclick: () => this.#list(query) }, `Show the ${plural(this.#row.tensors, "tensor")}`);
    return [
      found.note ? element("p", { class: "hint" }, printable(found.note)) : null,
      found.reference ? element("p", { class: "hint path" }, `Loaded from ${printable(found.reference)}, in ${plural(found.segments, "segment")}`) : null,
      components.length ? element("h3", {}, "Components") : null,
      components.length ? plainTable("Components", ["Component", { value: "Tensors", class: "number" }, { value: "Size", class: "number" }, { value: "Shared", class: "number" }],
        components.map((part) => [{ value: printable(part.name), header: true }, number_(number(part.tensors)), number_(size(part.total_bytes)), number_(size(part.shared_bytes))])) : null,
      element("h3", {}, "Partners"),
      partners.missing ? element("p", { class: "hint" }, printable(partners.missing)) : rows.length
        ? plainTable("Partners", ["Shares with", { value: "Bytes", class: "number" }, { value: "Of this", class: "number" }, { value: "Only these two", class: "number" }, "Components"], rows)
        : element("p", {}, "It shares nothing with other checkpoints."),
      element("h3", {}, "Tensors"),
      this.#tensors.childElementCount ? null : element("p", {}, list),
    ];
  }

  async #list(query) {
    const key = this.key;
    let shown;
    try {
      const rows = (await this.#ask("/api/tensors", query)).map((row, at) => [...row, at]);
      const filter = element("input", { type: "search", placeholder: "part of a name" });
      const table = new RowWindow("Tensors", TENSOR_COLUMNS, (row) => String(row[8]));
      const draw = () => table.show(rows.filter((row) => fullName(row).toLowerCase().includes(filter.value.toLowerCase())));
      filter.addEventListener("input", draw);
      draw();
      shown = [element("p", { class: "choices" }, element("label", {}, "Filter ", filter)), table.node];
    } catch (error) {
      shown = [element("p", { class: "hint" }, printable(error.message))];
    }
    if (this.key !== key) return; // another one was opened meanwhile
    this.#parts.querySelector("p:last-child")?.remove();
    this.#tensors.replaceChildren(...shown);
  }
}
