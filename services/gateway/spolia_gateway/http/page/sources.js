// Where a prompt's KV can come from, in the order in which it is shown.

import { el, fillBar } from "./dom.js";
import { count, percent } from "./units.js";

export const SOURCES = [
  ["device", "device", "reused: in the memory of the node that decodes"],
  ["host", "host", "reused: fetched from a store’s memory"],
  ["disk", "disk", "reused: fetched from a store’s disk"],
  ["peer", "peer", "reused: attended in a peer’s memory"],
  ["link", "linked", "computed again at the head of a reused chunk, to link it to what stands before"],
  ["compiled", "compiled", "a document nobody had: compiled for this question, and kept"],
  ["computed", "computed", "computed for this question"],
];
const MEANINGS = new Map(SOURCES.map(([source, label, meaning]) => [source, { label, meaning }]));

const of = (source) => MEANINGS.get(source) ?? { label: source, meaning: "a source this page does not know" };
const kind = (source) => (MEANINGS.has(source) ? source : "computed");

/** A bar of all sources, and what its colours say. `counts`: source → tokens. */
export function drawSources(bar, legend, counts) {
  const known = SOURCES.map(([source]) => source).filter((source) => counts[source]);
  const present = [...known, ...Object.keys(counts).filter((source) => counts[source] && !MEANINGS.has(source))];
  const total = present.reduce((sum, source) => sum + counts[source], 0);
  const parts = present.map((source) => ({
    kind: kind(source),
    share: counts[source] / total,
    title: `${of(source).label}: ${count(counts[source])} of ${count(total)} tokens`,
  }));
  fillBar(bar, parts);
  bar.setAttribute("aria-label", parts.map((part) => part.title).join("; "));
  legend.replaceChildren(...present.map((source) =>
    el("li", { title: of(source).meaning, "data-source": source },
      el("i", { class: `kind-${kind(source)}`, "aria-hidden": "true" }),
      el("span", { text: of(source).label }),
      el("b", { text: count(counts[source]) }),
      el("small", { text: percent(counts[source] / total) }))));
}

/** The prompt in colours: `runs` are [source, number of tokens] in its order, `tokens` what its tokens spell. */
export function drawTokens(place, runs, tokens) {
  let begin = 0;
  place.replaceChildren(...runs.map(([source, length]) => {
    const text = spelled(tokens.slice(begin, begin + length));
    begin += length;
    return el("span", {
      class: `run kind-${kind(source)}`,
      "data-source": source,
      title: `${of(source).label}, ${count(length)} ${length === 1 ? "token" : "tokens"} – ${of(source).meaning}`,
      text,
    });
  }));
}

/** Text of tokens: one that is a part of a character comes as its bytes, "bytes:\xe6". */
function spelled(tokens) {
  const encoder = new TextEncoder();
  const decoder = new TextDecoder();
  return tokens.map((token) => decoder.decode(/^bytes:(\\x[0-9a-f]{2})+$/.test(token)
    ? Uint8Array.from(token.slice(6).match(/[0-9a-f]{2}/g), (byte) => parseInt(byte, 16))
    : encoder.encode(token), { stream: true })).join("") + decoder.decode();
}
