// The report of `weightd plan --html`: what sharing would save, between which checkpoints, and what fits a budget.

import { drawBar } from "weightd/bars.js";
import { element, plainTable } from "weightd/dom.js";
import { number, percent, plural, printable, size } from "weightd/format.js";
import { SharingMatrix } from "weightd/matrix.js";
import { PairView } from "weightd/pair-view.js";
import { RowWindow } from "weightd/row-window.js";
import { section, tile } from "weightd/parts.js";

const text = document.getElementById("report").textContent;
const folder = commonFolder(JSON.parse(text).checkpoints.map(({ name }) => name));
const paths = new Set(folder ? JSON.parse(text).checkpoints.map(({ name }) => name) : []);
const report = JSON.parse(text, (_, value) => (paths.has(value) ? value.slice(folder.length) : value));
const atMost = report.at_most ? "at most " : "";
const atLeast = report.at_most ? "at least " : "";
const MOST_NODES = 200;
const figure = (value) => ({ value, class: "number" });

/** The folder that all names have in common, with its slash at the end; empty unless all are absolute paths. */
function commonFolder(names) {
  if (names.length < 2 || !names.every((name) => name.startsWith("/"))) return "";
  let common = names[0];
  for (const name of names) while (!name.startsWith(common)) common = common.slice(0, -1);
  return common.slice(0, common.lastIndexOf("/") + 1);
}

function head() {
  const made = report.made_at ? ` · ${new Date(report.made_at).toLocaleString()}` : "";
  return [
    element("h1", {}, printable(report.title ?? "What sharing would save")),
    element("p", { class: "hint" }, `weightd plan${made}`),
    folder ? element("p", { class: "hint path" }, `Names are below ${printable(folder)}`) : null,
    report.at_most
      ? element("p", { class: "notice" }, "Read from headers only: names, types and shapes, not bytes. Every shared and saved figure is the most that it can be.")
      : null,
  ];
}

function totals() {
  const bar = element("div");
  drawBar(bar, "Bytes of all checkpoints", [
    { label: "unique, in memory once", bytes: report.unique_bytes, kind: "held" },
    { label: report.at_most ? "saved, at most" : "saved", bytes: report.saved_bytes, kind: "saved" },
  ], report.total_bytes);
  return [
    element("div", { class: "tiles" },
      tile("Checkpoints", number(report.checkpoints.length)),
      tile("Together", size(report.total_bytes)),
      tile("In memory once", `${atLeast}${size(report.unique_bytes)}`),
      tile("Saved", `${atMost}${size(report.saved_bytes)}`, percent(report.saved_ratio))),
    bar,
  ];
}

function budget() {
  const { budget_bytes: whole, order } = report.budget;
  const fitting = order.filter(({ fits }) => fits).length;
  const bar = element("div");
  const used = Math.max(0, ...order.filter(({ fits }) => fits).map(({ total_bytes: sum }) => sum));
  drawBar(bar, "The budget", [
    { label: "used", bytes: used, kind: "held" },
    { label: "free", bytes: whole - used, kind: "free" },
  ], whole);
  const sizes = new Map(report.checkpoints.map(({ name, total_bytes: bytes }) => [name, bytes]));
  const why = (name, remove) => (remove.length ? `: remove ${remove.map(printable).join(", ")}` : sizes.get(name) > whole ? ": larger than the budget" : "");
  const rows = order.map(({ name, added_bytes: added, total_bytes: sum, fits, remove = [] }) => [
    { value: printable(name), header: true, class: "path" }, figure(size(added)), { value: size(sum), class: "number spare" },
    { value: fits ? "yes" : `no${why(name, remove)}`, class: "path" },
  ]);
  return section(`What fits ${size(whole)}`,
    element("p", { class: "hint" }, `${fitting} of ${plural(order.length, "checkpoint")} fit, in this order: next is always the one that adds the fewest bytes to those before it.`),
    bar, plainTable("What fits the budget", ["Checkpoint", { value: "Adds", class: "number" }, { value: "Sum", class: "number spare" }, "Fits"], rows));
}

function nodes() {
  const left = report.nodes.length - MOST_NODES;
  const drawn = report.nodes.slice(0, MOST_NODES).map(({ name, checkpoints: held, used_bytes: used, alone_bytes: alone, budget_bytes: whole }) => {
    const bar = element("div");
    drawBar(bar, printable(name), [
      { label: "of one checkpoint", bytes: alone, kind: "held" },
      { label: "shared there", bytes: used - alone, kind: "saved" },
      { label: "free", bytes: whole - used, kind: "free" },
    ], whole);
    return [
      element("h3", {}, printable(name)),
      element("p", { class: "hint path" }, held.length ? `${held.map(printable).join(", ")}: ${size(used)} of ${size(whole)}` : `Empty: ${size(whole)}`),
      bar,
    ];
  });
  return section("What each node holds",
    element("p", { class: "hint" }, "What several checkpoints of a node share lies there once."), ...drawn.flat(),
    left > 0 ? element("p", { class: "hint" }, `${plural(left, "more node")}: not drawn.`) : null);
}

