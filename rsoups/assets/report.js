(() => {
  "use strict";
  const tip = document.getElementById("tip"), all = (query, root = document) => [...root.querySelectorAll(query)];
  const show = mark => {
    tip.textContent = mark.getAttribute("aria-label"); tip.hidden = false;
    const at = mark.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
    const above = at.top - own.height - 8;
    tip.style.left = left + "px"; tip.style.top = (above < 8 ? at.bottom + 8 : above) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const menu = document.getElementById("model"), slide = document.getElementById("slide");
  const choose = model => {
    all(".mark.on").forEach(mark => mark.classList.remove("on"));
    all('.mark[data-model="' + model + '"]').forEach(mark => mark.classList.add("on"));
    if (!menu) return;
    menu.value = model;
    if (slide && +model >= +slide.min) { slide.value = model; slide.setAttribute("aria-valuetext", menu.selectedOptions[0].text); }
    all("article .text").forEach(text => {
      const head = text.querySelector("h4"), chosen = head.dataset.model === String(model);
      text.classList.toggle("chosen", chosen);
      text.hidden = !chosen && !("fixed" in head.dataset);
    });
  };
  all("svg.chart").forEach(chart => {
    const marks = all(".mark", chart);
    marks.forEach((mark, place) => {
      const title = mark.querySelector("title"); if (title) title.remove();
      mark.setAttribute("tabindex", place ? -1 : 0);
      mark.addEventListener("pointerenter", () => show(mark));
      mark.addEventListener("pointerleave", hide);
      mark.addEventListener("focus", () => show(mark));
      mark.addEventListener("blur", hide);
      mark.addEventListener("click", () => { if (mark.dataset.model) choose(mark.dataset.model); });
      mark.addEventListener("keydown", event => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Enter" || event.key === " ") { event.preventDefault(); mark.dispatchEvent(new MouseEvent("click")); }
        if (event.key === "Escape") hide();
        if (!step) return;
        event.preventDefault();
        const next = marks[(place + step + marks.length) % marks.length];
        mark.setAttribute("tabindex", -1); next.setAttribute("tabindex", 0); next.focus();
      });
    });
  });
  addEventListener("scroll", hide, { passive: true });
  if (!menu) return;
  // With a script, one chosen model beside the base and the ends; without, the texts stand as they are.
  all("article").forEach(article => {
    const row = article.querySelector(".row"), unfolded = article.querySelector("details");
    if (unfolded) { all(".text", unfolded).forEach(text => row.append(text)); unfolded.remove(); }
    const place = text => +(text.querySelector("h4").dataset.fixed ?? 1);  // base, chosen, ends
    all(".text", row).sort((a, b) => place(a) - place(b)).forEach(text => row.append(text));
  });
  document.querySelector(".chooser").hidden = false;
  menu.addEventListener("change", () => choose(menu.value));
  if (slide) slide.addEventListener("input", () => choose(slide.value));
  choose(menu.value);
})();
