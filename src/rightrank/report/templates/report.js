"use strict";
(() => {
  const page = JSON.parse(document.getElementById("page-data").textContent);
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
  const tone = (value) => colour(typeof value === "number" ? "s" + (value % 10) : value);
  const short = (value) => (value === null ? "–" : String(Number(value.toPrecision(5))));
  const charts = new Map();
  let margin = page.answer ? page.answer.margin : null;

  // The rank that is enough at a margin: the last step that the margin reaches.
  function rankAt(value) {
    let found = page.answer.steps[0][1];
    for (const [needed, rank] of page.answer.steps) if (needed <= value) found = rank;
    return found;
  }

  function axis(given, vertical, narrow) {
    const log = given.scale !== "linear";
    const option = {
      name: given.label, nameLocation: "middle", nameGap: vertical ? 52 : 28,
      nameTextStyle: { color: colour("ink") }, axisLabel: { color: colour("faint"), hideOverlap: true },
      axisLine: { show: true, onZero: false, lineStyle: { color: colour("faint") } }, splitLine: { show: vertical, lineStyle: { color: colour("line"), opacity: 0.5 } },
      type: log ? "log" : "value", scale: true,
    };
    if (given.scale === "log2") option.logBase = 2;
    if (given.ticks.length) {
      if (log) [option.min, option.max] = given.limits || [given.ticks[0] / 1.25, given.ticks[given.ticks.length - 1] * 1.25];
      option.axisLabel.customValues = given.ticks;
      option.axisTick = { customValues: given.ticks };
      if (vertical) option.splitLine.show = given.scale !== "log10";
    }
    if (vertical) option.axisLabel.formatter = (value) => short(value);
    if (!vertical && given.scale === "linear" && narrow) option.splitNumber = 4;
    return option;
  }

  // One vertical line with two caps, from low to high.
  function interval(series) {
    return {
      type: "custom", name: series.label, silent: true, clip: true, z: 1, data: series.x.map((x, i) => [x, series.low[i], series.high[i]]), encode: { x: 0, y: [1, 2] },
      renderItem: (_, api) => {
        const top = api.coord([api.value(0), api.value(2)]), bottom = api.coord([api.value(0), api.value(1)]);
        const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: { stroke: tone(series.tone), lineWidth: 1.2, opacity: 0.6 } });
        return { type: "group", children: [line(top[0], top[1], bottom[0], bottom[1]), line(top[0] - 5, top[1], top[0] + 5, top[1]), line(bottom[0] - 5, bottom[1], bottom[0] + 5, bottom[1])] };
      },
    };
  }

  function drawn(series) {
    const bare = series.kind === "line"; // its points are seen under the pointer alone
    return {
      type: "line", name: series.label, data: series.x.map((x, i) => [x, series.y[i]]), step: series.kind === "step" ? "end" : false, z: 3,
      symbol: series.kind === "step" ? "none" : "circle", symbolSize: 8, color: tone(series.tone), itemStyle: { opacity: bare ? 0 : 1 },
      lineStyle: { width: series.kind === "points" ? 0 : 2, type: series.dashed ? "dashed" : "solid" }, emphasis: { focus: "series", itemStyle: { opacity: 1 } },
    };
  }

  function ring(mark) {
    return { type: "scatter", name: mark.label, data: [[mark.x, mark.y]], symbolSize: 20, z: 4, color: tone(mark.tone), itemStyle: { color: "transparent", borderColor: tone(mark.tone), borderWidth: 2.5 } };
  }

  function plotOption(figure, width) {
    const narrow = width < 520;
    const lines = figure.series.map(drawn), whiskers = figure.series.filter((s) => s.high.length).map(interval);
    const bands = figure.bands.map((b) => ({ type: "line", name: b.label, data: [], color: colour("band"), markArea: { silent: true, itemStyle: { color: colour("band"), opacity: 0.25 }, data: [[{ yAxis: b.low }, { yAxis: b.high }]] } }));
    const extremes = [...figure.series.flatMap((s) => [...s.y, ...s.low, ...s.high]), ...figure.levels.map((l) => l.value), ...figure.bands.flatMap((b) => [b.low, b.high])];
    const [bottom, top] = figure.y.limits || [Math.min(...extremes), Math.max(...extremes)], middle = (bottom + top) / 2;
    const levels = { type: "line", name: "", data: [], markLine: { silent: true, symbol: "none", precision: 12, lineStyle: { color: colour("faint"), type: "dotted", width: 1.5 }, data: figure.levels.map((l) => ({ yAxis: l.value, label: { formatter: l.label, position: l.value > middle ? "insideEndBottom" : "insideEndTop", color: colour("faint") } })) } };
    const y = axis(figure.y, true, narrow);
    if (figure.y.scale === "linear") {
      const low = Math.min(...extremes), high = Math.max(...extremes), room = (high - low || Math.abs(high) || 1) * 0.06;
      [y.min, y.max] = figure.y.limits || [low === 0 ? 0 : low - room, high + room];
      Object.assign(y.axisLabel, { showMinLabel: y.min === 0, showMaxLabel: false });
    }
    return {
      animation: false, backgroundColor: "transparent", textStyle: { fontFamily: "system-ui, sans-serif" },
      grid: { left: 72, right: 18, top: 10, bottom: 44 },
      legend: { show: false, selected: Object.fromEntries([...hidden(figure.name)].map((label) => [label, false])) },
      tooltip: { trigger: "item", renderMode: "richText", confine: true, formatter: (p) => `${p.seriesName}\n${figure.x.label}: ${short(p.value[0])}\n${figure.y.label}: ${short(p.value[1])}` },
      xAxis: axis(figure.x, false, narrow), yAxis: y,
      series: [...lines, ...whiskers, ...figure.marks.map(ring), ...bands, levels],
    };
  }

  // The labels that a reader has switched off in a figure's legend.
  const switchedOff = new Map();
  const hidden = (name) => switchedOff.get(name) || switchedOff.set(name, new Set()).get(name);

  const SWATCHES = {
    line: '<path d="M0 6h22"/>', dashed: '<path d="M0 6h22" stroke-dasharray="5 3"/>', both: '<path d="M0 6h22"/><circle cx="11" cy="6" r="3.5" fill="currentColor"/>',
    points: '<path d="M11 0v12" stroke-width="1.2"/><circle cx="11" cy="6" r="3.5" fill="currentColor"/>', band: '<rect y="1" width="22" height="10" stroke="none" fill="currentColor" opacity=".35"/>', ring: '<circle cx="11" cy="6" r="4.5"/>',
  };
  const swatchOf = (series) => (series.kind === "points" ? "points" : series.dashed && series.kind === "line" ? "dashed" : series.kind === "both" ? "both" : "line");

  // Title and legend as text of the page, which wraps where a drawing would be cut; a click hides a series.
  function drawHead(element, figure) {
    const drawing = element.parentElement, found = new Map();
    for (const s of figure.series) if (!found.has(s.label)) found.set(s.label, [swatchOf(s), typeof s.tone === "number" ? "s" + (s.tone % 10) : s.tone]);
    for (const m of figure.marks) found.set(m.label, ["ring", m.tone]);
    for (const b of figure.bands) if (b.label) found.set(b.label, ["band", "band"]);
    let head = drawing.previousElementSibling;
    if (!head || !head.classList.contains("plot-head")) {
      head = document.createElement("div");
      head.className = "plot-head";
      drawing.before(head);
    }
    const title = document.createElement("p"), legend = document.createElement("ul");
    title.className = "plot-title";
    title.textContent = figure.title;
    legend.className = "legend";
    for (const [label, [kind, name]] of found) {
      const entry = document.createElement("li"), button = document.createElement("button"), swatch = document.createElement("span");
      button.type = "button";
      button.setAttribute("aria-pressed", String(!hidden(figure.name).has(label)));
      swatch.innerHTML = `<svg width="22" height="12" aria-hidden="true" fill="none" stroke="currentColor" stroke-width="2">${SWATCHES[kind]}</svg>`;
      swatch.style.color = `var(--${name})`;
      button.append(swatch, label);
      button.addEventListener("click", () => {
        if (!hidden(figure.name).delete(label)) hidden(figure.name).add(label);
        button.setAttribute("aria-pressed", String(!hidden(figure.name).has(label)));
        draw(element);
      });
      entry.append(button);
      legend.append(entry);
    }
    const focus = document.activeElement && legendFocus(head);
    head.replaceChildren(title, ...(found.size > 1 || figure.series.some((s) => s.high.length) ? [legend] : []));
    if (focus >= 0) head.querySelectorAll("button")[focus]?.focus();
  }
  const legendFocus = (head) => [...head.querySelectorAll("button")].indexOf(document.activeElement);

  // The figure at the slider's margin: the band, the ring and the mark of the staircase move.
  function atMargin(figure) {
    if (!page.answer || margin === page.answer.margin) return figure;
    const answer = page.answer, rank = rankAt(margin), best = answer.values[answer.reference];
    if (figure.name === "rank_curve") {
      const other = answer.higher_is_better ? best - margin : best + margin;
      const ringed = { label: `at this margin: rank ${rank}`, x: rank, y: answer.values[rank], tone: "accent" };
      return { ...figure, bands: [{ ...figure.bands[0], low: Math.min(best, other), high: Math.max(best, other) }], marks: [...figure.marks.filter((m) => m.tone !== "accent"), ringed] };
    }
    if (figure.name === "staircase") return { ...figure, marks: [{ label: "this margin", x: margin, y: rank, tone: "accent" }] };
    if (figure.name === "paired_differences") return { ...figure, levels: [{ label: `margin ${short(margin)}`, value: margin }, ...figure.levels.slice(1)] };
    return figure;
  }

  function draw(element) {
    const name = element.dataset.figure, width = element.clientWidth;
    if (!width) return;
    if (!charts.has(name)) charts.set(name, echarts.init(element, null, { renderer: "svg" }));
    const chart = charts.get(name), figure = atMargin(page.figures[name]);
    drawHead(element, figure);
    chart.resize();
    chart.setOption(plotOption(figure, width), true);
  }
  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);

  root.classList.add("with-script");
  drawAll();
  let waiting = 0;
  window.addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(drawAll, 120); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);

  // A button beside each command and each code, which copies it; without a clipboard it selects the text.
  document.querySelectorAll("pre.command, pre.code").forEach((text) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = "Copy";
    button.addEventListener("click", async () => {
      try { await navigator.clipboard.writeText(text.textContent); button.textContent = "Copied"; }
      catch { getSelection().selectAllChildren(text); button.textContent = "Selected"; }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
    text.before(button);
  });

  // A table's head sorts its rows: numbers by size, then text; a second click turns the order round.
  document.querySelectorAll("table.sortable").forEach((table) => {
    const value = (row, column) => { const text = row.cells[column].textContent.trim(), number = parseFloat(text.replace(/,/g, "")); return Number.isNaN(number) ? text : number; };
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : typeof a === "number" ? -1 : typeof b === "number" ? 1 : a.localeCompare(b));
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? -1 : 1) * order(value(a, column), value(b, column)));
        table.tBodies[0].append(...rows);
      });
    });
  });

  const slider = document.getElementById("margin");
  if (slider) {
    const [low, high] = page.answer.range, start = slider.value;
    slider.addEventListener("input", () => {
      margin = slider.value === start ? page.answer.margin : Number((low * (high / low) ** (slider.value / 1000)).toPrecision(3));
      const text = `${short(margin)} ${page.answer.unit}`;
      slider.setAttribute("aria-valuetext", text);
      document.getElementById("answer").textContent = `At a margin of ${text}, the smallest rank shown to be enough is ${rankAt(margin)}.`;
      document.querySelectorAll('[data-figure="rank_curve"],[data-figure="staircase"],[data-figure="paired_differences"]').forEach(draw);
    });
    slider.setAttribute("aria-valuetext", `${short(margin)} ${page.answer.unit}`);
  }
})();
