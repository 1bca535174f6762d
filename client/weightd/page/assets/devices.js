// The part of the page that shows devices: what the budget is used for, and the memory map.

import { drawBar } from "weightd/bars.js";
import { element, redraw, setText } from "weightd/dom.js";
import { brief, called, printable, size } from "weightd/format.js";
import { MemoryMap } from "weightd/memory-map.js";
import { section } from "weightd/parts.js";

/** The parts of a device's budget, as `drawBar` takes them. What is both pinned and leased counts as leased, as in `weightd top`. */
export function budgetParts(device) {
  const leased = Math.min(device.leased_bytes, device.live_bytes);
  const pinned = Math.min(device.pinned_bytes, Math.max(device.live_bytes - leased - device.evictable_bytes, 0));
  const idle = device.live_bytes - leased - pinned;
  return [
    { label: "pinned only", bytes: pinned, kind: "pinned" },
    { label: "held by processes", bytes: leased, kind: "leased" },
    { label: "idle, may be evicted", bytes: idle, kind: "idle" },
    { label: "being loaded", bytes: device.in_flight_bytes, kind: "in_flight" },
    { label: "holes", bytes: device.hole_bytes, kind: "hole" },
    { label: "pool", bytes: device.reusable_bytes - device.hole_bytes, kind: "pool" },
    { label: "free", bytes: device.free_bytes, kind: "free" },
  ];
}

/** All devices. `colours` has the colour of each checkpoint, `onPick` is called with the digests and the device. */
export class Devices {
  #colours;
  #onPick;
  #shown = new Map();

  constructor(colours, onPick) {
    this.#colours = colours;
    this.#onPick = onPick;
    this.node = element("div");
  }

  /** Shows the devices of the statistics; `maps` has what is known of each one's map, by UUID. */
  show(devices, maps) {
    for (const [uuid, parts] of this.#shown) {
      if (devices.some((device) => device.uuid === uuid)) continue;
      parts.node.remove();
      this.#shown.delete(uuid);
    }
    for (const device of devices) {
      if (!this.#shown.has(device.uuid)) this.#shown.set(device.uuid, this.#make(device));
      this.#update(device, this.#shown.get(device.uuid), maps.get(device.uuid));
    }
  }

  /** The map of a device; undefined where there is none. */
  map(uuid) {
    return this.#shown.get(uuid)?.map;
  }

  /** Marks checkpoints of a device, a Set of digests, and none of other devices. */
  mark(uuid, digests) {
    for (const [each, { map }] of this.#shown) map.mark(each === uuid ? digests : new Set());
  }

  #make(device) {
    const map = new MemoryMap(this.#colours, (digests) => this.#onPick(digests, device.uuid));
    const parts = { map, bar: element("div"), legend: element("ul", { class: "legend", "aria-label": "Colours of checkpoints" }), elsewhere: element("p", { class: "hint" }), trouble: element("p", { class: "hint" }), budget: element("p") };
    const title = device.kind === "host" ? "Host memory" : `${printable(device.name)} (${printable(device.uuid.slice(0, 12))})`;
    parts.node = section(title, parts.budget, parts.bar, parts.elsewhere, parts.trouble, parts.legend, map.node);
    this.node.append(parts.node);
    return parts;
  }

  #update(device, parts, map) {
    setText(parts.budget, `${size(device.used_bytes)} of ${size(device.budget_bytes)} used`);
    drawBar(parts.bar, `What the budget of ${device.kind === "host" ? "host memory" : printable(device.name)} is used for`, budgetParts(device), device.budget_bytes);
    const elsewhere = device.device_free_bytes !== null && device.device_free_bytes < device.free_bytes;
    setText(parts.elsewhere, elsewhere ? `The device itself has ${size(device.device_free_bytes)} free: other processes use the rest.` : "");
    const missing = device.absence ? `The device is absent: ${device.absence}` : map === undefined ? "The map is being read." : map.missing ? `There is no map: ${map.missing}` : "";
    setText(parts.trouble, printable(missing));
    parts.trouble.hidden = missing === "";
    parts.map.node.hidden = missing !== "" || map.segments.length === 0;
    if (missing !== "") return;
    parts.map.show(map);
    this.#name(parts.legend, device.uuid, map);
  }

  #name(legend, uuid, map) {
    const present = new Set(map.checkpoints);
    const shown = this.#colours.keys().filter((digest) => present.has(digest));
    const rest = map.checkpoints.length - shown.length;
    redraw(legend, JSON.stringify([shown.map((digest) => [digest, map.names[digest], this.#colours.variable(digest)]), rest]), () => [
      ...shown.map((digest) => element("li", {},
        element("i", { class: `swatch ${this.#colours.variable(digest).slice(2)}` }),
        element("button", { class: "link", data: { key: digest }, title: called(map.names[digest], digest), onclick: () => this.#onPick([digest], uuid) }, brief(called(map.names[digest], digest))))),
      rest > 0 ? element("li", {}, element("i", { class: "swatch colour-others" }), `${rest} more`) : null,
    ]);
  }
}
