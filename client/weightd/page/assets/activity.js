// The parts of the page that show what goes on: loads under way, who holds what, and the last events.

import { progressBar } from "weightd/bars.js";
import { element, plainTable, redraw } from "weightd/dom.js";
import { ago, called, clock, duration, percent, plural, printable, size } from "weightd/format.js";
import { section } from "weightd/parts.js";
import { RowWindow } from "weightd/row-window.js";

/** Loads under way; hidden while there are none. */
export class Loads {
  #rows = element("div");

  constructor() {
    this.node = section("Loads under way", this.#rows);
    this.node.hidden = true;
  }

  /** Shows loads as the daemon lists them. */
  show(loads) {
    this.node.hidden = loads.length === 0;
    redraw(this.#rows, JSON.stringify(loads), () => plainTable("Loads under way", ["Load", "Progress", { value: "Done", class: "number" }, { value: "Left", class: "number" }, { value: "For", class: "spare" }], loads.map((load) => this.#row(load))));
  }

  #row(load) {
    const name = printable(load.names.join(", ") || load.reference);
    const { progress } = load;
    const left = load.remaining_seconds === null ? "" : duration(load.remaining_seconds);
    const rate = load.bytes_per_second ? `, ${size(Math.round(load.bytes_per_second))}/s` : "";
    const head = element("span", {}, name, element("small", {}, progress ? ` ${progress.phase}${rate}` : ""));
    return [
      { value: head, header: true, class: "path" },
      progress ? progressBar(`${name}: ${progress.phase}`, progress.done_bytes, progress.total_bytes) : "waits for its turn",
      { value: progress ? `${size(progress.done_bytes)} of ${size(progress.total_bytes)}, ${percent(progress.done_bytes / Math.max(1, progress.total_bytes))}` : "", class: "number wrap" },
      { value: left, class: "number" },
      { value: printable(load.command || load.user), class: "path spare" },
    ];
  }
}

/** Who holds what: a row a lease. `onPick` is called with a checkpoint's name or digest, and a device. */
export class Holders {
  #table;
  #none = element("p", {}, "No process holds a checkpoint.");

  constructor(onPick) {
    this.#table = new RowWindow("Holders", [
      { key: "pid", title: "Process", value: ({ pid }) => (pid === null ? "unknown" : String(pid)), sort: ({ pid }) => pid ?? 0 },
      { key: "checkpoint", title: "Checkpoint", class: "grow", sort: ({ checkpoint }) => checkpoint, value: ({ checkpoint }) => called(named(checkpoint), checkpoint), make: (lease) =>
        element("button", { class: "link", title: called(named(lease.checkpoint), lease.checkpoint), data: { key: String(lease.lease) }, onclick: () => onPick(lease.checkpoint, lease.device) }, called(named(lease.checkpoint), lease.checkpoint)) },
      { key: "bytes", title: "Size", class: "number", value: ({ bytes }) => size(bytes), sort: ({ bytes }) => bytes },
      { key: "user", title: "User", class: "spare", value: ({ user }) => printable(user), sort: ({ user }) => user },
      { key: "since", title: "Since", class: "spare", value: ({ since, waiting }) => (waiting ? "kept for it" : ago(since)), sort: ({ since }) => since },
      { key: "command", title: "Command", class: "grow spare", value: ({ command }) => printable(command), sort: ({ command }) => command },
    ], ({ lease }) => String(lease), { order: { key: "since", down: true }, rows: 8 });
    this.node = section("Who holds what", this.#none, this.#table.node);
  }

  /** Shows leases as the daemon lists them. */
  show(leases) {
    this.#none.hidden = leases.length > 0;
    this.#table.node.hidden = leases.length === 0;
    this.#table.show(leases);
  }
}

/** A lease's checkpoint, unless it is a digest, which is written shorter. */
function named(checkpoint) {
  return checkpoint.startsWith("sha256:") ? "" : checkpoint;
}

const SAID = {
  load_begun: "load begun", load_ended: "load ended", load_answered: "was here already", sealed: "loaded", attached: "attached", detached: "detached",
  evicted: "evicted", named: "named", unnamed: "name removed", device_lost: "device lost", device_absent: "device absent",
  device_back: "device back", draining: "draining", drained: "drained", undrained: "serves again",
};

/** The last events, the latest first. */
export class Events {
  #list = element("ol", { class: "events" });

  constructor() {
    this.node = section("Last events", this.#list);
    this.#list.tabIndex = 0;
  }

  /** Shows events as the daemon lists them, oldest first. */
  show(events) {
    redraw(this.#list, JSON.stringify(events), () => [...events].reverse().map((event) => element("li", { class: event.kind },
      element("time", { datetime: event.time }, clock(event.time)), element("b", {}, SAID[event.kind] ?? event.kind), element("span", {}, this.#said(event)))));
  }

  #said(event) {
    const parts = [
      event.names.map(printable).join(", ") || (event.content_digest ? called("", event.content_digest) : ""),
      event.total_bytes ? size(event.total_bytes) : "",
      event.kind === "evicted" || (event.kind === "load_ended" && event.reason !== "OK") ? printable([event.reason, event.message].filter(Boolean).join(": ")) : "",
      event.kind === "load_ended" && event.evicted.length + event.evicted_others ? `evicted ${plural(event.evicted.length + event.evicted_others, "checkpoint")}` : "",
      event.kind.startsWith("device") ? printable(`${event.device} ${event.message}`) : "",
      event.command ? printable(event.pid === null ? event.command : `${event.command} (${event.pid})`) : "",
    ];
    return parts.filter(Boolean).join(" · ");
  }
}
