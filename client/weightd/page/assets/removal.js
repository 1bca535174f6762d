// Works out what to remove to make room: from the sets of checkpoints that use the same bytes. Pure.

import { freed } from "weightd/map-layout.js";

/**
 * Answers what has to go for `needed` bytes on a device. `device` are its statistics, `checkpoints` those on it,
 * `groups` its bytes by users. Returns {room, missing, evicted, enough, kept}: bytes that a load can have at once, bytes
 * that are missing, the checkpoints to go (least recently used first, none without need), whether they are enough, and
 * those that something keeps.
 */
export function roomFor(needed, device, checkpoints, groups) {
  const room = device.free_bytes + device.reusable_bytes;
  const missing = Math.max(0, needed - room);
  const resident = checkpoints.filter(({ state }) => state === "resident");
  const kept = resident.filter(({ pinned, leases }) => pinned || leases > 0);
  const idle = resident.filter((each) => !kept.includes(each)).sort((one, other) => compare(used(one), used(other)));
  const gone = new Set();
  const gives = () => freed(groups, gone);
  for (const each of idle) {
    if (gives() >= missing) break;
    gone.add(each.content_digest);
  }
  const enough = gives() >= missing;
  for (const each of idle.filter(({ content_digest: digest }) => gone.has(digest)).reverse()) {
    gone.delete(each.content_digest);
    if (enough ? gives() < missing : true) gone.add(each.content_digest);
  }
  return { room, missing, evicted: idle.filter(({ content_digest: digest }) => gone.has(digest)), gives: gives(), enough, kept };
}

function used({ last_used_at: last, loaded_at: loaded }) {
  return last ?? loaded ?? "";
}

function compare(one, other) {
  return one < other ? -1 : one > other ? 1 : 0;
}
