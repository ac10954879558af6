// What the reader chose; kept over the page's own reloads.
const data = JSON.parse(document.getElementById("data").textContent);
const KEY = "ssl_pipeline report " + location.pathname;
const FRESH = { axis: "step", smoothing: 0, from: null, to: null, log: {}, runs: [], classes: {}, layouts: {}, open: {}, scroll: 0, theme: "auto" };

function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY)) || {};
  } catch {
    return {};
  }
}

const state = { ...FRESH, ...recall() };

function keep() {
  state.scroll = window.scrollY;
  try {
    sessionStorage.setItem(KEY, JSON.stringify(state));
  } catch { /* a browser that stores nothing for files shows the page all the same */ }
}

function toggled(list, value) {
  return list.includes(value) ? list.filter((other) => other !== value) : [...list, value];
}

function svg(name, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function html(name, text) {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
}
