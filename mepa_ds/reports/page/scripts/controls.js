// Switches, sliders and pictures; and when charts are drawn: as they come into sight, and again when something changes.

const inSight = new Set();
const stale = new Set();
let working = Promise.resolve();

function redraw(...figures) {
  for (const figure of figures) stale.add(figure);
  for (const figure of figures) if (inSight.has(figure)) queue(figure);
}

function redrawAll() {
  redraw(...document.querySelectorAll("figure.chart"));
}

function queue(figure) {
  working = working.then(async () => {
    if (!stale.delete(figure)) return;
    try {
      await (figure.chart ? drawChart(figure) : drawHeatMap(figure));
    } catch (error) {
      trouble(`The chart ${figure.id} cannot be drawn: ${error.message}`);
    }
    figure.dataset.drawn = "yes";
  });
}

function trouble(text) {
  byId("trouble").hidden = false;
  byId("trouble").textContent = text;
  console.error(text);
}

function setDomain(domain) {
  state.domain = domain;
  byId("whole").hidden = !domain;
  redrawAll();
}

function colorChips() {
  for (const patch of document.querySelectorAll(".chip i")) patch.style.background = kindColor(Number(patch.dataset.run));
}

function startControls() {
  for (const radio of document.querySelectorAll("input[name=axis]")) {
    radio.addEventListener("change", () => {
      state.axis = radio.value;
      setDomain(null);
    });
  }
  for (const name of ["noise", "extremes", "events", "log"]) {
    const box = byId(`show-${name}`);
    state[name] = box.checked;
    box.addEventListener("change", () => {
      state[name] = box.checked;
      redrawAll();
    });
  }
  state.axis = document.querySelector("input[name=axis]:checked").value; // browsers keep it over a reload
  byId("whole").addEventListener("click", () => setDomain(null));
  const newTheme = () => {
    colorChips();
    redrawAll();
  };
  byId("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    newTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", newTheme);
  colorChips();
}

function startPictures() {
  const slider = byId("picture-step");
  if (!slider) return;
  const sources = JSON.parse(byId("pictures").textContent);
  const steps = JSON.parse(slider.dataset.steps);
  const show = () => {
    const step = steps[Number(slider.value)];
    byId("picture-at").textContent = step.toLocaleString("en");
    for (const image of document.querySelectorAll(".picture img")) {
      const run = Number(image.dataset.run);
      const own = data.runs[run].pictures.steps;
      const index = Math.max(own.findLastIndex((one) => one <= step), 0);
      image.src = sources[run][index];
      image.parentElement.querySelector("span").textContent = `step ${own[index].toLocaleString("en")}`;
    }
  };
  slider.addEventListener("input", show);
  let playing = null;
  const button = byId("picture-play");
  const stop = () => {
    clearInterval(playing);
    playing = null;
    button.textContent = "▶";
  };
  button.addEventListener("click", () => {
    if (playing) return stop();
    if (slider.value === slider.max) slider.value = 0;
    show();
    button.textContent = "❚❚";
    playing = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stop();
    }, 500);
  });
  show();
}

function startCharts() {
  for (const chart of data.charts) {
    const figure = byId(`chart-${chart.id}`);
    figure.chart = chart;
    listen(figure);
  }
  const figures = [...document.querySelectorAll("figure.chart")];
  for (const figure of figures) stale.add(figure);
  const sight = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) inSight.delete(target);
      else {
        inSight.add(target);
        queue(target);
      }
    }
  }, { rootMargin: "600px 0px" });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redrawAll(); // not when a phone's address bar comes and goes
    width = innerWidth;
  });
  addEventListener("beforeprint", () => figures.forEach((figure) => { inSight.add(figure); queue(figure); }));
  for (const figure of figures) sight.observe(figure);
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    return trouble("This browser is too old for the charts (it has no DecompressionStream): open the page with one of 2023 or later.");
  }
  const [library, text] = await Promise.all([unpacked("library"), unpacked("data")]);
  const script = element("script");
  script.textContent = library;
  document.head.append(script);
  data = JSON.parse(text);
  document.body.append(tip);
  startControls();
  startHeat();
  startPictures();
  startCharts();
  root.dataset.ready = "yes";
}

start().catch((error) => trouble(`The charts cannot be drawn: ${error.message}`));
