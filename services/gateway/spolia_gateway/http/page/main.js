// The page: two views, a theme and a key.

import { storedKey, storeKey } from "./api.js";
import { ClusterView } from "./cluster.js";
import { byId } from "./dom.js";
import { Playground } from "./playground.js";

const VIEWS = ["cluster", "playground"];
const THEMES = ["auto", "light", "dark"];

function startTheme() {
  const button = byId("theme");
  let chosen = localStorage.getItem("spolia-theme") ?? "auto";
  const apply = () => {
    if (!THEMES.includes(chosen)) chosen = "auto";
    if (chosen === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    const name = chosen === "auto" ? "system" : chosen;
    button.lastElementChild.textContent = name;
    button.setAttribute("aria-label", `Theme: ${name}`);
  };
  button.addEventListener("click", () => {
    chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
    localStorage.setItem("spolia-theme", chosen);
    apply();
  });
  apply();
}

function startKey(changed) {
  const dialog = byId("key-dialog");
  const button = byId("key-button");
  const field = byId("key");
  const open = () => {
    button.hidden = false;
    if (dialog.open) return;
    field.value = storedKey();
    dialog.returnValue = "cancel";
    dialog.showModal();
  };
  button.hidden = !storedKey();
  button.addEventListener("click", open);
  // Asked for once by itself: who cancels is not asked again at every look.
  document.addEventListener("key-wanted", open, { once: true });
  document.addEventListener("key-wanted", () => { button.hidden = false; });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue === "use") storeKey(field.value.trim());
    if (dialog.returnValue === "drop") storeKey("");
    field.value = "";
    if (dialog.returnValue !== "cancel") changed();
  });
}

function show(cluster) {
  const wanted = location.hash.slice(1);
  const view = VIEWS.includes(wanted) ? wanted : VIEWS[0];
  for (const name of VIEWS) byId(name).hidden = name !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  cluster.watch(view === "cluster" && document.visibilityState === "visible");
}

const cluster = new ClusterView();
const playground = new Playground();
startTheme();
startKey(() => {
  cluster.lookNow();
  playground.lookUpModel();
});
window.addEventListener("hashchange", () => show(cluster));
document.addEventListener("visibilitychange", () => show(cluster));
show(cluster);
playground.lookUpModel();
