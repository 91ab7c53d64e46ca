// The cluster, looked at every second while it is in view. What nodes of other releases do not tell is not shown.

import { getJson } from "./api.js";
import { byId, el, figure, fillBar, say } from "./dom.js";
import { bytes, count, milliseconds, percent } from "./units.js";

const LOOK_MS = 1000;
const REFUSED_MS = 5000;
const ROLES = ["gateway", "prefill", "decode", "kvstore"];
const BLOCKS = [
  ["referenced", "in use", "read or written by a request now"],
  ["cached", "cached", "hold chunks that nobody reads now"],
  ["transfer", "arriving", "their bytes are on the way"],
  ["lent", "lent", "hold a peer’s runs"],
  ["free", "free", "hold nothing"],
];

export class ClusterView {
  #watching = false;
  #timer = 0;
  #seen = null;
  #drawn = "";

  constructor() {
    byId("pool-legend").append(...BLOCKS.map(([kind, name, meaning]) =>
      el("li", { title: meaning }, el("i", { class: `kind-${kind}`, "aria-hidden": "true" }), el("span", { text: name }))));
  }

  /** Looks while `watching`. */
  watch(watching) {
    if (watching === this.#watching) return;
    this.#watching = watching;
    clearTimeout(this.#timer);
    if (watching) this.#look();
  }

  lookNow() {
    if (!this.#watching) return;
    clearTimeout(this.#timer);
    this.#look();
  }

  async #look() {
    let wait = LOOK_MS;
    try {
      this.#saw(await getJson("/cluster"));
    } catch (error) {
      wait = REFUSED_MS;
      this.#missed(error);
    }
    clearTimeout(this.#timer);
    if (this.#watching) this.#timer = setTimeout(() => this.#look(), wait);
  }

  // What did not change is left alone: readers may be in the middle of it.
  #saw(told) {
    this.#seen = Date.now();
    say(byId("cluster-error"), "");
    const text = JSON.stringify(told);
    if (text !== this.#drawn) this.#draw(told);
    this.#drawn = text;
  }

  #missed(error) {
    if (error.status === 401 || error.status === 403) this.#forget();
    const since = this.#seen ? ` What is shown is ${Math.round((Date.now() - this.#seen) / 1000)} s old.` : "";
    say(byId("cluster-error"), error.message + since);
  }

  // Who may not look is not left with what was shown to the key before.
  #forget() {
    this.#seen = null;
    this.#drawn = "";
    say(byId("cluster-state"), "");
    for (const place of [byId("figures"), byId("nodes").tBodies[0], byId("requests")]) place.replaceChildren();
    byId("pool-legend").hidden = true;
  }

  #draw(told) {
    const nodes = [...told.nodes].sort((a, b) => ROLES.indexOf(a.role) - ROLES.indexOf(b.role) || compare(a.node_id, b.node_id));
    const state = byId("cluster-state");
    say(state, told.directory_reachable ? `live, as ${told.gateway_node_id} sees it`
      : "the directory cannot be reached: this is the last list known");
    state.classList.toggle("bad", !told.directory_reachable);
    byId("figures").replaceChildren(...figures(nodes, told.gateway_node_id));
    byId("nodes").tBodies[0].replaceChildren(...nodes.map((node) => row(node, told)));
    byId("pool-legend").hidden = !nodes.some((node) => node.load?.total_blocks);
    drawRequests(told.requests);
  }
}

const compare = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const sum = (numbers) => numbers.reduce((total, n) => total + n, 0);

function figures(nodes, ownId) {
  const serving = nodes.find((node) => node.node_id === ownId)?.load?.serving;
  const shown = [];
  if (serving) {
    const share = serving.num_prompt_tokens ? serving.num_cached_tokens / serving.num_prompt_tokens : null;
    const or = (ms) => (ms ? milliseconds(ms) : "–");
    shown.push(
      figure("Hit rate", share === null ? "–" : percent(share), "of prompt tokens"),
      figure("TTFT", or(serving.ttft_p50_ms), `p95 ${or(serving.ttft_p95_ms)}`),
      figure("ITL", or(serving.itl_p50_ms), `p95 ${or(serving.itl_p95_ms)}`),
      figure("Requests", count(serving.num_requests), `in the last ${serving.window_s} s`),
    );
  }
  const decodes = nodes.filter((node) => node.role === "decode");
  const blocks = sum(decodes.map((node) => node.load?.total_blocks ?? 0));
  const available = sum(decodes.map((node) => node.load?.available_blocks ?? 0));
  shown.push(
    figure("Running", count(sum(decodes.map((node) => node.load?.num_running ?? 0))),
      `${count(sum(decodes.map((node) => node.load?.num_waiting ?? 0)))} waiting`),
    figure("Decode pools", blocks ? percent(available / blocks) : "–", "available"),
  );
  const tiers = nodes.flatMap((node) => node.load?.tiers ?? []);
  // A chunk may be on both: a sum of theirs would count it twice.
  for (const [kind, name] of [["ram", "Chunks in RAM"], ["disk", "Chunks on disk"]]) {
    const those = tiers.filter((tier) => tier.tier === kind);
    if (those.length) {
      shown.push(figure(name, count(sum(those.map((tier) => tier.num_objects))), bytes(sum(those.map((tier) => tier.used_bytes)))));
    }
  }
  return shown;
}

function row(node, told) {
  const load = node.load ?? {};
  return el("tr", {},
    el("th", { scope: "row" }, el("b", { text: node.node_id }), el("small", { text: `${node.role} · ${node.address}` })),
    el("td", {}, state(node, told)),
    el("td", {}, work(node, load)),
    el("td", {}, ...holds(node, load)));
}

// While the directory is away nobody says whether a node is there, but for the gateway that answers.
function state(node, told) {
  if (!told.directory_reachable && node.node_id !== told.gateway_node_id) {
    return el("span", { class: "pill warn", text: "unknown" });
  }
  return node.draining ? el("span", { class: "pill warn", text: "draining" }) : el("span", { class: "pill good", text: "serving" });
}

function work(node, load) {
  if (node.role === "kvstore") return "";
  const words = [`${count(load.num_running ?? 0)} running`];
  if (load.num_waiting) words.push(`${count(load.num_waiting)} waiting`);
  if (load.queued_tokens) words.push(`${count(load.queued_tokens)} tokens to prefill`);
  return el("span", { text: words.join(", ") });
}

function holds(node, load) {
  if (load.tiers?.length) return load.tiers.map(tierBar);
  if (!load.total_blocks) return [];
  const used = { referenced: load.referenced_blocks, cached: load.cached_blocks, transfer: load.in_transfer_blocks, lent: load.lent_blocks };
  used.free = Math.max(0, load.total_blocks - sum(Object.values(used)));
  const told = BLOCKS.filter(([kind]) => used[kind]).map(([kind, name]) => `${count(used[kind])} ${name}`);
  const bar = el("div", { class: "stack", role: "img", "aria-label": `Blocks: ${told.join(", ")}` });
  fillBar(bar, BLOCKS.map(([kind, name]) => ({ kind, share: used[kind] / load.total_blocks, title: `${count(used[kind])} ${name}` })));
  const chunks = node.num_held_chunks + node.num_held_prefixes;
  return [bar, el("small", { text: `${told.join(", ")}; ${count(chunks)} chunks` })];
}

function tierBar(tier) {
  const name = tier.tier === "ram" ? "RAM" : tier.tier;
  const text = `${name}: ${count(tier.num_objects)} chunks, ${bytes(tier.used_bytes)} of ${bytes(tier.budget_bytes)}`;
  const bar = el("div", { class: "stack", role: "img", "aria-label": text });
  const share = tier.budget_bytes ? Math.min(1, tier.used_bytes / tier.budget_bytes) : 0;
  fillBar(bar, [{ kind: tier.tier === "ram" ? "host" : "disk", share, title: text }, { kind: "free", share: 1 - share, title: "free" }]);
  return el("div", { class: "tier" }, bar,
    el("small", {}, el("span", { text }), tier.healthy ? null : el("span", { class: "pill warn", text: "not healthy" })));
}

function drawRequests(requests) {
  const place = byId("requests");
  if (!requests.length) {
    place.replaceChildren(el("p", { class: "faint", text: "None now." }));
    return;
  }
  const head = ["Request", "Tenant", "Phase", "Mode", "Age", "Prompt", "Generated", "Decode node"];
  place.replaceChildren(el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Requests in flight" },
    el("table", {},
      el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, ...requests.map((request) => el("tr", {},
        el("th", { scope: "row", class: "id", title: request.request_id, text: request.request_id }),
        el("td", { class: "id", title: request.tenant_id, text: request.tenant_id }),
        el("td", {}, el("span", { class: `pill phase-${request.phase}`, text: request.phase })),
        el("td", { text: request.mode }),
        el("td", { text: milliseconds(request.age_ms) }),
        el("td", { text: request.num_prompt_tokens ? count(request.num_prompt_tokens) : "–" }),
        el("td", { text: count(request.num_generated_tokens) }),
        el("td", { text: request.decode_node || "–" })))))));
}
