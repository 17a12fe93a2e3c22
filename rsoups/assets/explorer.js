// The front's soups as buttons: a click or Enter chooses one, arrow keys move between them (one stop of Tab for all).
const soups = () => [...element.querySelectorAll("[data-at]")];
let at = null; // the soup that the keyboard is on, which outlives the drawing

const choose = (soup) => trigger("choose", { at: Number(soup.dataset.at) });

const prepare = () => {
  const all = soups();
  if (!all.length) return;
  const pressed = all.findIndex((soup) => soup.getAttribute("aria-pressed") === "true");
  const stop = at !== null && at < all.length ? at : Math.max(0, pressed);
  all.forEach((soup, i) => soup.setAttribute("tabindex", i === stop ? "0" : "-1"));
  if (at !== null && document.activeElement === document.body) all[stop].focus();
};

element.addEventListener("click", (event) => {
  const soup = event.target.closest("[data-at]");
  if (!soup) return;
  at = null;
  choose(soup);
});
element.addEventListener("keydown", (event) => {
  const soup = event.target.closest("[data-at]");
  if (!soup) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step) {
    const all = soups();
    at = Math.min(all.length - 1, Math.max(0, Number(soup.dataset.at) + step));
    all.forEach((other, i) => other.setAttribute("tabindex", i === at ? "0" : "-1"));
    all[at].focus();
  } else if (event.key === "Enter" || event.key === " ") {
    at = Number(soup.dataset.at);
    choose(soup);
  } else return;
  event.preventDefault();
});
element.addEventListener("focusout", (event) => { if (event.relatedTarget) at = null; });
new MutationObserver(prepare).observe(element, { childList: true, subtree: true });
prepare();
