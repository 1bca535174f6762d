// The part of the page that lists checkpoints, and answers what their removal would free.

import { element, setText } from "weightd/dom.js";
import { ago, called, number, parseSize, plural, printable, size } from "weightd/format.js";
import { freed } from "weightd/map-layout.js";
import { section } from "weightd/parts.js";
import { roomFor } from "weightd/removal.js";
import { RowWindow } from "weightd/row-window.js";

/** A checkpoint's key on the page: its content and its device. */
export function keyOf({ content_digest: digest, device }) {
  return `${digest} ${device}`;
}

/** The names of a checkpoint, or its digest. */
export function nameOf(row) {
  return row.names.length ? row.names.map(printable).join(", ") : called("", row.content_digest) || "being loaded";
}

/** The table of checkpoints. `onPick` is called with a row; `groupsOf` gives a device's bytes by users, or null. */
export class Checkpoints {
  #rows = [];
  #stats = { devices: [] };
  #marked = new Set();
  #chosen = "";
  #groupsOf;
  #colours;
  #onPick;
  #filter = element("input", { type: "search", placeholder: "name, digest or owner", oninput: () => this.#draw() });
  #needed = element("input", { size: "9", placeholder: "14 GiB", oninput: () => this.#answer() });
  #device = element("select", { "aria-label": "Device", onchange: () => this.#answer() });
  #sum = element("p", { class: "answer", "aria-live": "polite" });
  #room = element("p", { class: "answer", "aria-live": "polite" });
  #count = element("span", { class: "hint" });

