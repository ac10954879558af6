// Wires the controls, restores what was chosen, and reloads while a run goes on.
const charts = data.charts.map((chart) => new Chart(document.querySelector(`[data-chart="${chart.key}"]`), chart));
const maps = data.maps.map((map) => new FeatureMap(document.querySelector(`[data-map="${map.index}"]`), map));
const all = (selector) => document.querySelectorAll(selector);
const byId = (id) => document.getElementById(id);

function refresh() {
  for (const button of all("[data-axis]")) button.setAttribute("aria-pressed", String(button.dataset.axis === state.axis));
  for (const button of all("[data-run]")) button.setAttribute("aria-pressed", String(!state.runs.includes(Number(button.dataset.run))));
  if (byId("smoothing")) {
    byId("smoothing").value = state.smoothing;
    byId("from").value = state.from ?? "";
    byId("to").value = state.to ?? "";
  }
  for (const chart of charts) chart.draw();
  keep();
}

function setRange(from, to) {
  [state.from, state.to] = [from, to];
  refresh();
}

function setTheme(theme) {
  state.theme = theme;
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  byId("theme").textContent = `theme: ${theme}`;
  keep();
}

const numberOf = (input) => (input.value === "" || Number.isNaN(Number(input.value)) ? null : Number(input.value));

for (let number = 0; number < data.classes; number += 1) {
  document.documentElement.style.setProperty(`--class-${number}`, classColor(number));
}
for (const button of all("[data-axis]")) {
  button.addEventListener("click", () => {
    state.axis = button.dataset.axis;
    setRange(null, null); // a range in steps means nothing in epochs
  });
}
for (const button of all("[data-run]")) {
  button.addEventListener("click", () => {
    state.runs = toggled(state.runs, Number(button.dataset.run));
    refresh();
  });
}
byId("smoothing")?.addEventListener("input", (event) => {
  state.smoothing = Number(event.target.value);
  refresh();
});
byId("from")?.addEventListener("change", (event) => setRange(numberOf(event.target), state.to));
byId("to")?.addEventListener("change", (event) => setRange(state.from, numberOf(event.target)));
byId("reset")?.addEventListener("click", () => {
  Object.assign(state, { smoothing: 0, log: {}, runs: [] });
  setRange(null, null);
});
byId("theme").addEventListener("click", () => {
  const order = ["auto", "light", "dark"];
  setTheme(order[(order.indexOf(state.theme) + 1) % order.length]);
});
for (const details of all("details")) {
  details.open = Boolean(state.open[details.dataset.key]);
  details.addEventListener("toggle", () => {
    state.open[details.dataset.key] = details.open;
    keep();
  });
}

const scroll = state.scroll;
setTheme(state.theme);
refresh();
if (data.refresh) {
  // Only a page that reloads itself puts the reader back where they were; otherwise the browser knows better.
  history.scrollRestoration = "manual";
  document.documentElement.style.scrollBehavior = "auto";
  window.scrollTo(0, scroll);
  document.documentElement.style.scrollBehavior = "";
  let touched = 0;
  for (const name of ["pointermove", "keydown", "input"]) document.addEventListener(name, () => { touched = Date.now(); });
  window.setInterval(() => {
    const busy = Date.now() - touched < 2000; // never under the reader's hand
    if (document.hidden || busy) return;
    keep();
    location.reload();
  }, data.refresh * 1000);
}
window.addEventListener("pagehide", keep);
