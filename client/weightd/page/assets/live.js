// The page of `weightd web`: takes what has changed, and has each part draw what it shows of that.

import { Events, Holders, Loads } from "weightd/activity.js";
import { Checkpoints, keyOf } from "weightd/checkpoints.js";
import { Colours } from "weightd/colours.js";
import { Connection } from "weightd/connection.js";
import { Detail } from "weightd/detail.js";
import { Devices } from "weightd/devices.js";
import { element, redraw, setText } from "weightd/dom.js";
import { number, percent, printable, size } from "weightd/format.js";
import { groupsOf } from "weightd/map-layout.js";
import { SharingMatrix } from "weightd/matrix.js";
import { section, tile } from "weightd/parts.js";

const AGES = 30000; // milliseconds between two drawings of "3 minutes ago"

const connection = new Connection();
const colours = new Colours();
const state = { daemon: null, stats: null, checkpoints: [], leases: [], loads: [], events: [], pairs: { pairs: [], more: false }, maps: new Map() };
const groups = new Map(); // of devices, made when asked for

const status = element("p", { class: "status", role: "status" });
const trouble = element("p", { class: "notice alarm", role: "alert", hidden: true });
const tiles = element("div", { class: "tiles" });
const loads = new Loads();
const devices = new Devices(colours, (digests, device) => pickDigest(digests.find((digest) => `${digest} ${device}` !== detail.key) ?? digests[0], device));
const checkpoints = new Checkpoints(colours, open, groupsOn);
const detail = new Detail((path, query) => connection.ask(path, query), pickDigest, close);
const matrix = new SharingMatrix((row) => open(state.checkpoints.find((each) => keyOf(each) === row)));
const matrixNote = element("p", { class: "hint" });
const holders = new Holders((checkpoint, device) => pickDigest(checkpoint, device));
const events = new Events();

document.querySelector("main").append(
  element("h1", {}, "weightd"), status, trouble, tiles, loads.node, devices.node, checkpoints.node, detail.node,
  section("Who shares with whom", matrixNote, matrix.node), holders.node, events.node);

/** Opens the checkpoint of a digest or a name. */
function pickDigest(reference, device) {
  const found = state.checkpoints.find((row) => row.device === device && (row.content_digest === reference || row.names.includes(reference)));
  if (found) open(found);
}

function open(row) {
  if (!row?.content_digest) return;
  detail.open(row);
  detail.show(state.checkpoints, state.leases);
  checkpoints.choose(keyOf(row));
  devices.mark(row.device, new Set([row.content_digest]));
}

function close() {
  detail.close();
  checkpoints.choose("");
  devices.mark("", new Set());
}

function groupsOn(device) {
  const map = devices.map(device);
  if (!map || !state.maps.get(device) || state.maps.get(device).missing) return null;
  if (!groups.has(device)) groups.set(device, groupsOf(map.segments));
  return groups.get(device);
}

/** Takes sections that have changed, by name. */
function take(sections) {
  for (const [name, value] of Object.entries(sections)) {
    if (name.startsWith("map ")) {
      state.maps.set(name.slice(4), value);
      groups.delete(name.slice(4));
    } else state[name] = value;
  }
  const changed = new Set(Object.keys(sections));
  const maps = [...changed].some((name) => name.startsWith("map "));
  if (changed.has("daemon")) showDaemon();
  if (state.stats === null) return;
  if (changed.has("checkpoints")) {
    const bySize = [...state.checkpoints].sort((one, other) => other.total_bytes - one.total_bytes);
    colours.assign(bySize.map((row) => row.content_digest).filter(Boolean));
  }
  if (changed.has("stats")) showTiles();
  if (changed.has("loads")) loads.show(state.loads.missing ? [] : state.loads);
  if (changed.has("stats") || changed.has("checkpoints") || maps) {
    devices.show(state.stats.devices, state.maps);
    checkpoints.show(state.checkpoints, state.stats);
  }
  if (changed.has("checkpoints") || changed.has("leases")) {
    detail.show(state.checkpoints, state.leases);
    holders.show(state.leases);
  }
  if (changed.has("checkpoints")) detail.refresh();
  if (changed.has("checkpoints") || changed.has("pairs")) showMatrix();
  if (changed.has("events")) events.show(state.events);
}

function showDaemon() {
  const { reachable, message, socket, version, pid } = state.daemon;
  if (reachable) setText(status, `${printable(socket)} · version ${printable(version)} · process ${pid} · ${state.daemon.state}`);
  document.body.classList.toggle("old", !reachable);
  say(reachable ? null : `The daemon is gone: what you see is old. This page comes back by itself when a daemon answers. (${printable(message)})`);
}

function say(sentence) {
  trouble.hidden = sentence === null;
  setText(trouble, sentence ?? "");
}

function showTiles() {
  const { stats } = state;
  const shown = [
    ["Resident", size(stats.resident_bytes), "each byte once"],
    ["Logical", size(stats.logical_bytes), "without sharing"],
    ["Saved", size(stats.saved_bytes), percent(stats.saved_ratio)],
    ["Checkpoints", number(stats.checkpoints), `${number(stats.evictions)} evicted so far`],
    ["Leases", number(stats.leases), ""],
  ];
  redraw(tiles, JSON.stringify(shown), () => shown.map(([label, value, more]) => tile(label, value, more)));
}

function showMatrix() {
  const { pairs, more, missing } = state.pairs;
  setText(matrixNote, missing ? printable(missing) : `A cell says how much of the row’s bytes the column’s checkpoint uses as well.${more ? ` Of more than ${number(pairs.length)} pairs those with most in common are known: a dot may also be less.` : ""}`);
  const several = state.stats.devices.length > 1;
  matrix.show(
    state.checkpoints.filter(({ state: each }) => each === "resident").map((row) => ({
      key: keyOf(row), name: `${row.names[0] ?? row.content_digest.slice(0, 12)}${several ? ` on ${row.device.slice(0, 12)}` : ""}`, bytes: row.total_bytes, alone: row.exclusive_bytes,
    })),
    missing ? [] : pairs.map((pair) => ({ one: `${pair.one} ${pair.device}`, other: `${pair.other} ${pair.device}`, bytes: pair.shared_bytes })),
  );
}

window.weightd = { state, parts: { devices, checkpoints } }; // what the page knows, for tests and the curious
setInterval(() => { if (state.stats) checkpoints.show(state.checkpoints, state.stats); }, AGES);
connection.follow(take, (sentence) => {
  document.body.classList.toggle("old", sentence !== null || state.daemon?.reachable === false);
  if (sentence !== null) say(sentence);
  else if (state.daemon) showDaemon();
});