  constructor(colours, onPick, groupsOf) {
    this.#colours = colours;
    this.#onPick = onPick;
    this.#groupsOf = groupsOf;
    this.table = new RowWindow("Checkpoints", this.#columns(), keyOf, {
      order: { key: "size", down: true },
      classOf: (row) => (keyOf(row) === this.#chosen ? "chosen" : ""),
    });
    this.node = section("Checkpoints",
      element("p", { class: "choices" }, element("label", {}, "Filter ", this.#filter), this.#count), this.table.node, this.#sum,
      element("h3", {}, "What to remove to load another"),
      element("p", { class: "choices" }, element("label", {}, "Bytes needed ", this.#needed), this.#device), this.#room);
  }

  /** Shows checkpoints and the devices' statistics. */
  show(rows, stats) {
    this.#rows = rows;
    this.#stats = stats;
    const uuids = stats.devices.map(({ uuid }) => uuid);
    if ([...this.#device.options].map(({ value }) => value).join() !== uuids.join()) {
      this.#device.replaceChildren(...uuids.map((uuid) => element("option", { value: uuid }, printable(uuid))));
      this.#device.hidden = uuids.length < 2;
      this.node.classList.toggle("one-device", uuids.length < 2);
    }
    const present = new Set(rows.map(keyOf));
    for (const key of this.#marked) if (!present.has(key)) this.#marked.delete(key);
    this.#draw();
  }

  /** Marks the row of a checkpoint as the chosen one, and brings it into view. */
  choose(key) {
    this.#chosen = key;
    this.#draw();
    this.table.reveal(key);
  }

  #columns() {
    const bytes = (key, title, get, kind = "number") => ({ key, title, value: (row) => size(get(row)), sort: get, class: kind });
    return [
      { key: "name", title: "Checkpoint", class: "grow", sort: nameOf, value: (row) => JSON.stringify([nameOf(row), this.#colours.variable(row.content_digest)]), make: (row) => this.#name(row) },
      { key: "mark", title: "Remove?", class: "mark", value: (row) => String(this.#marked.has(keyOf(row))), make: (row) => this.#mark(row) },
      bytes("size", "Size", (row) => row.total_bytes),
      bytes("shared", "Shared", (row) => row.shared_bytes, "number spare"),
      bytes("alone", "Only here", (row) => row.exclusive_bytes),
      { key: "leases", title: "Leases", class: "number spare", value: (row) => number(row.leases), sort: (row) => row.leases },
      { key: "state", title: "State", class: "spare", value: stateOf, sort: stateOf },
      { key: "used", title: "Last used", class: "spare wide", value: (row) => ago(row.last_used_at), sort: (row) => row.last_used_at ?? "" },
      { key: "device", title: "Device", class: "spare wide device", value: (row) => printable(row.device.slice(0, 12)), sort: (row) => row.device },
    ];
  }

  #name(row) {
    const name = nameOf(row);
    const kind = this.#colours.variable(row.content_digest).slice(2);
    return element("button", { class: "link", title: name, data: { key: keyOf(row) }, onclick: () => this.#onPick(row) }, element("i", { class: `swatch ${kind}` }), ` ${name}`);
  }

  #mark(row) {
    const key = keyOf(row);
    return element("input", {
      type: "checkbox", "aria-label": `What if ${nameOf(row)} were removed`, checked: this.#marked.has(key),
      onchange: (event) => {
        if (event.target.checked) this.#marked.add(key);
        else this.#marked.delete(key);
        this.#answer();
      },
    });
  }

  #draw() {
    const wanted = this.#filter.value.toLowerCase();
    const found = this.#rows.filter((row) => !wanted || `${row.names.join("\n")}\n${row.content_digest}\n${row.owner}`.toLowerCase().includes(wanted));
    this.table.show(found);
    setText(this.#count, found.length === this.#rows.length ? plural(found.length, "checkpoint") : `${number(found.length)} of ${plural(this.#rows.length, "checkpoint")}`);
    this.#answer();
  }

  /** Says what the marked checkpoints would free, and what has to go for the bytes that are needed. */
  #answer() {
    const marked = this.#rows.filter((row) => this.#marked.has(keyOf(row)));
    this.#sum.classList.toggle("hint", marked.length === 0);
    setText(this.#sum, marked.length ? this.#removed(marked) : "Tick checkpoints to see what their removal would free, together.");
    const needed = parseSize(this.#needed.value);
    const device = this.#stats.devices.find(({ uuid }) => uuid === this.#device.value);
    const groups = device && this.#groupsOf(device.uuid);
    let text = "Enter a size, such as 14 GiB; what the new checkpoint shares with those that are here counts less.";
    if (this.#needed.value.trim() && needed === null) text = "This is no size: write 14 GiB or 800 MiB.";
    else if (needed !== null && device?.absence) text = "The device is absent, nothing can be loaded there.";
    else if (needed !== null && !groups) text = "There is no map of the device, from which this is worked out.";
    else if (needed !== null) text = this.#roomFor(needed, device, groups);
    this.#room.classList.toggle("hint", needed === null);
    setText(this.#room, text);
  }

  #removed(marked) {
    let bytes = 0;
    for (const { uuid } of this.#stats.devices) {
      const gone = new Set(marked.filter(({ device }) => device === uuid).map((row) => row.content_digest));
      const groups = gone.size ? this.#groupsOf(uuid) : [];
      if (groups === null) return "There is no map of the device, from which this is worked out.";
      bytes += freed(groups, gone);
    }
    const alone = marked.reduce((sum, row) => sum + row.exclusive_bytes, 0);
    const held = marked.filter(({ leases }) => leases > 0);
    const more = bytes > alone ? `, ${size(bytes - alone)} of it shared only between them` : "";
    const first = held.length ? ` ${held.map(nameOf).join(", ")} cannot be removed while processes hold ${held.length === 1 ? "it" : "them"}.` : "";
    return `Without ${plural(marked.length, "checkpoint")}: ${size(bytes)} less${more}.${first}`;
  }

  #roomFor(needed, device, groups) {
    const on = this.#rows.filter((row) => row.device === device.uuid);
    const answer = roomFor(needed, device, on, groups);
    if (needed > device.budget_bytes) return `${size(needed)} are more than the whole budget, ${size(device.budget_bytes)}.`;
    if (answer.missing === 0) return `Nothing: ${size(answer.room)} can be had at once.`;
    const going = answer.evicted.map((row) => `${nameOf(row)} (${size(row.exclusive_bytes)} only here, used ${ago(row.last_used_at)})`).join(", ");
    const short = `${size(answer.room)} can be had at once; ${size(answer.missing)} are missing.`;
    if (answer.enough) return `${short} Least recently used first, this has to go: ${going}. It gives back ${size(answer.gives)}; a load evicts it by itself.`;
    const kept = answer.kept.map((row) => `${nameOf(row)} (${[row.pinned ? "pinned" : "", row.leases ? plural(row.leases, "lease") : ""].filter(Boolean).join(", ")})`).join(", ");
    return `${short} Everything idle gives back ${size(answer.gives)}, which is not enough. Unpin, or end the holders of: ${kept || "nothing"}.`;
  }
}

function stateOf(row) {
  return row.pinned && row.state === "resident" ? "pinned" : row.state;
}
