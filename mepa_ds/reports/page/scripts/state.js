// What the page shows now, and small helpers. All scripts stand in one function, in the order of write.py.
"use strict";

const root = document.documentElement;
const byId = (id) => document.getElementById(id);
const state = {
  axis: "steps",
  noise: true,
  extremes: true,
  events: true,
  log: false,
  domain: null, // the part of the axis that is enlarged
  hidden: new Set(), // "chart/line"
  picked: new Map(), // the line of a chart that is overlaid, where several runs are shown
};
let data = null;

const LIGHT = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B07800", "#56B4E9", "#7B5EC6", "#6f6f6f"];
const DARK = ["#58B0F0", "#FF8A3D", "#2FCB9B", "#F0A3CE", "#F2C14E", "#9AD8FF", "#B39DF3", "#b0b0b0"];

const VIRIDIS = [[68, 1, 84], [71, 45, 123], [59, 82, 139], [44, 114, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99],
  [170, 220, 50], [253, 231, 37]];

function isDark() {
  const chosen = root.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const cssColor = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();

function kindColor(index) {
  const palette = isDark() ? DARK : LIGHT;
  return palette[index % palette.length];
}

// Scales in order: dark to light on paper, the other end of the ramp on black.
function orderedColor(index, count) {
  const share = count > 1 ? index / (count - 1) : 0.5;
  const place = (isDark() ? 0.25 + 0.75 * share : 0.85 * share) * (VIRIDIS.length - 1);
  const first = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const mixed = VIRIDIS[first].map((low, i) => Math.round(low + (place - first) * (VIRIDIS[first + 1][i] - low)));
  return `rgb(${mixed.join(",")})`;
}

function shortNumber(value) {
  if (value === null || value === undefined || !isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-3)) return value.toExponential(2);
  if (size >= 1e5) return value.toLocaleString("en", { maximumFractionDigits: 0 });
  return String(Number(value.toPrecision(5)));
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

async function unpacked(id) {
  const bytes = Uint8Array.from(atob(byId(id).textContent), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

// The index of the value nearest to x in ascending values; nulls are passed over.
function nearest(values, x) {
  let best = -1;
  let distance = Infinity;
  let low = 0;
  let high = values.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (values[middle] < x) low = middle + 1;
    else high = middle;
  }
  for (const index of [low - 1, low]) {
    const value = values[index];
    if (value !== null && value !== undefined && Math.abs(value - x) < distance) {
      best = index;
      distance = Math.abs(value - x);
    }
  }
  return best;
}

const tip = element("div");
tip.id = "tip";
tip.hidden = true;

function showTip(event, lines) {
  tip.replaceChildren(
    ...lines.map(([color, text, value]) => {
      const line = element("div");
      if (color) {
        const patch = element("i");
        patch.style.background = color;
        line.append(patch);
      }
      line.append(text);
      if (value !== undefined) line.append(" ", element("b", "", value));
      return line;
    }),
  );
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = event.clientX + 16 + box.width > innerWidth ? event.clientX - box.width - 16 : event.clientX + 16;
  tip.style.left = `${Math.max(left, 4)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - box.height - 4)}px`;
}

function vegaConfig() {
  const [ink, soft, grid] = ["ink", "soft", "grid"].map(cssColor);
  const font = "system-ui, sans-serif";
  return {
    background: null,
    font,
    view: { stroke: null },
    axis: {
      labelColor: soft, titleColor: soft, gridColor: grid, domainColor: grid, tickColor: grid,
      labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal",
    },
    legend: { labelColor: soft, titleColor: ink, titleFontWeight: "normal" },
  };
}

async function rendered(figure, spec) {
  const plot = figure.querySelector(".plot");
  const drawing = element("div", "drawing");
  const { view } = await vegaEmbed(drawing, { ...spec, config: vegaConfig() }, {
    mode: "vega-lite", renderer: "svg", actions: false, tooltip: false, defaultStyle: false, logLevel: 1, ast: false,
  });
  figure.view?.finalize();
  plot.querySelector(".drawing")?.remove();
  plot.prepend(drawing);
  figure.view = view;
  return view;
}
