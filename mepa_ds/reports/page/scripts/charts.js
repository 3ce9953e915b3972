// Curves: lines with their bands, the events of runs, numbers under the pointer, and a part enlarged by dragging.

const HEIGHT = 230;
const AXIS_FORMAT = { steps: "~s", images: "~s", flops: ".1e", hours: "~g" };

// The lines that a chart shows now: those of the one run, or one line of every run.
function seriesOf(chart) {
  const found = [];
  const several = data.runs.length > 1;
  const lines = several ? chart.lines.filter(([name]) => name === pickedLine(chart)) : chart.lines;
  data.runs.forEach((run, number) => {
    lines.forEach(([name, label], index) => {
      const table = run.points[name.split("/")[0]];
      const points = table?.lines[name];
      const xs = table?.x[state.axis];
      if (!points || !xs) return;
      const color = several ? kindColor(number) : chart.ordered ? orderedColor(index, lines.length) : kindColor(index);
      found.push({
        key: `${chart.id}/${several ? number : name}`, label: several ? run.name : label, color, xs, points,
        single: !name.startsWith("train/"), secondary: !several && name.startsWith("heldout/") && lines.some(([other]) => other.startsWith("train/")),
      });
    });
  });
  return found;
}

function pickedLine(chart) {
  const there = chart.lines.filter(([name]) => data.runs.some((run) => run.points[name.split("/")[0]]?.lines[name]));
  return state.picked.get(chart.id) ?? (chart.ordered ? there.at(-1) : there[0])?.[0];
}

function rowsOf(series) {
  const { xs, points } = series;
  const rows = [];
  const [from, to] = state.domain ?? [-Infinity, Infinity];
  for (let i = 0; i < xs.length; i++) {
    if (xs[i] === null || (xs[i + 1] ?? xs[i]) < from || (xs[i - 1] ?? xs[i]) > to) continue;
    const y = points.line[i];
    const half = points.noise?.[i] ?? null;
    const low = points.low?.[i] ?? null;
    const high = (points.high ?? points.low)?.[i] ?? null;
    const band = points.interval ? [low, high] : half === null || y === null ? [null, null] : [y - half, y + half];
    rows.push({ x: xs[i], y, lo: band[0], hi: band[1], low: points.interval ? null : low,
      high: points.interval ? null : high, s: series.key });
  }
  return rows;
}

