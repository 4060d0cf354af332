"use strict";
// Tables can be sorted with the keyboard too, and pictures with data become interactive charts. Without scripts the page
// is still complete: the table has its first order, and the pictures are static.

for (const heading of document.querySelectorAll("table.sortable thead th")) {
  heading.tabIndex = 0;
  heading.title = "sort by this column";
  heading.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      heading.click();
    }
  });
}

const DASHES = { "-": [], "--": [8, 5], ":": [2, 4], "-.": [8, 4, 2, 4] };
const PANEL_PX = [220, 170];
const MOST_FREE_PX = 400;
const figures = [...document.querySelectorAll("figure.interactive")];
const charts = [];

function shown(value) {
  return value == null ? "–" : Math.abs(value) >= 1e-3 || value === 0 ? value.toPrecision(5) : value.toExponential(1);
}

function mark(value, log) {
  if (value == null) return "";
  return log ? value.toExponential(0) : String(+value.toPrecision(4));
}

// the point of each line that is nearest to the cursor, because lines over time and bytes have points at different places
function nearest(chart, line, hovered) {
  const values = chart.data[line];
  for (let away = 0; away < values.length; away++) {
    for (const i of [hovered - away, hovered + away]) {
      if (values[i] != null) return i;
    }
  }
  return hovered;
}

function draw(holder, panel, height) {
  const style = getComputedStyle(document.body);
  const font = "12px system-ui, sans-serif";
  const axis = { stroke: style.color, grid: { stroke: "rgba(128,128,128,.25)", width: 1 }, ticks: { show: false }, labelFont: font, font };
  const options = {
    width: holder.clientWidth,
    height,
    scales: { x: { time: false }, y: { distr: panel.log ? 3 : 1 } },
    axes: [
      { ...axis, label: panel.x, labelSize: 18, size: 30, space: 60 },
      { ...axis, label: panel.y, labelSize: 18, size: 52, values: (_, marks) => marks.map((v) => mark(v, panel.log)) },
    ],
    cursor: { dataIdx: nearest, points: { size: 7 } },
    legend: { markers: { width: 3 } },
    series: [
      { label: panel.x, value: (_, v) => shown(v) },
      ...panel.series.map((line) => ({
        label: line.name,
        stroke: line.colour,
        dash: DASHES[line.dash],
        width: line.width,
        spanGaps: true,
        points: { show: panel.log },
        value: (_, v) => shown(v),
      })),
    ],
  };
  charts.push(new uPlot(options, uPlot.join(panel.series.map((line) => [line.x, line.y])), holder));
}

// the last chart of the shorter column takes the room that the other column leaves it
function fill(figure) {
  const chart = figure.chart;
  const free = figure.getBoundingClientRect().bottom - chart.root.getBoundingClientRect().bottom - 14;
  if (free > 20) chart.setSize({ width: chart.width, height: chart.height + Math.min(free, MOST_FREE_PX) });
}

function drawAll() {
  while (charts.length) charts.pop().destroy();
  for (const figure of figures) {
    const panels = JSON.parse(figure.querySelector("script").textContent);
    const holder = figure.querySelector(".chart");
    figure.classList.add("drawn");
    panels.forEach((panel, i) => draw(holder, panel, PANEL_PX[i]));
    figure.chart = charts[charts.length - 1];
  }
  figures.filter((figure) => figure.matches(".column > :last-child")).forEach(fill);
}

let waiting;
let width = document.body.clientWidth;
function redraw() {
  clearTimeout(waiting);
  waiting = setTimeout(drawAll, 100);
}
new ResizeObserver(() => {
  if (document.body.clientWidth !== width) redraw();
  width = document.body.clientWidth;
}).observe(document.body);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
drawAll();
