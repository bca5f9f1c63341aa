"use strict";
(() => {
  const tip = document.getElementById("tip"), stage = document.getElementById("stage"), graph = document.getElementById("graph");
  // Help on ops: what the pointer rests on, or what has the focus; Escape closes it.
  const show = (op) => {
    const help = document.getElementById("h-" + op.dataset.op);
    if (!help) return;
    tip.textContent = help.textContent; tip.hidden = false; op.setAttribute("aria-describedby", "tip");
    const at = op.getBoundingClientRect(), size = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(at.left, innerWidth - size.width - 8)) + "px";
    tip.style.top = (at.bottom + size.height + 12 < innerHeight ? at.bottom + 6 : Math.max(8, at.top - size.height - 6)) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const plan = document.querySelector(".plan");
  const op = (event) => event.target.closest("button[data-op]");
  for (const name of ["mouseover", "focusin", "click"]) plan.addEventListener(name, (e) => { if (op(e)) show(op(e)); });
  for (const name of ["mouseout", "focusout", "scroll"]) plan.addEventListener(name, hide);
  document.addEventListener("keydown", (e) => { if (e.key === "Escape") hide(); });
  // The graph: buttons, the wheel with Ctrl, dragging, and + - 0 on the keyboard.
  const width = +graph.getAttribute("width"), height = +graph.getAttribute("height");
  let scale = 1;
  const zoom = (to, x = stage.clientWidth / 2, y = stage.clientHeight / 2) => {
    to = Math.min(3, Math.max(0.02, to));
    const left = (stage.scrollLeft + x) / scale, top = (stage.scrollTop + y) / scale;
    scale = to; graph.setAttribute("width", width * to); graph.setAttribute("height", height * to);
    stage.scrollLeft = left * to - x; stage.scrollTop = top * to - y;
    document.getElementById("scale").textContent = Math.round(100 * to) + "%";
  };
  const fit = () => zoom(Math.min(1, (stage.clientWidth - 2) / width, 558 / height));
  const acts = { in: () => zoom(scale * 1.3), out: () => zoom(scale / 1.3), fit, full: () => zoom(1) };
  for (const button of document.querySelectorAll("button[data-zoom]")) button.addEventListener("click", acts[button.dataset.zoom]);
  stage.addEventListener("wheel", (e) => {
    if (!e.ctrlKey) return;
    e.preventDefault();
    const box = stage.getBoundingClientRect();
    zoom(scale * Math.exp(-e.deltaY / 300), e.clientX - box.left, e.clientY - box.top);
  }, { passive: false });
  stage.addEventListener("keydown", (e) => {
    const act = { "+": "in", "=": "in", "-": "out", "0": "fit", "1": "full" }[e.key];
    if (act) { e.preventDefault(); acts[act](); }
  });
  let from = null;
  stage.addEventListener("pointerdown", (e) => {
    if (e.button === 0 && e.pointerType === "mouse") from = { x: e.clientX + stage.scrollLeft, y: e.clientY + stage.scrollTop };
  });
  addEventListener("pointermove", (e) => {
    if (!from) return;
    stage.classList.add("drag"); stage.scrollLeft = from.x - e.clientX; stage.scrollTop = from.y - e.clientY;
  });
  addEventListener("pointerup", () => { from = null; stage.classList.remove("drag"); });
  graph.addEventListener("dragstart", (e) => e.preventDefault());
  // A small graph fits; a large one starts at a size that can be read.
  const whole = Math.min(1, (stage.clientWidth - 2) / width, 558 / height);
  zoom(whole > 0.6 ? whole : 0.8, 0, 0); stage.scrollLeft = 0;
  document.documentElement.dataset.ready = "yes";
})();
