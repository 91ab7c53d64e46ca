// Elements, made without markup: text is only ever text.

export const byId = (id) => document.getElementById(id);

/** An element with properties (class, text, data-…, aria-…, on…) and children; what is null is left out. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** A bar of parts [{kind, share, title}], shares of 1; widths are set through the object model, as the policy wants. */
export function fillBar(bar, parts) {
  bar.replaceChildren(...parts.filter((part) => part.share > 0).map((part) => {
    const piece = el("span", { class: `kind-${part.kind}`, title: part.title });
    piece.style.flexGrow = part.share;
    return piece;
  }));
}

/** Shows `text`, or hides the element where there is none. */
export function say(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

/** One figure of a <dl>. */
export function figure(name, value, note = "") {
  return el("div", {}, el("dt", { text: name }), el("dd", {}, el("span", { text: value }), note ? el("small", { text: note }) : null));
}
