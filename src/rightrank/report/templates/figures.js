"use strict";
(() => {
  const { answer } = JSON.parse(document.getElementById("page-data").textContent);
  const REACH = 40; // of the pointer, in the units of a drawing
  const short = (value) => String(Number(Number(value).toPrecision(5)));
  const numbers = (text) => text.split(" ").map(Number);
  const axesOf = (svg) => JSON.parse(svg.dataset.axes).map(([log, low, high, start, end, label]) => {
    const along = log ? Math.log : Number;
    return { label, at: (value) => start + ((end - start) * (along(value) - along(low))) / (along(high) - along(low)) };
  });
  document.documentElement.classList.add("with-script");

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

  // Move a part of a figure, and say in the legend what it is now.
  function move(name, kind, values, text) {
    const svg = document.querySelector(`svg[data-figure="${name}"]`), part = svg && svg.querySelector(kind);
    if (!part) return;
    const [x, y] = axesOf(svg), left = x.at(values[0]);
    part.firstElementChild.setAttribute("transform", `translate(${left} ${y.at(values[1])})`);
    const entries = [...svg.closest("figure").querySelectorAll(".legend button")];
    const entry = entries.find((one) => one.dataset.label === part.dataset.label);
    if (entry) entry.lastElementChild.textContent = text;
  }

  const slider = document.getElementById("margin");
  if (slider) {
    const [low, high] = answer.range, start = slider.value, output = document.getElementById("answer");
    const best = answer.values[answer.reference], sign = answer.higher_is_better ? -1 : 1;
    slider.setAttribute("aria-valuetext", `${short(answer.margin)} ${answer.unit}`);
    slider.addEventListener("input", () => {
      const given = Number((low * (high / low) ** (slider.value / 1000)).toPrecision(3));
      const margin = slider.value === start ? answer.margin : given;
      const rank = answer.steps.filter(([needed]) => needed <= margin).pop()[1], text = `${short(margin)} ${answer.unit}`;
      slider.setAttribute("aria-valuetext", text);
      const sentence = answer.sentences[rank === answer.reference ? "best" : "smaller"];
      output.textContent = sentence.replace("{margin}", text).replace("{rank}", rank);
      move("staircase", ".ring", [margin, rank], "this margin");
      move("rank_curve", ".ring.accent", [rank, answer.values[rank]], `at this margin: rank ${rank}`);
      const svg = document.querySelector('svg[data-figure="rank_curve"]'), y = axesOf(svg)[1];
      const ends = [y.at(best), y.at(best + sign * margin)], band = svg.querySelector(".band rect");
      band.setAttribute("y", Math.min(...ends));
      band.setAttribute("height", Math.abs(ends[0] - ends[1]));
    });
  }
})();