function checkpoints(pick) {
  const columns = [
    { key: "name", title: "Checkpoint", value: ({ name }) => printable(name), sort: ({ name }) => name, class: "grow", make: ({ name }) =>
      element("button", { class: "link", title: printable(name), data: { key: name }, onclick: () => pick(name) }, printable(name)) },
    { key: "tensors", title: "Tensors", value: ({ tensors }) => number(tensors), sort: ({ tensors }) => tensors, class: "number spare" },
    { key: "size", title: "Size", value: ({ total_bytes: bytes }) => size(bytes), sort: ({ total_bytes: bytes }) => bytes, class: "number" },
    { key: "shared", title: `Shared${report.at_most ? " (at most)" : ""}`, value: ({ shared_bytes: bytes }) => size(bytes), sort: ({ shared_bytes: bytes }) => bytes, class: "number" },
    { key: "alone", title: `Only here${report.at_most ? " (at least)" : ""}`, value: (row) => size(alone(row)), sort: alone, class: "number" },
    { key: "with", title: "With", value: ({ shared_with: others }) => (others ? plural(others, "other") : "–"), sort: ({ shared_with: others }) => others, class: "spare" },
  ];
  const table = new RowWindow("Checkpoints", columns, ({ name }) => name, { order: { key: "size", down: true } });
  table.show(report.checkpoints);
  return section("Checkpoints",
    element("p", { class: "hint" }, "“Only here” is what leaving out the checkpoint alone would save: no other one has these bytes."), table.node, components());
}

const alone = ({ exclusive_bytes: exclusive, total_bytes: total, shared_bytes: shared }) => exclusive ?? total - shared;

function components() {
  const rows = report.checkpoints.flatMap(({ name, components: parts }) => parts.filter((part) => part.name).map((part) => [
    { value: printable(part.name), header: true }, printable(name), figure(number(part.tensors)), figure(size(part.total_bytes)), figure(size(part.shared_bytes)),
  ]));
  if (rows.length === 0) return null;
  const heads = ["Component", "Of", { value: "Tensors", class: "number" }, { value: "Size", class: "number" }, { value: "Shared", class: "number" }];
  return element("details", {}, element("summary", {}, `${plural(rows.length, "component")}`), plainTable("Components", heads, rows));
}

function matrix(pick) {
  const drawn = new SharingMatrix(pick, atMost);
  drawn.show(
    report.checkpoints.map((row) => ({ key: row.name, name: row.name, bytes: row.total_bytes, alone: alone(row) })),
    report.pairs.map(({ checkpoints: [one, other], shared_bytes: bytes }) => ({ one, other, bytes })),
  );
  const left = report.pairs_left_out ? element("p", { class: "hint" }, `${plural(report.pairs_left_out, "pair")} with less in common are left out.`) : null;
  return section("Who shares with whom",
    element("p", { class: "hint" }, "A cell says how much of the row’s bytes the column’s checkpoint has as well. Choose one for what the two share, and what differs."), drawn.node, left);
}

function nearDuplicates() {
  const rows = report.near_duplicates.map((pair) => [
    { value: printable(pair.a), header: true }, printable(pair.b), figure(percent(pair.equal_elements)), figure(percent(pair.delta_ratio)), figure(size(pair.sampled_bytes)),
  ]);
  const heads = ["Checkpoint", "And", { value: "Elements equal", class: "number" }, { value: "Difference, compressed", class: "number" }, { value: "Sampled", class: "number" }];
  return section("Near duplicates",
    element("p", { class: "hint" }, "Tensors of these pairs have equal names, types and shapes, and partly equal elements. weightd shares whole tensors only: none of this is saved by weightd today. The difference is lossless, as a share of the checkpoint’s size."),
    rows.length ? plainTable("Near duplicates", heads, rows) : element("p", {}, "None."),
    report.near_duplicates_left_out ? element("p", { class: "hint" }, `${plural(report.near_duplicates_left_out, "pair")} were not compared.`) : null);
}

function skipped() {
  const rows = report.skipped.map(({ path, reason }) => [{ value: printable(path), header: true, class: "path" }, printable(reason)]);
  return section("Skipped", plainTable("Files and folders that were skipped", ["Path", "Why"], rows));
}

const view = new PairView(report);
const pick = (one, other) => view.choose(one, other);
document.querySelector("main").append(...[
  ...head(), ...totals(),
  report.budget ? budget() : null,
  report.nodes ? nodes() : null,
  checkpoints(pick),
  report.checkpoints.length > 1 ? matrix(pick) : null,
  report.checkpoints.length > 1 ? view.node : null,
  report.near_duplicates ? nearDuplicates() : null,
  report.skipped?.length ? skipped() : null,
  report.notes?.length ? section("Notes", element("ul", {}, report.notes.map((note) => element("li", {}, printable(note))))) : null,
].filter(Boolean));
