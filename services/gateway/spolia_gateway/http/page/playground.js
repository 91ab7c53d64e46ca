// Asking over documents, and seeing what was reused.

import { events, getJson } from "./api.js";
import { Documents } from "./documents.js";
import { byId, el, figure, say } from "./dom.js";
import { History } from "./history.js";
import { DOCUMENTS, QUESTIONS } from "./samples.js";
import { drawSources, drawTokens } from "./sources.js";
import { count, milliseconds, percent } from "./units.js";

const HINTS = {
  linked: "Documents are reused wherever they stand. The answer is an approximation, within the bounds of the model’s profile.",
  exact: "The answer equals full recompute; what is reused is a beginning that repeats.",
};

export class Playground {
  #documents = new Documents(DOCUMENTS);
  #history = new History();
  #asking = null;

  constructor() {
    byId("question").value = QUESTIONS[0];
    byId("question").after(el("p", { class: "row examples" }, ...QUESTIONS.map((text) =>
      el("button", { type: "button", class: "quiet", text, onclick: () => { byId("question").value = text; } }))));
    byId("add").addEventListener("click", () => this.#documents.add().focus());
    byId("shuffle").addEventListener("click", () => this.#documents.shuffle());
    byId("stop").addEventListener("click", () => this.#asking?.abort());
    byId("ask").addEventListener("change", hint);
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#ask();
    });
    byId("ask").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
        event.preventDefault();
        this.#ask();
      }
    });
    hint();
  }

  /** Says which model answers, and whether it can be linked. */
  async lookUpModel() {
    try {
      const [model] = (await getJson("/v1/models")).data;
      if (!model) throw new Error("No model is served now.");
      byId("model").textContent = `${model.id}, up to ${count(model.max_model_len)} tokens, profile ${model.spolia.profile}`;
      const linked = document.querySelector('[name="reuse"][value="linked"]');
      linked.disabled = !model.spolia.modes.includes("linked");
      linked.parentElement.title = model.spolia.linked_refusal;
      if (linked.disabled) document.querySelector('[name="reuse"][value="exact"]').checked = true;
      hint();
    } catch (error) {
      byId("model").textContent = error.message;
    }
  }

  async #ask() {
    if (this.#asking) return;
    const asked = read(this.#documents.all);
    if (!asked) return;
    this.#asking = new AbortController();
    busy(true);
    clear();
    try {
      const told = await stream(asked, this.#asking.signal);
      this.#tell(asked, told);
      await tellTokens(asked, told.usage);
    } catch (error) {
      if (error.name === "AbortError") byId("answer").append(el("span", { class: "faint", text: " (stopped)" }));
      else say(byId("ask-error"), error.message);
    } finally {
      this.#asking = null;
      busy(false);
    }
  }

  #tell(asked, { usage, ttftMs, totalMs }) {
    const share = usage.prompt_tokens_details.cached_tokens / Math.max(1, usage.prompt_tokens);
    const node = usage.spolia.timings_ms;
    byId("times").replaceChildren(
      figure("TTFT", milliseconds(ttftMs), `${milliseconds(node.ttft)} of it on the node`),
      figure("Total", milliseconds(totalMs), `${count(usage.completion_tokens)} tokens`),
      figure("Prompt", count(usage.prompt_tokens), "tokens"),
      figure("Reused", percent(share), usage.spolia.mode),
    );
    byId("reused").hidden = false;
    drawSources(byId("source-bar"), byId("source-legend"), usage.spolia.sources);
    byId("misses").textContent = usage.spolia.misses
      .map((miss) => `Not had: ${count(miss.num_chunks)} ${miss.kind} ${miss.num_chunks === 1 ? "chunk" : "chunks"}, ${count(miss.num_tokens)} tokens in all (${miss.reason.replaceAll("_", " ")}).`)
      .join(" ");
    this.#history.add({ documents: asked.documents, question: asked.question, mode: usage.spolia.mode, ttftMs, share });
  }
}

/** What the form says; null where it is not complete, which the browser then says. */
function read(documents) {
  const form = byId("ask");
  if (!form.reportValidity()) return null;
  const question = byId("question").value.trim();
  return {
    documents,
    question,
    isChat: byId("shape").value === "chat",
    body: { documents: documents.map(({ text }) => text), reuse: reuse() },
    limit: byId("max-tokens").valueAsNumber,
  };
}

const reuse = () => document.querySelector('[name="reuse"]:checked').value;
const messages = (asked) => [{ role: "user", content: asked.question }];

async function stream(asked, signal) {
  const body = {
    ...asked.body, temperature: 0, max_tokens: asked.limit, stream: true, stream_options: { include_usage: true },
    ...(asked.isChat ? { messages: messages(asked) } : { prompt: asked.question }),
  };
  const answer = byId("answer");
  const begin = performance.now();
  let first = null;
  let usage = null;
  for await (const event of events(asked.isChat ? "/v1/chat/completions" : "/v1/completions", body, signal)) {
    first ??= performance.now();
    usage = event.usage ?? usage;
    const text = event.choices[0]?.delta?.content ?? event.choices[0]?.text;
    if (text) answer.append(answer.hasChildNodes() ? text : text.trimStart());
  }
  return { usage, ttftMs: first - begin, totalMs: performance.now() - begin };
}

/** The prompt's text in the colours of its sources. Asked for after the answer, which it must not delay. */
async function tellTokens(asked, usage) {
  const { runs } = usage.spolia;
  byId("tokens").hidden = !runs?.length;
  if (!runs?.length) return;
  const { token_strs: tokens } = await getJson("/tokenize", {
    documents: asked.body.documents, return_token_strs: true,
    ...(asked.isChat ? { messages: messages(asked) } : { prompt: asked.question }),
  });
  drawTokens(byId("tokens"), runs, tokens);
}

function hint() {
  const linked = document.querySelector('[name="reuse"][value="linked"]');
  const why = linked.parentElement.title;
  const refused = linked.disabled ? ` Linked is not served${why && `: ${why}`}.` : "";
  byId("reuse-hint").textContent = HINTS[reuse()] + refused;
}

function busy(is) {
  byId("send").disabled = is;
  byId("stop").hidden = !is;
  byId("answer").setAttribute("aria-busy", is);
}

function clear() {
  say(byId("ask-error"), "");
  byId("answer").replaceChildren();
  byId("times").replaceChildren();
}
