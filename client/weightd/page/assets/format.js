// Formats values for people: sizes as the command writes them, times, counts, names.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const FOUR_DIGITS = 999.5; // what rounds to 1,000 is written in the next unit

/** Writes bytes with three digits: `0 B`, `24.0 KiB`, `199 MiB`, `18.9 GiB`. The same as weightd._sizes.size. */
export function size(bytes) {
  if (bytes < FOUR_DIGITS) return `${bytes} B`;
  let value = bytes;
  let unit = 0;
  while (value >= FOUR_DIGITS && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = value < 0.9995 ? 3 : value < 9.995 ? 2 : value < 99.95 ? 1 : 0;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

/** Reads what people write for a size: `14 GiB`, `1.5g`, `800M`. Units are powers of 1,024. Returns bytes, or null. */
export function parseSize(text) {
  const match = /^\s*(\d+(?:[.,]\d+)?)\s*(?:([kmgt])(?:i?b)?|b)?\s*$/i.exec(text);
  if (!match) return null;
  const power = match[2] ? "kmgt".indexOf(match[2].toLowerCase()) + 1 : 0;
  return Math.round(Number(match[1].replace(",", ".")) * 1024 ** power);
}

/** `3 checkpoints`, `1 checkpoint`, `1,024 tensors`. */
export function plural(count, word) {
  return `${number(count)} ${word}${count === 1 ? "" : "s"}`;
}

/** A whole number with commas between thousands. */
export function number(count) {
  return String(Math.round(count)).replace(/\B(?=(\d{3})+$)/g, ",");
}

/** `92 %`, `6.5 %`, `<0.1 %`, `0 %`, of a fraction. */
export function percent(fraction) {
  const value = fraction * 100;
  if (value === 0) return "0 %";
  if (value < 0.1) return "<0.1 %";
  if (value < 9.95) return `${value.toFixed(1)} %`;
  return value > 99.9 && value < 100 ? ">99.9 %" : `${value.toFixed(0)} %`;
}

const AGES = [[86400 * 365, "year"], [86400 * 30, "month"], [86400, "day"], [3600, "hour"], [60, "minute"], [1, "second"]];

/** `3 minutes ago`, of a time as ISO 8601; a dash for none. */
export function ago(moment, now = Date.now()) {
  if (!moment) return "–";
  const seconds = Math.floor((now - Date.parse(moment)) / 1000);
  for (const [length, unit] of AGES) {
    if (seconds >= length) return `${plural(Math.floor(seconds / length), unit)} ago`;
  }
  return "just now";
}

/** `1 min 20 s`, `45 s`, of seconds. */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

/** The time of day, of a time as ISO 8601. */
export function clock(moment) {
  const date = new Date(moment);
  return [date.getHours(), date.getMinutes(), date.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

/** Text on one line: characters that control, format or do not exist are written as escapes. */
export function printable(text) {
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (found) => `\\u{${found.codePointAt(0).toString(16)}}`);
}

/** The first 12 hex digits of a content digest. */
export function shortDigest(digest) {
  return digest.replace(/^sha256:/, "").slice(0, 12);
}

/** A name that is short where it is a path: its last two parts. Elsewhere the page has all of it. */
export function brief(name) {
  return printable(name.replace(/^\/.*(?=(\/[^/]+){2}$)/, "…"));
}

/** What to call a checkpoint: its name, else its digest. */
export function called(name, digest) {
  return name ? printable(name) : shortDigest(digest);
}
