// The experts' load: one frame of a run's routing records at a time.

// Loads are bytes: 255 times the root of the share.
function sharesOf(frames, name) {
  frames.decoded ??= {};
  frames.decoded[name] ??= Uint8Array.from(atob(frames[name]), (letter) => letter.charCodeAt(0));
  return frames.decoded[name];
}

const heat = { frame: -1 };

function heatFrames() {
  return data.runs[Number(byId("heat-run").value)].frames;
}

function cellsOf(frames, frame, layer) {
  const { experts, scales, layers } = frames;
  const bytes = sharesOf(frames, "load");
  const share = (place) => (bytes[place] / 255) ** 2;
  const number = layers.length;
  const cells = [];
  for (let scale = 0; scale < scales; scale++) {
    for (let expert = 0; expert < experts; expert++) {
      let value = 0;
      if (!frames.whole) value = share((frame * scales + scale) * experts + expert);
      else if (layer >= 0) value = share(((frame * number + layer) * scales + scale) * experts + expert);
      else for (let n = 0; n < number; n++) value += share(((frame * number + n) * scales + scale) * experts + expert) / number;
      cells.push({ row: scale + 1, expert: expert + 1, value });
    }
  }
  return cells;
}

function layerCellsOf(frames, frame) {
  const bytes = sharesOf(frames, "total");
  const { experts, layers } = frames;
  return layers.flatMap((name, n) =>
    Array.from({ length: experts }, (_, expert) => ({
      row: Number(name), expert: expert + 1, value: (bytes[(frame * layers.length + n) * experts + expert] / 255) ** 2,
    })),
  );
}

async function drawHeat(figure, cells, rows, what, experts) {
  const plot = figure.querySelector(".plot");
  const height = Math.max(Math.min(rows * 24, 420), 90) + 95;
  const view = await rendered(figure, {
    width: plot.clientWidth, height, autosize: { type: "fit", contains: "padding" }, padding: 3,
    data: { name: "cells", values: cells },
    mark: { type: "rect" },
    encoding: {
      x: { field: "expert", type: "ordinal", axis: { title: "expert", labelAngle: 0, labelOverlap: true, ticks: false } },
      y: { field: "row", type: "ordinal", axis: { title: what, labelOverlap: true, ticks: false } },
      color: {
        field: "value", type: "quantitative", scale: { scheme: "viridis", domain: [0, 2 / experts], clamp: true },
        legend: { title: `share of tokens (even: ${(100 / experts).toFixed(1)} %)`, format: ".0%", orient: "bottom",
          gradientLength: Math.min(plot.clientWidth - 80, 260), titleLimit: 300 },
      },
    },
  });
  view.addEventListener("pointermove", (event, item) => {
    const cell = item?.datum;
    if (cell?.expert === undefined) tip.hidden = true;
    else showTip(event, [["", `${what} ${cell.row}, expert ${cell.expert}`, `${(100 * cell.value).toFixed(1)} %`]]);
  });
  figure.addEventListener("pointerleave", () => { tip.hidden = true; });
}

async function drawHeatMap(figure) {
  const frames = heatFrames();
  const frame = Number(byId("heat-step").value);
  const layer = Number(byId("heat-layer").value);
  if (figure.id === "heat-scale") await drawHeat(figure, cellsOf(frames, frame, layer), frames.scales, "scale", frames.experts);
  else await drawHeat(figure, layerCellsOf(frames, frame), frames.layers.length, "layer", frames.experts);
}

function newFrame() {
  const frames = heatFrames();
  const frame = Number(byId("heat-step").value);
  byId("heat-at").textContent = frames.steps[frame].toLocaleString("en");
  const cells = {
    "heat-scale": cellsOf(frames, frame, Number(byId("heat-layer").value)), "heat-layers": layerCellsOf(frames, frame),
  };
  for (const [id, values] of Object.entries(cells)) byId(id).view?.data("cells", values).runAsync();
}

function newHeatRun() {
  const frames = heatFrames();
  const select = byId("heat-layer");
  select.replaceChildren(new Option("mean of all", "-1"));
  if (frames.whole) frames.layers.forEach((name, n) => select.append(new Option(`layer ${name}`, String(n))));
  select.parentElement.hidden = !frames.whole;
  const slider = byId("heat-step");
  slider.max = frames.steps.length - 1;
  slider.value = slider.max;
  byId("heat-at").textContent = frames.steps.at(-1).toLocaleString("en");
}

function startHeat() {
  if (!byId("heat")) return;
  newHeatRun();
  byId("heat-step").addEventListener("input", newFrame);
  byId("heat-layer").addEventListener("change", newFrame);
  byId("heat-run").addEventListener("change", () => {
    newHeatRun();
    for (const id of ["heat-scale", "heat-layers"]) redraw(byId(id));
  });
}
