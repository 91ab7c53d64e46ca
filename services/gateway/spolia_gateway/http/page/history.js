// What was asked, with the time to its first token.

import { byId, el } from "./dom.js";
import { milliseconds, percent } from "./units.js";

const MOST = 12;

export class History {
  #asked = [];
  #numAsked = 0;

  constructor() {
    byId("forget").addEventListener("click", () => {
      this.#asked = [];
      this.#draw();
    });
  }

  /** `asked`: {documents, question, mode, ttftMs, share}, share being the reused part of the prompt. */
  add(asked) {
    this.#numAsked += 1;
    this.#asked.push({ number: this.#numAsked, ...asked });
    this.#asked = this.#asked.slice(-MOST);
    this.#draw();
  }

  #draw() {
    byId("past").hidden = !this.#asked.length;
    const longest = Math.max(...this.#asked.map((asked) => asked.ttftMs));
    byId("history").replaceChildren(...this.#asked.map((asked) => line(asked, longest)));
    byId("gain").textContent = gain(this.#asked);
  }
}

function line(asked, longest) {
  const bar = el("span", { class: "time" });
  bar.style.width = `${Math.max(1, (asked.ttftMs / longest) * 100)}%`;
  const order = asked.documents.map(({ letter }) => letter).join(" ");
  return el("li", { title: asked.question },
    el("span", { class: "what" }, el("b", { text: `${asked.number}` }), el("span", { class: "order", text: order || "no documents" }),
      el("small", { text: `${asked.mode}, ${percent(asked.share)} reused` })),
    el("span", { class: "track" }, bar),
    el("span", { class: "ms", text: milliseconds(asked.ttftMs) }));
}

/** How the last compares with the first over the same documents, in whatever order; what is not reuse's doing is said. */
function gain(all) {
  const last = all.at(-1);
  const first = all.find((asked) => sameDocuments(asked, last));
  if (!last || first === last || !last.documents.length) return "";
  const ratio = first.ttftMs / last.ttftMs;
  const where = first.documents.every(({ letter }, i) => letter === last.documents[i].letter) ? "in the same order" : "in another order";
  const times = ratio >= 1.05 ? `came ${ratio.toFixed(1)}\u00a0× sooner than` : ratio > 0.95 ? "came as soon as" : `came ${(1 / ratio).toFixed(1)}\u00a0× later than`;
  return `The first token of ask ${last.number} ${times} that of ask ${first.number}, which had the same documents ${where}.`
    + (last.share ? "" : ` None of the prompt of ask ${last.number} was reused.`);
}

function sameDocuments(one, other) {
  const texts = ({ documents }) => JSON.stringify(documents.map(({ text }) => text).sort());
  return texts(one) === texts(other);
}
