// Where the segments of a device go on a memory map, and what lies at a point of it. Pure: no drawing.

export const LABEL = 16; // pixels above a segment, for its number and size
export const BAR = 30; // pixels of a segment's height
const GAP = 4; // pixels between segments of a row
const ROW_GAP = 8; // pixels between rows
const LEAST = 5; // pixels of the smallest segment's width
const ROWS = 5; // rows that a device takes, if its segments are alike

/**
 * Places segments in rows, in their order, each a box as wide as its bytes; a row is filled by some of the largest.
 * `sizes` are bytes, `width` is pixels. Returns {boxes: [{x, y, width}], height}.
 */
export function placed(sizes, width) {
  const total = sizes.reduce((sum, bytes) => sum + bytes, 0);
  const largest = Math.max(...sizes, 1);
  const inRow = Math.ceil(total / (largest * ROWS));
  const scale = (width - (inRow - 1) * GAP) / Math.max(inRow * largest, 1);
  const boxes = [];
  let x = 0;
  let y = 0;
  for (const bytes of sizes) {
    const wide = Math.min(width, Math.max(LEAST, bytes * scale));
    if (x > 0 && x + wide > width + 0.5) {
      x = 0;
      y += LABEL + BAR + ROW_GAP;
    }
    boxes.push({ x, y: y + LABEL, width: wide });
    x += wide + GAP;
  }
  return { boxes, height: sizes.length ? y + LABEL + BAR : 0 };
}

/**
 * Reads a map as the server or a report gives it, in columns, into segments with their extents.
 * Returns [{segment, size, extents: [{offset, length, kind, blobs, users: [digest], others, load}]}].
 */
export function segmentsOf(map) {
  const segments = map.segments.map(([segment, bytes]) => ({ segment, size: bytes, extents: [] }));
  for (const [at, offset, length, kind, blobs, users, load] of map.extents) {
    const [checkpoints, others] = users === null ? [[], 0] : map.users[users];
    const digests = checkpoints.map((index) => map.checkpoints[index]);
    segments[at].extents.push({ offset, length, kind, blobs, users: digests, others, load });
  }
  return segments;
}

/** The segment and extent at a point, in pixels; null where there is none. */
export function under(segments, layout, x, y) {
  for (const [at, box] of layout.boxes.entries()) {
    if (x < box.x || x > box.x + box.width || y < box.y || y > box.y + BAR) continue;
    const segment = segments[at];
    const offset = ((x - box.x) / box.width) * segment.size;
    const extent = segment.extents.find((each) => offset < each.offset + each.length);
    return extent ? { segment, extent } : null;
  }
  return null;
}

/** Sums of bytes by the set of checkpoints that use them: [{users: [digest], others, bytes}]. */
export function groupsOf(segments) {
  const groups = new Map();
  for (const { extents } of segments) {
    for (const { kind, users, others, length } of extents) {
      if (kind !== "blobs") continue;
      const key = JSON.stringify([users, others]);
      const group = groups.get(key);
      if (group) group.bytes += length;
      else groups.set(key, { users, others, bytes: length });
    }
  }
  return [...groups.values()];
}

/** Bytes of blobs that are freed when all of `gone`, a Set of digests, have gone: those that nobody else uses. */
export function freed(groups, gone) {
  return groups
    .filter(({ users, others }) => others === 0 && users.every((digest) => gone.has(digest)))
    .reduce((sum, { bytes }) => sum + bytes, 0);
}
