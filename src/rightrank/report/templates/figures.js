"use strict";
(() => {
  const MAX_DISTANCE = 40; // from the pointer to a point, in the units of a drawing
  const format = (value) => String(Number(Number(value).toPrecision(5)));
  const parseNumbers = (text) => text.split(" ").map(Number);
  const readAxes = (svg) => JSON.parse(svg.dataset.axes).map(([log, low, high, start, end, label]) => {
    const scale = log ? Math.log : Number;
    return { label, at: (value) => start + ((end - start) * (scale(value) - scale(low))) / (scale(high) - scale(low)) };
  });

  // Find the point of the visible series that is nearest to the pointer.
  function findNearest(svg, event) {
    const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const [x, y] = readAxes(svg);
    let nearest = { distance: MAX_DISTANCE };
    for (const series of svg.querySelectorAll(".series:not(.off)")) {
      const ys = parseNumbers(series.dataset.y);
      parseNumbers(series.dataset.x).forEach((value, i) => {
        const left = x.at(value), top = y.at(ys[i]), distance = Math.hypot(left - pointer.x, top - pointer.y);
        const text = `${series.dataset.label}\n${x.label}: ${format(value)}\n${y.label}: ${format(ys[i])}`;
        if (distance < nearest.distance) nearest = { distance, series, left, top, text };
      });
    }
    return nearest;
  }

  document.querySelectorAll("figure.plot svg[data-figure]").forEach((svg) => {
    const spot = Object.assign(document.createElement("div"), { className: "spot", hidden: true });
    const tip = spot.appendChild(document.createElement("span")), box = svg.viewBox.baseVal;
    svg.after(spot);
    svg.addEventListener("pointermove", (event) => {
      const { series, left, top, text } = findNearest(svg, event);
      svg.querySelectorAll(".series").forEach((other) => other.classList.toggle("aside", !!series && other !== series));
      spot.hidden = !series;
      if (!series) return;
      const [xPercent, yPercent] = [(100 * left) / box.width, (100 * top) / box.height];
      Object.assign(spot.style, { left: `${xPercent}%`, top: `${yPercent}%`, color: series.getAttribute("color") });
      tip.style.transform = `translateX(-${xPercent}%)`;
      tip.textContent = text;
    });
    svg.addEventListener("pointerleave", () => {
      spot.hidden = true;
      svg.querySelectorAll(".aside").forEach((series) => series.classList.remove("aside"));
    });
    svg.closest("figure").querySelectorAll(".legend button").forEach((button) => {
      button.disabled = false;
      button.addEventListener("click", () => {
        const off = button.getAttribute("aria-pressed") === "true";
        button.setAttribute("aria-pressed", String(!off));
        const elements = [...svg.querySelectorAll("[data-label]")].filter((element) => element.dataset.label === button.dataset.label);
        elements.forEach((element) => element.classList.toggle("off", off));
      });
    });
  });
})();
