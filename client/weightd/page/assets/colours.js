// Gives checkpoints colours that differ, also for the colour-blind, and keeps them while the checkpoints stay.

export const PLENTY = 8; // colours that people can tell apart; checkpoints beyond have one in common
export const OTHERS = "--colour-others";

/** Assigns colours by key: the most important keys first. A key keeps its colour until it is gone. */
export class Colours {
  #slots = new Map();

  /** Says which keys there are now, in the order of importance. Returns whether any colour changed. */
  assign(keys) {
    const before = JSON.stringify([...this.#slots]);
    const wanted = new Set(keys);
    for (const key of this.#slots.keys()) if (!wanted.has(key)) this.#slots.delete(key);
    const taken = new Set(this.#slots.values());
    const free = Array.from({ length: PLENTY }, (_, slot) => slot).filter((slot) => !taken.has(slot));
    for (const key of wanted) {
      if (free.length === 0) break;
      if (!this.#slots.has(key)) this.#slots.set(key, free.shift());
    }
    return JSON.stringify([...this.#slots]) !== before;
  }

  /** The name of the CSS variable that has the colour of a key. */
  variable(key) {
    return this.#slots.has(key) ? `--colour-${this.#slots.get(key)}` : OTHERS;
  }

  /** Keys that have a colour of their own, in the order of the colours. */
  keys() {
    return [...this.#slots].sort((one, other) => one[1] - other[1]).map(([key]) => key);
  }
}

/** The values of CSS variables now: they differ between dark and light. */
export function valuesOf(names) {
  const style = getComputedStyle(document.documentElement);
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(name).trim()]));
}

/** Stripes of two or three colours, as a canvas pattern. */
export function stripes(context, colours, ratio) {
  const width = 4 * ratio;
  const side = width * colours.length;
  const tile = document.createElement("canvas");
  tile.width = tile.height = side;
  const drawing = tile.getContext("2d");
  colours.forEach((colour, at) => {
    drawing.strokeStyle = colour;
    drawing.lineWidth = width / Math.SQRT2 + 0.5;
    for (const shift of [-side, 0, side]) {
      const begin = at * width + width / 2 + shift;
      drawing.beginPath();
      drawing.moveTo(begin - side, -side);
      drawing.lineTo(begin + 2 * side, 2 * side);
      drawing.stroke();
    }
  });
  return context.createPattern(tile, "repeat");
}
