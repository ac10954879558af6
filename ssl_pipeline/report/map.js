// The map of the features: a dot an image, its thumbnail where one points.
const REACH = 18;

function classColor(number) {
  // The golden angle keeps the hues of neighboring numbers apart, however many there are.
  const hue = (25 + number * 137.508) % 360;
  const light = number % 2 ? 0.72 : 0.62;
  return `oklch(${light} 0.15 ${hue.toFixed(1)})`;
}

class FeatureMap {
  constructor(figure, map) {
    this.map = map;
    this.key = figure.dataset.map;
    this.svg = figure.querySelector("svg");
    this.thumb = figure.querySelector(".thumb");
    this.at = null;
    const picture = this.thumb.querySelector("i");
    this.zoom = Math.max(1, Math.round(84 / map.size));
    const side = map.size * this.zoom;
    picture.style.cssText = `width:${side}px;height:${side}px;background-image:url(${map.sprite});background-size:${side * map.columns}px auto`;
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.show(null));
    this.svg.addEventListener("blur", () => this.show(null));
    this.svg.addEventListener("keydown", (event) => this.walk(event));
    for (const button of figure.querySelectorAll("[data-class]")) {
      button.addEventListener("click", () => {
        state.classes[this.key] = toggled(this.hidden(), Number(button.dataset.class));
        keep();
        this.draw();
      });
    }
    this.layouts = figure.querySelectorAll("[data-layout]");
    for (const button of this.layouts) {
      button.addEventListener("click", () => {
        state.layouts[this.key] = Number(button.dataset.layout);
        keep();
        this.draw();
      });
    }
    this.help = figure.querySelector(".help");
    this.buttons = figure.querySelectorAll("[data-class]");
    new ResizeObserver(() => this.draw()).observe(this.svg);
  }

  hidden() {
    return state.classes[this.key] ?? [];
  }

  draw() {
    const [width, height, edge] = [this.svg.clientWidth, this.svg.clientHeight, 16];
    if (!width) return;
    for (const button of this.buttons) button.setAttribute("aria-pressed", String(!this.hidden().includes(Number(button.dataset.class))));
    const chosen = Math.min(state.layouts[this.key] ?? this.map.layouts.length - 1, this.map.layouts.length - 1);
    for (const button of this.layouts) button.setAttribute("aria-pressed", String(Number(button.dataset.layout) === chosen));
    const { points, help } = this.map.layouts[chosen];
    this.help.textContent = `${points.length} images of ${this.map.source}. ${help}`;
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const radius = points.length > 400 ? 4 : 5;
    this.dots = points.map(([x, y], place) => {
      const label = this.map.labels ? this.map.labels[place] : -1;
      return { place, label, x: edge + x * (width - 2 * edge), y: height - edge - y * (height - 2 * edge) };
    }).filter((dot) => !this.hidden().includes(dot.label));
    for (const dot of this.dots) {
      const fill = dot.label >= 0 ? `var(--class-${dot.label})` : "var(--run-0)";
      dot.node = svg("circle", { cx: dot.x.toFixed(1), cy: dot.y.toFixed(1), r: radius, style: `fill:${fill}` });
    }
    this.svg.replaceChildren(...this.dots.map((dot) => dot.node));
    this.show(null);
  }

  show(dot) {
    this.at?.node.classList.remove("on");
    this.at = dot;
    this.thumb.hidden = dot === null;
    if (dot === null) return;
    dot.node.classList.add("on");
    this.svg.append(dot.node);
    const side = this.map.size * this.zoom;
    const [column, row] = [dot.place % this.map.columns, Math.floor(dot.place / this.map.columns)];
    this.thumb.querySelector("i").style.backgroundPosition = `${-column * side}px ${-row * side}px`;
    const name = dot.label >= 0 ? this.map.classes[dot.label] : this.map.names[dot.place];
    this.thumb.querySelector("span").textContent = name;
    this.svg.setAttribute("aria-label", `${this.map.names[dot.place]}: ${name}`);
    const room = this.svg.clientWidth - this.thumb.offsetWidth - 4;
    const above = dot.y - this.thumb.offsetHeight - 12;
    this.thumb.style.left = `${Math.max(4, Math.min(room, dot.x - this.thumb.offsetWidth / 2))}px`;
    this.thumb.style.top = `${above > 4 ? above : dot.y + 14}px`;
  }

  point(event) {
    let best = null;
    let least = REACH ** 2;
    for (const dot of this.dots) {
      const distance = (dot.x - event.offsetX) ** 2 + (dot.y - event.offsetY) ** 2;
      if (distance < least) [best, least] = [dot, distance];
    }
    if (best !== this.at) this.show(best);
  }

  // Left and right walk through the images from one side of the map to the other.
  walk(event) {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key) || !this.dots.length) return;
    event.preventDefault();
    const inOrder = [...this.dots].sort((a, b) => a.x - b.x || a.place - b.place);
    const here = this.at ? inOrder.indexOf(this.at) : -1;
    const next = here + (event.key === "ArrowRight" ? 1 : -1);
    this.show(inOrder[(next + inOrder.length) % inOrder.length]);
  }
}
