"use strict";
// Draws the curves in the colours of the page, filters the gallery, enlarges a chart that is clicked.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const options = { displayModeBar: false, responsive: true };

  const layout = (extra) => ({
    autosize: true,
    margin: { l: 52, r: 10, t: 8, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--soft"), family: "system-ui, sans-serif", size: 12 },
    hovermode: "closest",
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    showlegend: false,
    ...extra,
  });
  const axis = (extra) => ({ gridcolor: colour("--grid"), zeroline: false, automargin: true, ...extra });
  const shade = (run) => colour(`--c${run % 8}`);

  function curve(trace) {
    const common = { type: "scatter", x: trace.x, y: trace.y, name: escaped(trace.name) || " " };
    const line = { color: shade(trace.run), width: 2 };
    if (trace.style === "dots") return { ...common, mode: "lines+markers", line, marker: { size: 7 } };
    if (trace.style === "faint") return { ...common, mode: "lines", line: { ...line, width: 1 }, opacity: 0.35 };
    return { ...common, mode: "lines", line };
  }

  // All boxes stand before the first curve is drawn: plotly measures the room that a box has.
  function makeBoxes() {
    const place = document.getElementById("curve-charts");
    if (!place) return;
    charts.curves.forEach((chart, position) => {
      const box = document.createElement("div");
      box.className = "chart";
      const title = document.createElement("h3");
      title.textContent = `${chart.title} `;
      const unit = document.createElement("small");
      unit.textContent = chart.unit;
      title.append(unit);
      const plot = document.createElement("div");
      plot.id = `curve-${position}`;
      plot.className = "plot";
      box.append(title, plot);
      place.append(box);
    });
  }

  function drawCurves() {
    charts.curves.forEach((chart, position) => {
      const names = new Set(chart.traces.map((trace) => trace.name).filter(Boolean));
      const fromZero = chart.title === "Speed" || chart.title === "Memory";
      Plotly.react(`curve-${position}`, chart.traces.map(curve), layout({
        xaxis: axis({ title: { text: "step", standoff: 6 } }),
        yaxis: axis({ rangemode: fromZero ? "tozero" : "normal" }),
        showlegend: names.size > 1,
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
      }), options);
    });
  }

  function drawAccuracy() {
    const place = document.getElementById("accuracy-chart");
    if (!place) return;
    const rows = [...charts.accuracy].reverse();
    place.style.height = `${70 + 38 * rows.length}px`;
    Plotly.react(place, [{
      type: "scatter",
      mode: "markers",
      x: rows.map((row) => row.percent),
      y: rows.map((_, position) => position),
      text: rows.map((row) => `${row.percent.toFixed(1)} % (${row.low.toFixed(1)} to ${row.high.toFixed(1)})`),
      hoverinfo: "text",
      marker: { size: 11, color: rows.map((row) => shade(row.run)) },
      error_x: {
        type: "data",
        symmetric: false,
        array: rows.map((row) => row.high - row.percent),
        arrayminus: rows.map((row) => row.percent - row.low),
        color: colour("--soft"),
        thickness: 1.5,
        width: 5,
      },
    }], layout({
      margin: { l: 60, r: 14, t: 4, b: 40 },
      xaxis: axis({ range: [-2, 102], ticksuffix: " %" }),
      yaxis: axis({
        tickvals: rows.map((_, position) => position),
        ticktext: rows.map((row) => escaped(row.name.length > 26 ? `${row.name.slice(0, 25)}…` : row.name)),
        range: [-0.6, rows.length - 0.4],
      }),
    }), options);
  }

  // plotly reads some tags in its texts.
  function escaped(text) {
    return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  function draw() {
    drawAccuracy();
    drawCurves();
  }

  const few = 12;
  let showAll = false;

  function filterCards() {
    const before = document.getElementById("before");
    if (!before) return;
    const after = document.getElementById("after");
    const pressed = (id, key) => {
      const button = document.querySelector(`#${id} button[aria-pressed="true"]`);
      return button ? button.dataset[key] : "";
    };
    const outcome = pressed("outcomes", "outcome");
    const kind = pressed("kinds", "kind");
    const cards = document.querySelectorAll("#gallery article");
    let fitting = 0;
    for (const card of cards) {
      const old = card.dataset.right[Number(before.value)];
      const now = card.dataset.right[Number(after.value)];
      const fits = {
        all: true,
        gained: old === "0" && now === "1",
        lost: old === "1" && now === "0",
        wrong: now === "0",
      }[outcome];
      const chosen = fits && (kind === "" || card.dataset.kind === kind);
      fitting += chosen ? 1 : 0;
      card.hidden = !chosen || (fitting > few && !showAll);
    }
    const more = document.getElementById("more");
    more.hidden = showAll || fitting <= few;
    more.textContent = `Show all ${fitting}`;
    document.getElementById("shown").textContent = fitting === 1 ? "1 question" : `${fitting} questions`;
    document.getElementById("nothing").hidden = fitting > 0;
  }

  for (const group of document.querySelectorAll(".buttons")) {
    group.addEventListener("click", (event) => {
      const chosen = event.target.closest("button");
      if (!chosen) return;
      for (const button of group.querySelectorAll("button")) {
        button.setAttribute("aria-pressed", String(button === chosen));
      }
      filterCards();
    });
  }
  for (const select of document.querySelectorAll(".filters select")) select.addEventListener("change", filterCards);
  for (const zoom of document.querySelectorAll(".zoom")) {
    zoom.addEventListener("click", (event) => {
      event.preventDefault();
      zoom.classList.toggle("large");
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.getElementById("more")?.addEventListener("click", () => {
    showAll = true;
    filterCards();
  });
  makeBoxes();
  draw();
  filterCards();
})();