// From lines and extremes: a wide band of the noisy first steps must not press the rest flat.
function extent(rows, log) {
  let [low, high] = [Infinity, -Infinity];
  for (const row of rows) {
    const ends = state.extremes ? [row.y, row.low, row.high] : [row.y];
    for (const value of ends) {
      if (value === null || (log && value <= 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
  }
  if (low > high) return null;
  if (log) return low === high ? [low / 2, high * 2] : [low / 1.03, high * 1.03];
  const pad = (high - low) * 0.04 || Math.abs(high) * 0.05 || 1;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
}

function eventRows() {
  const colors = { start: cssColor("soft"), change: cssColor("change"), guard: cssColor("guard") };
  return data.runs.flatMap((run) =>
    run.marks.label.map((label, i) => ({
      x: run.marks.x[state.axis]?.[i] ?? null, group: run.marks.group[i], color: colors[run.marks.group[i]],
      label: data.runs.length > 1 ? `${run.name}: ${label}` : label,
    })),
  ).filter((row) => row.x !== null && (!state.domain || (row.x >= state.domain[0] && row.x <= state.domain[1])));
}

function layersOf(chart, series, rows, log) {
  const color = {
    field: "s", type: "nominal", legend: null,
    scale: { domain: series.map((one) => one.key), range: series.map((one) => one.color) },
  };
  const ends = rows.reduce(([low, high], row) => [Math.min(low, row.x), Math.max(high, row.x)], [Infinity, -Infinity]);
  const x = {
    field: "x", type: "quantitative", scale: { domain: state.domain ?? ends, nice: false, zero: false },
    axis: { title: data.axes[state.axis], format: AXIS_FORMAT[state.axis], grid: false, tickCount: 6, labelOverlap: true },
  };
  const limits = extent(rows, log);
  const y = {
    field: "y", type: "quantitative", scale: { ...(log ? { type: "log" } : { zero: false }), nice: false, domain: limits },
    axis: { title: null, tickCount: 5, labelOverlap: true, ...(limits && limits[1] >= 1e5 ? { format: ".3~s" } : {}) },
  };
  if (chart.stack && series.length > 1 && data.runs.length === 1) {
    const stacked = { ...y, scale: { zero: true }, stack: "zero" };
    return [{ data: { values: rows }, mark: { type: "area", clip: true, opacity: 0.85 }, encoding: { x, y: stacked, color } }];
  }
  const layers = [];
  const values = { values: rows };
  const many = series.length > 3;
  if (state.extremes && rows.some((row) => row.low !== null)) {
    const mark = { type: "area", clip: true, opacity: many ? 0.08 : 0.16, line: { strokeWidth: 0.7, opacity: many ? 0.25 : 0.5 } };
    layers.push({ data: values, mark, encoding: { x, y: { ...y, field: "low" }, y2: { field: "high" }, color } });
  }
  if (state.noise && rows.some((row) => row.lo !== null)) {
    const within = rows.map((row) => ({ ...row, lo: log && row.lo <= 0 && limits ? limits[0] : row.lo }));
    const mark = { type: "area", clip: true, opacity: many ? 0.16 : 0.3 };
    layers.push({ data: { values: within }, mark, encoding: { x, y: { ...y, field: "lo" }, y2: { field: "hi" }, color } });
  }
  const solid = new Set(series.filter((one) => !one.secondary).map((one) => one.key));
  for (const part of [rows.filter((row) => solid.has(row.s)), rows.filter((row) => !solid.has(row.s))]) {
    const dash = part.length && !solid.has(part[0].s) ? [5, 3] : [1, 0];
    if (part.length) {
      layers.push({ data: { values: part }, mark: { type: "line", clip: true, strokeWidth: 1.7, strokeDash: dash },
        encoding: { x, y, color } });
    }
  }
  const sparse = new Set(series.filter((one) => one.single || one.xs.length <= 30).map((one) => one.key));
  const dots = rows.filter((row) => sparse.has(row.s) && row.y !== null);
  if (dots.length && dots.length <= 40 * sparse.size) {
    layers.push({ data: { values: dots }, mark: { type: "point", filled: true, size: 22, clip: true, opacity: 1 },
      encoding: { x, y, color } });
  }
  // Starts and changes cross the chart; what guards saw, which may be much, is a tick at its upper edge.
  const events = state.events ? eventRows() : [];
  const hue = { field: "color", type: "nominal", scale: null, legend: null };
  const [crossing, ticks] = [events.filter((row) => row.group !== "guard"), events.filter((row) => row.group === "guard")];
  if (crossing.length) {
    layers.push({ data: { values: crossing }, mark: { type: "rule", strokeDash: [2, 3], opacity: 0.8 },
      encoding: { x, color: hue } });
  }
  if (ticks.length) {
    layers.push({ data: { values: ticks }, mark: { type: "rule", strokeWidth: 1.5, opacity: 0.9 },
      encoding: { x, y: { value: 0 }, y2: { value: 9 }, color: hue } });
  }
  return layers;
}

async function drawChart(figure) {
  const chart = figure.chart;
  const series = seriesOf(chart);
  drawLegend(figure, chart, series);
  const shown = series.filter((one) => !state.hidden.has(one.key));
  const rows = shown.flatMap(rowsOf);
  const positive = rows.some((row) => row.y > 0) && rows.every((row) => row.y === null || row.y > 0);
  const plot = figure.querySelector(".plot");
  plot.querySelector(".nothing")?.remove();
  figure.shown = shown;
  if (!rows.some((row) => row.y !== null || row.low !== null)) {
    figure.view?.finalize();
    figure.view = null;
    plot.querySelector(".drawing")?.remove();
    const why = series.length && shown.length ? "no finite value here" : series.length ? "every line is hidden" : "not known on this axis";
    plot.prepend(element("p", "nothing faint", why));
    return;
  }
  const log = state.log && positive && !chart.stack;
  await rendered(figure, {
    width: plot.clientWidth, height: HEIGHT, autosize: { type: "fit", contains: "padding" }, padding: 3,
    layer: layersOf(chart, shown, rows, log), resolve: { scale: { color: "independent" } },
  });
}

function drawLegend(figure, chart, series) {
  const legend = figure.querySelector(".legend");
  legend.replaceChildren();
  if (data.runs.length > 1 && chart.lines.length > 1) {
    const select = element("select");
    select.ariaLabel = "line";
    for (const [name, label] of chart.lines) select.append(new Option(label, name, false, name === pickedLine(chart)));
    select.addEventListener("change", () => {
      state.picked.set(chart.id, select.value);
      redraw(figure);
    });
    legend.append(select);
  }
  if (series.length < 2) return;
  for (const one of series) {
    const button = element("button");
    const patch = element("i");
    patch.style.background = one.color;
    button.type = "button";
    button.append(patch, one.label);
    button.ariaPressed = String(!state.hidden.has(one.key));
    button.addEventListener("click", () => {
      if (!state.hidden.delete(one.key)) state.hidden.add(one.key);
      redraw(figure);
    });
    legend.append(button);
  }
}

// Where the pointer is on the horizontal axis; null beside the chart.
function placeOf(figure, event) {
  const view = figure.view;
  if (!view) return null;
  const pixel = event.clientX - figure.querySelector("svg").getBoundingClientRect().left - view.origin()[0] ;
  const width = view.width();
  if (pixel < -4 || pixel > width + 4) return null;
  const inside = Math.min(Math.max(pixel, 0), width);
  return { pixel: inside + view.origin()[0], x: view.scale("x").invert(inside) };
}

function line(plot, name, left, width) {
  const made = plot.querySelector(`.${name}`) ?? plot.appendChild(element("div", name));
  Object.assign(made.style, { left: `${left}px`, width: `${width}px`, top: "4px", height: `${HEIGHT - 30}px` });
}

function numbersAt(figure, event) {
  const place = placeOf(figure, event);
  const plot = figure.querySelector(".plot");
  if (!place || !figure.shown.length) return leave(figure);
  const lines = [["", data.axes[state.axis], shortNumber(place.x)]];
  for (const one of figure.shown) {
    const i = nearest(one.xs, place.x);
    if (i < 0) continue;
    const half = one.points.noise?.[i];
    const [low, high] = [one.points.low?.[i], one.points.high?.[i]];
    let text = shortNumber(one.points.line[i]);
    if (half && state.noise) text += ` ± ${shortNumber(Number(half.toPrecision(2)))}`;
    if (low !== undefined && high !== undefined && state.extremes) text += ` (${shortNumber(low)} to ${shortNumber(high)})`;
    lines.push([one.color, one.label, text]);
  }
  const reach = Math.abs(figure.view.scale("x").invert(5) - figure.view.scale("x").invert(0));
  if (state.events) {
    for (const row of eventRows().filter((row) => Math.abs(row.x - place.x) <= reach).slice(0, 4)) lines.push([row.color, row.label]);
  }
  line(plot, "cursor", place.pixel, 1);
  showTip(event, lines);
}

function leave(figure) {
  tip.hidden = true;
  figure.querySelector(".cursor")?.remove();
}

function listen(figure) {
  const plot = figure.querySelector(".plot");
  let from = null;
  plot.addEventListener("pointermove", (event) => {
    numbersAt(figure, event);
    const place = from && placeOf(figure, event);
    if (place) line(plot, "chosen", Math.min(from.pixel, place.pixel), Math.abs(place.pixel - from.pixel));
  });
  plot.addEventListener("pointerleave", () => leave(figure));
  plot.addEventListener("pointerdown", (event) => {
    // Fingers scroll the page; they see numbers, and do not enlarge.
    if (event.pointerType === "mouse" && event.button === 0) {
      from = placeOf(figure, event);
      event.preventDefault();
    } else numbersAt(figure, event);
  });
  addEventListener("pointerup", (event) => {
    if (!from) return;
    const to = placeOf(figure, event);
    plot.querySelector(".chosen")?.remove();
    if (to && Math.abs(to.pixel - from.pixel) > 8) setDomain([Math.min(from.x, to.x), Math.max(from.x, to.x)]);
    from = null;
  });
}
