// Line charts: one svg a figure, redrawn whole; a few hundred points need no more.
const AXES = { step: 0, epoch: 1, time: 2 };
const MARGIN = { left: 52, right: 10, top: 8, bottom: 22 };

function write(value, unit) {
  if (unit === "percent") return (Math.abs(value) < 0.001 ? Number((100 * value).toPrecision(2)) : (100 * value).toFixed(1)) + " %";
  if (unit === "count") return value >= 100 ? Math.round(value).toLocaleString("en") : value.toPrecision(3);
  const size = Math.abs(value);
  return size !== 0 && (size < 0.001 || size >= 1e5) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}

function writeTick(value, unit) {
  return unit === "percent" ? Number((100 * value).toPrecision(3)) + " %" : write(value, unit === "count" ? "number" : unit);
}

function writePlace(value, axis) {
  if (axis !== "time") return Number(value.toPrecision(6)).toLocaleString("en");
  if (value < 120) return Number(value.toPrecision(3)) + " s";
  return value < 7200 ? Number((value / 60).toPrecision(3)) + " min" : Number((value / 3600).toPrecision(3)) + " h";
}

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const found = [];
  for (let place = Math.ceil(low / step); place * step <= high + step * 1e-9; place += 1) found.push(place * step);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1) {
    for (const factor of [1, 2, 5]) found.push(factor * 10 ** power);
  }
  const inside = found.filter((value) => value >= low && value <= high);
  if (inside.length < 2) return ticks(low, high, 4).filter((value) => value > 0);
  if (inside.length <= 6) return inside;
  const stride = Math.ceil(inside.length / 6);
  return inside.filter((_, place) => place % stride === 0);
}

