"use strict";
// A small line-chart library: SVG, nice ticks, linear or log scale, one crosshair shared by all charts of the page.

const SVG = "http://www.w3.org/2000/svg";

function svg(tag, attributes, parent) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (parent) parent.append(node);
  return node;
}

function html(tag, className, text, parent) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

function niceTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw * 0.999) * power;
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step) ticks.push(Math.abs(tick) < step * 1e-6 ? 0 : tick);
  return ticks;
}

function logTicks(low, high) {
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const factor of high / low > 300 ? [1] : high / low > 12 ? [1, 3] : [1, 1.5, 2, 3, 4, 5, 6, 8]) {
      const tick = factor * 10 ** power;
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  }
  return ticks.length > 1 ? ticks : niceTicks(low, high, 4);
}

// Exponential moving average that starts unbiased and passes over gaps.
function smooth(points, weight) {
  if (!weight) return points;
  let mean = 0, mass = 0;
  return points.map(([x, y]) => {
    if (y === null) return [x, null];
    mean = mean * weight + y * (1 - weight);
    mass = mass * weight + (1 - weight);
    return [x, mean / mass];
  });
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - x) <= Math.abs(points[high][0] - x) ? low : high;
}

class Chart {
  static all = [];

  // spec: {title, hint, wide, height, format(y), log, zero, series(): [{label, color, points, raw, dots, dash, step}], marks(): [{x, label}]}
  constructor(spec, parent, page) {
    Object.assign(this, { spec, page });
    this.node = html("article", "card chart" + (spec.wide ? " wide" : ""), undefined, parent);
    const header = html("header", "", undefined, this.node);
    html("h3", "", spec.title, header);
    html("span", "hint", spec.hint, header);
    this.legend = html("div", "legend", undefined, header);
    this.svg = svg("svg", { role: "img" }, this.node);
    this.svg.addEventListener("pointermove", (event) => this.hover(event));
    this.svg.addEventListener("pointerdown", (event) => this.hover(event));
    this.svg.addEventListener("pointerleave", () => Chart.all.forEach((chart) => chart.clear()));
    new ResizeObserver(() => this.draw()).observe(this.node);
    Chart.all.push(this);
  }

  draw() {
    const width = this.node.clientWidth - 32, height = this.spec.height || 230;
    if (width < 60) return;
    this.box = { left: 52, right: width - 12, top: 12, bottom: height - 26 };
    this.series = this.spec.series().filter((series) => series.points.some((point) => point[1] !== null));
    this.svg.replaceChildren();
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("aria-label", `${this.spec.title} against ${this.page.xName()}`);
    this.node.hidden = !this.series.length;
    if (!this.series.length) return;
    this.scale();
    this.axes();
    this.lines();
    this.drawLegend();
    this.overlay = svg("g", {}, this.svg);
  }

  scale() {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    const log = this.isLog();
    for (const series of this.series) {
      for (const [x, y] of series.raw || series.points) {
        if (y === null || (log && y <= 0)) continue;
        x0 = Math.min(x0, x); x1 = Math.max(x1, x); y0 = Math.min(y0, y); y1 = Math.max(y1, y);
      }
    }
    if (this.spec.zero && !log) y0 = Math.min(0, y0);
    if (x1 === x0) { x0 -= 0.5; x1 += 0.5; }
    if (y1 === y0) { y0 = log ? y0 / 2 : y0 - Math.abs(y0 || 1) * 0.1; y1 = log ? y1 * 2 : y1 + Math.abs(y1 || 1) * 0.1; }
    const pad = log ? (y1 / y0) ** 0.04 : (y1 - y0) * 0.05;
    if (log) { y0 /= pad; y1 *= pad; } else { y1 += pad; if (!(this.spec.zero && y0 === 0)) y0 -= pad; }
    const { left, right, top, bottom } = this.box;
    const place = (y) => (log ? Math.log(y / y0) / Math.log(y1 / y0) : (y - y0) / (y1 - y0));
    this.range = { x0, x1, y0, y1 };
    this.px = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
    this.py = (y) => bottom - place(Math.max(y, log ? y0 : -Infinity)) * (bottom - top);
  }

  isLog() { return typeof this.spec.log === "function" ? this.spec.log() : Boolean(this.spec.log); }

