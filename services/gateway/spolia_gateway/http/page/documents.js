// The documents of a question, in an order that can be changed by pointer, finger or key.

import { byId, el } from "./dom.js";

const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

export class Documents {
  #list = byId("documents");
  #said = byId("order-said");
  #numMade = 0;

  constructor(texts) {
    for (const text of texts) this.add(text);
  }

  /** What there is, first to last, without blanks. Each text ends with a line feed, so that none runs into the next. */
  get all() {
    return this.#items.map((item) => ({ letter: item.dataset.letter, text: item.querySelector("textarea").value }))
      .filter(({ text }) => text.trim())
      .map(({ letter, text }) => ({ letter, text: text.endsWith("\n") ? text : `${text}\n` }));
  }

  add(text = "") {
    const letter = LETTERS[this.#numMade % LETTERS.length] + (this.#numMade >= LETTERS.length ? Math.floor(this.#numMade / LETTERS.length) : "");
    this.#numMade += 1;
    const area = el("textarea", { rows: "3", spellcheck: "false", "aria-label": `Document ${letter}`, placeholder: "Paste a document" });
    area.value = text;
    const item = el("li", { "data-letter": letter },
      el("button", { type: "button", class: "handle", text: letter, "aria-label": `Document ${letter}: move with the arrow keys`,
        onpointerdown: (event) => this.#drag(event, item), onkeydown: (event) => this.#key(event, item) }),
      area,
      el("div", { class: "moves" },
        el("button", { type: "button", class: "quiet", text: "↑", "aria-label": `Move document ${letter} up`, onclick: () => this.#move(item, -1) }),
        el("button", { type: "button", class: "quiet", text: "↓", "aria-label": `Move document ${letter} down`, onclick: () => this.#move(item, 1) }),
        el("button", { type: "button", class: "quiet", text: "×", "aria-label": `Remove document ${letter}`, onclick: () => this.#remove(item) })));
    this.#list.append(item);
    return area;
  }

  /** Another order, where there is one: the first document is never first again, so that no prefix repeats. */
  shuffle() {
    const items = this.#items;
    if (items.length < 2) return;
    const first = items[0];
    for (let end = items.length - 1; end > 0; end -= 1) {
      const other = Math.floor(Math.random() * (end + 1));
      [items[end], items[other]] = [items[other], items[end]];
    }
    if (items[0] === first) items.push(items.shift());
    this.#list.append(...items);
    this.#tell();
  }

  get #items() {
    return [...this.#list.children];
  }

  // The neighbour moves, not the item: so the item keeps focus and pointer.
  #move(item, step) {
    const neighbour = step < 0 ? item.previousElementSibling : item.nextElementSibling;
    if (!neighbour) return;
    if (step < 0) item.after(neighbour);
    else item.before(neighbour);
    this.#tell();
  }

  #key(event, item) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    this.#move(item, step);
  }

  #drag(event, item) {
    if (event.button !== 0) return;
    item.classList.add("dragged");
    const move = ({ clientY }) => {
      const before = item.previousElementSibling;
      const after = item.nextElementSibling;
      if (before && clientY < middle(before)) this.#move(item, -1);
      else if (after && clientY > middle(after)) this.#move(item, 1);
    };
    const end = new AbortController();
    const done = () => {
      item.classList.remove("dragged");
      end.abort();
    };
    window.addEventListener("pointermove", move, { signal: end.signal });
    window.addEventListener("pointerup", done, { signal: end.signal });
    window.addEventListener("pointercancel", done, { signal: end.signal });
  }

  #remove(item) {
    const next = item.nextElementSibling ?? item.previousElementSibling;
    item.remove();
    (next?.querySelector(".handle") ?? byId("add")).focus();
    this.#tell();
  }

  #tell() {
    this.#said.textContent = `Order: ${this.#items.map((item) => item.dataset.letter).join(", ")}`;
  }
}

function middle(element) {
  const box = element.getBoundingClientRect();
  return box.top + box.height / 2;
}
