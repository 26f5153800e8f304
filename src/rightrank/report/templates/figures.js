"use strict";
(() => {
  const REACH = 40; // of the pointer, in the units of a drawing
  const short = (value) => String(Number(Number(value).toPrecision(5)));
  const numbers = (text) => text.split(" ").map(Number);
  const axesOf = (svg) => JSON.parse(svg.dataset.axes).map(([log, low, high, start, end, label]) => {
    const along = log ? Math.log : Number;
    return { label, at: (value) => start + ((end - start) * (along(value) - along(low))) / (along(high) - along(low)) };
  });

  // The point nearest to the pointer, of the series that are shown.
  function nearest(svg, event) {
    const pointer = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    const [x, y] = axesOf(svg);
    let found = { distance: REACH };
    for (const series of svg.querySelectorAll(".series:not(.off)")) {
      const ys = numbers(series.dataset.y);
      numbers(series.dataset.x).forEach((value, i) => {
        const left = x.at(value), top = y.at(ys[i]), distance = Math.hypot(left - pointer.x, top - pointer.y);
        const text = `${series.dataset.label}\n${x.label}: ${short(value)}\n${y.label}: ${short(ys[i])}`;
        if (distance < found.distance) found = { distance, series, left, top, text };
      });
    }
    return found;
  }

  document.querySelectorAll("figure.plot svg[data-figure]").forEach((svg) => {
    const spot = Object.assign(document.createElement("div"), { className: "spot", hidden: true });
    const tip = spot.appendChild(document.createElement("span")), box = svg.viewBox.baseVal;
    svg.after(spot);
    svg.addEventListener("pointermove", (event) => {
      const { series, left, top, text } = nearest(svg, event);
      svg.querySelectorAll(".series").forEach((other) => other.classList.toggle("aside", !!series && other !== series));
      spot.hidden = !series;
      if (!series) return;
      const [across, down] = [(100 * left) / box.width, (100 * top) / box.height];
      Object.assign(spot.style, { left: `${across}%`, top: `${down}%`, color: series.getAttribute("color") });
      tip.style.transform = `translateX(-${across}%)`;
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
        const named = [...svg.querySelectorAll("[data-label]")].filter((part) => part.dataset.label === button.dataset.label);
        named.forEach((part) => part.classList.toggle("off", off));
      });
    });
  });
})();
