// The front's soups as buttons: a click or Enter chooses one, arrow keys move between them (one stop of Tab for all).
// `element`, `trigger` and `watch` are Gradio's.
const soups = () => [...element.querySelectorAll("[data-at]")];
const stopAt = (at) => soups().forEach((soup, i) => soup.setAttribute("tabindex", i === at ? "0" : "-1"));
const choose = (soup) => trigger("choose", { at: Number(soup.dataset.at) });

const prepare = () => {
  const all = soups();
  const focused = all.indexOf(document.activeElement);
  const pressed = all.findIndex((soup) => soup.getAttribute("aria-pressed") === "true");
  stopAt(Math.max(0, focused >= 0 ? focused : pressed));
};

element.addEventListener("click", (event) => {
  const soup = event.target.closest("[data-at]");
  if (soup) choose(soup);
});
element.addEventListener("keydown", (event) => {
  const soup = event.target.closest("[data-at]");
  if (!soup) return;
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (step) {
    const all = soups();
    const at = Math.min(all.length - 1, Math.max(0, all.indexOf(soup) + step));
    stopAt(at);
    all[at].focus();
  } else if (event.key === "Enter" || event.key === " ") {
    choose(soup);
  } else return;
  event.preventDefault();
});
watch("value", prepare);
prepare();