  axes() {
    const { left, right, top, bottom } = this.box, { x0, x1, y0, y1 } = this.range;
    const grid = svg("g", { class: "grid" }, this.svg);
    const ticks = this.isLog() ? logTicks(y0, y1) : niceTicks(y0, y1, Math.max(3, Math.round((bottom - top) / 45)));
    for (const tick of ticks) {
      const y = this.py(tick);
      svg("line", { x1: left, x2: right, y1: y, y2: y }, grid);
      svg("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, this.svg).textContent = this.spec.format(tick, true);
    }
    svg("line", { class: "baseline", x1: left, x2: right, y1: bottom, y2: bottom }, this.svg);
    for (const tick of niceTicks(x0, x1, Math.max(2, Math.floor((right - left) / 92)))) {
      svg("text", { x: this.px(tick), y: bottom + 17, "text-anchor": "middle" }, this.svg).textContent = this.page.xFormat(tick);
    }
    let lastLabel = -Infinity;
    for (const mark of this.spec.marks ? this.spec.marks() : []) {
      if (mark.x < x0 || mark.x > x1) continue;
      const x = this.px(mark.x);
      svg("line", { class: "restart", x1: x, x2: x, y1: top, y2: bottom }, this.svg);
      if (this.spec.wide && x - lastLabel > 60) {
        svg("text", { class: "restart-name", x: x + 4, y: top + 8 }, this.svg).textContent = mark.label;
        lastLabel = x;
      }
    }
  }

  path(points, step) {
    let path = "", open = false, lastY = 0;
    for (const [x, y] of points) {
      if (y === null) { open = false; continue; }
      const [px, py] = [this.px(x).toFixed(1), this.py(y).toFixed(1)];
      path += open ? (step ? `L${px},${lastY}L${px},${py}` : `L${px},${py}`) : `M${px},${py}`;
      open = true; lastY = py;
    }
    return path;
  }

  lines() {
    for (const { points, raw, color, dash, dots, step } of this.series) {
      if (raw) svg("path", { d: this.path(raw), fill: "none", stroke: color, "stroke-width": 1, opacity: 0.22 }, this.svg);
      const line = { d: this.path(points, step), fill: "none", stroke: color, "stroke-width": 1.8, "stroke-linejoin": "round", "stroke-linecap": "round" };
      if (dash) line["stroke-dasharray"] = dash;
      svg("path", { ...line, class: "series" }, this.svg);
      if (dots && points.length < 120) {
        for (const [x, y] of points) if (y !== null) svg("circle", { cx: this.px(x), cy: this.py(y), r: 3, fill: "var(--card)", stroke: color, "stroke-width": 1.6 }, this.svg);
      }
    }
  }

  drawLegend() {
    this.legend.replaceChildren();
    if (this.series.length < 2 && !this.spec.alwaysLegend) return;
    for (const series of this.series) {
      const item = html("span", "", undefined, this.legend);
      const key = svg("svg", { viewBox: "0 0 18 8" }, item);
      const line = svg("line", { x1: 1, x2: 17, y1: 4, y2: 4, stroke: series.color, "stroke-width": 2.2 }, key);
      if (series.dash) line.setAttribute("stroke-dasharray", series.dash);
      html("span", "", series.label, item);
    }
  }

  hover(event) {
    if (!this.series.length) return;
    const area = this.svg.getBoundingClientRect(), { x0, x1 } = this.range, { left, right } = this.box;
    const scale = this.svg.viewBox.baseVal.width / area.width;
    const x = x0 + (((event.clientX - area.left) * scale - left) / (right - left)) * (x1 - x0);
    if (x < x0 - (x1 - x0) * 0.02 || x > x1 + (x1 - x0) * 0.02) { Chart.all.forEach((chart) => chart.clear()); return; }
    Chart.all.forEach((chart) => chart.cross(x));
    this.page.showTooltip(event, this.page.xFormat(x, true), this.rows(x));
  }

  rows(x) {
    return this.series.map((series) => {
      const known = series.points.filter((point) => point[1] !== null);
      const [, y] = known[nearest(known, x)];
      return { label: series.label, color: series.color, value: this.spec.format(y) };
    });
  }

  cross(x) {
    if (!this.overlay) return;
    this.overlay.replaceChildren();
    const { x0, x1 } = this.range;
    if (x < x0 || x > x1) return;
    svg("line", { class: "cross", x1: this.px(x), x2: this.px(x), y1: this.box.top, y2: this.box.bottom }, this.overlay);
    for (const series of this.series) {
      const known = series.points.filter((point) => point[1] !== null);
      const [px, y] = known[nearest(known, x)];
      svg("circle", { cx: this.px(px), cy: this.py(y), r: 3.6, fill: series.color, stroke: "var(--card)", "stroke-width": 1.5 }, this.overlay);
    }
  }

  clear() {
    if (this.overlay) this.overlay.replaceChildren();
    this.page.hideTooltip();
  }
}
