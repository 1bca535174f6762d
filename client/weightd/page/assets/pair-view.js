// The part of the report that compares two checkpoints: what they share by component, and which tensors differ.

import { element, plainTable } from "weightd/dom.js";
import { number, percent, plural, printable, size } from "weightd/format.js";
import { section } from "weightd/parts.js";

const MOST_LISTED = 200; // names of tensors

/** Two choices of a checkpoint, and below them what the two have in common. */
export class PairView {
  #report;
  #pairs = new Map();
  #differences = new Map();
  #one;
  #other;
  #answer = element("div", { "aria-live": "polite" });

  constructor(report) {
    this.#report = report;
    for (const pair of report.pairs) this.#pairs.set(keyOf(pair.checkpoints), pair);
    for (const found of report.differences ?? []) this.#differences.set(keyOf(found.checkpoints), found);
    const names = report.checkpoints.map(({ name }) => name);
    const choice = () => element("select", { onchange: () => this.#show() }, names.map((name) => element("option", { value: name }, printable(name))));
    this.#one = choice();
    this.#other = choice();
    const first = report.pairs[0]?.checkpoints ?? names;
    this.#one.value = first[0];
    this.#other.value = first[1] ?? first[0];
    this.node = section("Would these two share?",
      element("p", { class: "choices" }, element("label", {}, "Compare ", this.#one), element("label", {}, " with ", this.#other)), this.#answer);
    this.#show();
  }

  /** Chooses two checkpoints by name, or one and its best partner, and brings the comparison into view. */
  choose(one, other) {
    const best = this.#report.pairs.find(({ checkpoints }) => checkpoints.includes(one))?.checkpoints.find((name) => name !== one);
    this.#one.value = one;
    this.#other.value = other ?? best ?? this.#other.value;
    this.#show();
    this.node.scrollIntoView({ block: "nearest" });
    this.#one.focus({ preventScroll: true });
  }

  #show() {
    const names = [this.#one.value, this.#other.value];
    this.#answer.replaceChildren(...(names[0] === names[1] ? [element("p", {}, "Choose two.")] : this.#compared(names)));
  }

  #compared(names) {
    const totals = names.map((name) => this.#report.checkpoints.find((found) => found.name === name).total_bytes);
    const pair = this.#pairs.get(keyOf(names));
    const found = this.#differences.get(keyOf(names));
    const most = this.#report.at_most ? "at most " : "";
    const unlisted = this.#report.pairs_left_out ? "They are not among the pairs of this report, which has those with most in common." : "They share nothing.";
    const sentence = pair
      ? `They share ${most}${size(pair.shared_bytes)}: ${percent(pair.shared_bytes / totals[0])} of ${printable(names[0])}, ${percent(pair.shared_bytes / totals[1])} of ${printable(names[1])}.`
      : unlisted;
    return [element("p", { class: "answer" }, sentence), pair ? this.#parts(pair, names) : null, found ? this.#differing(found, names) : null].filter(Boolean);
  }

  #parts(pair, names) {
    const turned = pair.checkpoints[0] !== names[0];
    const rows = pair.parts.filter(({ components }) => components.some(Boolean)).map(({ components, shared_bytes: bytes }) => {
      const [one, other] = turned ? [components[1], components[0]] : components;
      return [{ value: printable(one) || "–", header: true }, printable(other) || "–", { value: size(bytes), class: "number" }];
    });
    if (rows.length === 0) return null;
    return plainTable("What the two share, by component", [`Of ${printable(names[0])}`, `Of ${printable(names[1])}`, { value: "Shared", class: "number" }], rows);
  }

  #differing(found, names) {
    const turned = found.checkpoints[0] !== names[0];
    const only = (found.only ?? [[], []]).map((list, at) => ({ list, count: found.only_tensors?.[at] ?? list.length }));
    if (turned) only.reverse();
    const rows = (found.differing ?? []).slice(0, MOST_LISTED).map((row) => [
      { value: printable(row.name), header: true, class: "path" }, { value: number(row.count), class: "number" }, { value: size(row.bytes), class: "number" },
    ]);
    const equal = this.#report.at_most ? "may be equal" : found.equal_tensors === 1 ? "is equal" : "are equal";
    return element("div", {},
      element("p", {}, `Of the tensors that both have, ${number(found.equal_tensors)} ${equal} and ${number(found.differing_tensors)} differ (${size(found.differing_bytes)}).`),
      rows.length ? element("details", { open: true }, element("summary", {}, "Tensors that differ"), plainTable("Tensors that differ", ["Tensor", { value: "Number", class: "number" }, { value: "Bytes", class: "number" }], rows)) : null,
      ...only.map(({ list, count }, at) => (count
        ? element("details", {}, element("summary", {}, `${plural(count, "tensor")} only in ${printable(names[at])}`), element("p", { class: "path" }, list.slice(0, MOST_LISTED).map(named).join(", ")))
        : null)));
  }
}

/** A tensor's name; of several that differ in numbers, the name they have in common and how many they are. */
function named({ name, count }) {
  return count === 1 ? printable(name) : `${printable(name)} (${number(count)})`;
}

/** A key for two names in either order. */
function keyOf(names) {
  return JSON.stringify([...names].sort());
}