// An exponential mean whose start is not pulled to 0; a gap stays a gap.
function smooth(values, weight) {
  let mean = 0;
  let mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

class Chart {
  constructor(figure, chart) {
    this.chart = chart;
    this.svg = figure.querySelector("svg");
    this.output = figure.querySelector("output");
    this.button = figure.querySelector("[data-log]");
    this.cursor = null;
    this.from = null;
    this.button.addEventListener("click", () => {
      state.log[chart.key] = !this.isLog();
      keep();
      this.draw();
    });
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("pointerdown", (event) => { this.from = this.shared() ? event.offsetX : null; });
    this.svg.addEventListener("pointerup", (event) => this.select(event));
    this.svg.addEventListener("dblclick", () => setRange(null, null));
    this.svg.addEventListener("keydown", (event) => this.walk(event));
    this.svg.addEventListener("blur", () => this.leave());
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  isLog() {
    return state.log[this.chart.key] ?? this.chart.log;
  }

  // Charts over steps share their axis, their range and their smoothing; a spectrum has an axis of its own.
  shared() {
    return !this.chart.axis;
  }

  lines() {
    const column = this.shared() ? AXES[state.axis] : 0;
    const low = this.shared() && state.from !== null ? state.from : -Infinity;
    const high = this.shared() && state.to !== null ? state.to : Infinity;
    return this.chart.lines
      .filter((line) => line.run === undefined || !state.runs.includes(line.run))
      .map((line, place) => {
        const rows = line.points.filter((row) => row[column] !== null);
        const raw = rows.map((row) => row[3]);
        const shown = this.shared() && state.smoothing > 0 ? smooth(raw, state.smoothing) : raw;
        const points = rows.map((row, at) => ({ x: row[column], y: shown[at], raw: raw[at], low: row[4], high: row[5] }));
        const number = line.run ?? place;
        return {
          name: line.name ?? data.runs[line.run],
          color: `var(--run-${number % 8})`,
          points: points.filter((point) => point.x >= low && point.x <= high),
        };
      })
      .filter((line) => line.points.some((point) => point.y !== null));
  }

  draw() {
    const width = this.svg.clientWidth;
    const height = this.svg.clientHeight;
    if (!width) return;
    this.button.setAttribute("aria-pressed", String(this.isLog()));
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    this.drawn = this.lines();
    const points = this.drawn.flatMap((line) => line.points).filter((point) => point.y !== null);
    if (!points.length) {
      this.svg.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing to show here"));
      this.output.replaceChildren();
      return;
    }
    this.scale(points, width, height);
    this.axes(width, height);
    for (const line of this.drawn) this.path(line);
    this.describe();
    this.read();
  }

  scale(points, width, height) {
    const ys = points.flatMap((point) => [point.y, point.raw, point.low ?? point.y, point.high ?? point.y]);
    this.log = this.isLog() && points.some((point) => point.y > 0);
    const usable = this.log ? ys.filter((value) => value > 0) : ys;
    let [low, high] = [Math.min(...usable), Math.max(...usable)];
    if (low === high) {
      const room = Math.abs(low) * 0.1 || 1;
      [low, high] = this.log ? [low / 1.5, high * 1.5] : [low - room, high + room];
    } else if (this.log) {
      const room = (high / low) ** 0.05;
      [low, high] = [low / room, high * room];
    } else {
      const room = (high - low) * 0.07;
      [low, high] = [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
    }
    const xs = points.map((point) => point.x);
    this.xs = [Math.min(...xs), Math.max(...xs)];
    if (this.xs[0] === this.xs[1]) this.xs = [this.xs[0] - 0.5, this.xs[1] + 0.5];
    this.ys = [low, high];
    const across = width - MARGIN.left - MARGIN.right;
    const down = height - MARGIN.top - MARGIN.bottom;
    this.x = (value) => MARGIN.left + ((value - this.xs[0]) / (this.xs[1] - this.xs[0])) * across;
    this.back = (place) => this.xs[0] + ((place - MARGIN.left) / across) * (this.xs[1] - this.xs[0]);
    const of = this.log ? Math.log : (value) => value;
    this.y = (value) => MARGIN.top + (1 - (of(value) - of(low)) / (of(high) - of(low))) * down;
  }

  axes(width, height) {
    for (const value of this.log ? logTicks(...this.ys) : ticks(...this.ys, 4)) {
      const y = this.y(value);
      this.svg.append(
        svg("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y, y2: y }),
        svg("text", { x: MARGIN.left - 7, y: y + 3.5, "text-anchor": "end" }, writeTick(value, this.chart.unit)),
      );
    }
    const axis = this.chart.axis ?? state.axis;
    for (const value of ticks(...this.xs, Math.max(2, width / 90))) {
      const x = this.x(value);
      const anchor = x > width - 24 ? "end" : x < MARGIN.left + 12 ? "start" : "middle";
      this.svg.append(svg("text", { x, y: height - 5, "text-anchor": anchor }, writePlace(value, axis)));
    }
  }

  path(line) {
    const trace = (key) => {
      let pen = "M";
      let path = "";
      for (const point of line.points) {
        const value = point[key];
        if (value === null || (this.log && value <= 0)) {
          pen = "M";
          continue;
        }
        path += `${pen}${this.x(point.x).toFixed(1)} ${this.y(value).toFixed(1)}`;
        pen = "L";
      }
      return path;
    };
    const style = `stroke:${line.color}`;
    if (this.shared() && state.smoothing > 0) this.svg.append(svg("path", { class: "raw", d: trace("raw"), style }));
    this.svg.append(svg("path", { class: "line", d: trace("y"), style }));
    for (const point of line.points) {
      if (point.low == null) continue;
      const x = this.x(point.x);
      this.svg.append(svg("line", { x1: x, x2: x, y1: this.y(point.low), y2: this.y(point.high), style, "stroke-width": 1.5 }));
    }
    if (line.points.length <= 12) {
      for (const point of line.points) {
        if (point.y === null || (this.log && point.y <= 0)) continue;
        this.svg.append(svg("circle", { cx: this.x(point.x), cy: this.y(point.y), r: 3, style: `fill:${line.color}` }));
      }
    }
  }

  describe() {
    const parts = this.drawn.map((line) => {
      const seen = line.points.filter((point) => point.y !== null);
      return `${line.name} from ${write(seen[0].y, this.chart.unit)} to ${write(seen.at(-1).y, this.chart.unit)}`;
    });
    this.svg.setAttribute("aria-label", `${this.chart.title}: ${parts.join("; ")}`);
  }

  // The line of text above a chart: the values at the cursor; at rest the latest ones, or a spectrum's first.
  read() {
    const axis = this.chart.axis ?? state.axis;
    const place = this.cursor ?? (this.shared() ? null : this.xs[0]);
    const nodes = place === null ? [] : [html("span", axis === "time" ? writePlace(place, axis) : `${axis} ${writePlace(place, axis)}`)];
    for (const line of this.drawn) {
      const seen = line.points.filter((point) => point.y !== null);
      const point = place === null ? seen.at(-1) : nearest(seen, place);
      const entry = html("span", this.drawn.length > 1 ? `${line.name} ` : "");
      const value = html("b", write(point.y, this.chart.unit));
      value.style.color = this.drawn.length > 1 ? line.color : "";
      entry.append(value);
      nodes.push(entry);
    }
    this.output.replaceChildren(...nodes);
  }

  show(x) {
    const points = this.drawn.flatMap((line) => line.points).filter((point) => point.y !== null);
    if (!points.length) return;
    this.cursor = nearest(points, x).x;
    this.svg.querySelectorAll(".cross").forEach((node) => node.remove());
    const at = this.x(this.cursor);
    this.svg.append(svg("line", { class: "cross", x1: at, x2: at, y1: MARGIN.top, y2: this.svg.clientHeight - MARGIN.bottom }));
    for (const line of this.drawn) {
      const point = line.points.find((other) => other.x === this.cursor && other.y !== null);
      if (!point || (this.log && point.y <= 0)) continue;
      this.svg.append(svg("circle", { class: "cross", cx: at, cy: this.y(point.y), r: 3.5, style: `fill:${line.color};stroke:none` }));
    }
    this.read();
  }

  point(event) {
    if (!this.drawn?.length) return;
    this.show(this.back(event.offsetX));
    if (this.from === null || event.buttons === 0) return;
    this.svg.querySelector(".select")?.remove();
    const [left, right] = [Math.min(this.from, event.offsetX), Math.max(this.from, event.offsetX)];
    const height = this.svg.clientHeight - MARGIN.top - MARGIN.bottom;
    this.svg.append(svg("rect", { class: "select", x: left, y: MARGIN.top, width: right - left, height }));
  }

  select(event) {
    const from = this.from;
    this.from = null;
    this.svg.querySelector(".select")?.remove();
    if (from === null || Math.abs(event.offsetX - from) < 8 || !this.drawn?.length) return;
    const ends = [this.back(from), this.back(event.offsetX)].sort((a, b) => a - b);
    setRange(Number(Math.max(0, ends[0]).toPrecision(4)), Number(ends[1].toPrecision(4)));
  }

  walk(event) {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key) || !this.drawn?.length) return;
    event.preventDefault();
    const xs = [...new Set(this.drawn.flatMap((line) => line.points.map((point) => point.x)))].sort((a, b) => a - b);
    const here = this.cursor === null ? xs.length - 1 : xs.indexOf(this.cursor);
    const next = here + (event.key === "ArrowRight" ? 1 : -1);
    this.show(xs[Math.min(xs.length - 1, Math.max(0, next))]);
  }

  leave() {
    this.cursor = null;
    this.from = null;
    this.svg.querySelectorAll(".cross, .select").forEach((node) => node.remove());
    if (this.drawn?.length) this.read();
  }
}

function nearest(points, x) {
  return points.reduce((best, point) => (Math.abs(point.x - x) < Math.abs(best.x - x) ? point : best));
}
