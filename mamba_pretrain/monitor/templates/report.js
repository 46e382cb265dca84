// The page: reads the embedded data and builds tiles, charts and tables.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const COLORS = RUNS.map((_, i) => `var(--s${i % 8})`);
const many = RUNS.length > 1;
const state = { x: RUNS.some((run) => run.train.tokens.some((v) => v)) ? "tokens" : "step", smoothing: Math.max(...RUNS.map((run) => run.train.step.length)) < 100 ? 0 : 0.6, logLoss: false, skip: false, hidden: new Set() };

// ---- numbers

function si(value, digits = 1) {
  for (const [limit, suffix] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit * 0.9995) return trim((value / limit).toFixed(digits)) + suffix;
  }
  return trim(value.toFixed(Math.abs(value) < 10 ? 2 : 0));
}
function trim(text) { return text.includes(".") ? text.replace(/\.?0+$/, "") : text; }
function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.max(0, Math.round(seconds));
  if (s < 60) return `${s}s`;
  if (s < 3600) return `${Math.floor(s / 60)}m ${s % 60}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h ${Math.floor((s % 3600) / 60)}m`;
  return `${Math.floor(s / 86400)}d ${Math.floor((s % 86400) / 3600)}h`;
}
const DASHES = ["5 4", "1.5 3.5", "9 4", "9 3 2 3"];  // with several runs a colour is a run's, and a dash a dataset's
const fixed = (digits) => (value, tick) => (tick ? trim(value.toFixed(digits)) : value.toFixed(digits));
const percent = (value, tick) => (tick ? trim((100 * value).toFixed(1)) : (100 * value).toFixed(1)) + "%";
const tiny = (value) => (value === 0 ? "0" : Math.abs(value) >= 0.01 && Math.abs(value) < 1000 ? trim(value.toPrecision(3)) : value.toExponential(1).replace(".0e", "e"));

// ---- series

const X_NAMES = { tokens: "Tokens", step: "Steps", hours: "Time" };
const page = {
  xName: () => X_NAMES[state.x].toLowerCase(),
  xFormat: (x, exact) => (state.x === "hours" ? duration(x * 3600) : si(x, exact ? 2 : 1) + (exact ? (state.x === "tokens" ? " tokens" : " steps") : "")),
  showTooltip(event, title, rows) {
    const tip = document.getElementById("tooltip");
    tip.replaceChildren();
    html("b", "", title, tip);
    for (const row of rows) {
      const line = html("div", "", undefined, tip);
      html("span", "dot", undefined, line).style.background = row.color;
      html("span", "label", row.label, line);
      html("span", "", row.value, line);
    }
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const flip = event.clientX + width + 28 > document.documentElement.clientWidth;
    tip.style.left = `${Math.max(6, flip ? event.clientX - width - 14 : event.clientX + 14)}px`;
    tip.style.top = `${Math.min(window.innerHeight - height - 8, Math.max(8, event.clientY - height / 2))}px`;
  },
  hideTooltip() { document.getElementById("tooltip").hidden = true; },
};

const shown = () => RUNS.map((run, i) => ({ run, i })).filter(({ i }) => !state.hidden.has(i));
const label = (run, what) => (many ? (what ? `${run.name} · ${what}` : run.name) : what || run.name);

function points(table, key) {
  const xs = table[state.x], ys = table[key] || [];
  const start = state.skip ? xs[xs.length - 1] * 0.05 : -Infinity;
  const found = [];
  for (let i = 0; i < xs.length; i++) if (xs[i] >= start) found.push([xs[i], ys[i] === undefined ? null : ys[i]]);
  return found;
}

function trainSeries(key, { smoothed = false, name = "", dash = "" } = {}) {
  return shown().map(({ run, i }) => {
    const raw = points(run.train, key);
    const soft = smoothed && state.smoothing > 0;
    return { label: label(run, name), color: COLORS[i], dash, points: soft ? smooth(raw, state.smoothing) : raw, raw: soft ? raw : null };
  });
}

function evalSeries(key) {
  return shown().flatMap(({ run, i }) =>
    run.evals.map((table, j) => ({
      label: label(run, table.name), color: many ? COLORS[i] : `var(--s${(j + 1) % 8})`, dash: many ? DASHES[j % DASHES.length] : "", dots: true, points: points(table, key),
    })));
}

function restarts() {
  return shown().flatMap(({ run }) => run.restarts.map((mark) => ({ x: mark[state.x], label: mark.label })));
}

// ---- page

function drawAll() { Chart.all.forEach((chart) => chart.draw()); }

function header() {
  document.getElementById("title").textContent = many ? `${RUNS.length} runs compared` : RUNS[0].name;
  const list = document.getElementById("runs");
  RUNS.forEach((run, i) => {
    const chip = html("button", "run", undefined, list);
    chip.type = "button";
    chip.setAttribute("aria-pressed", "true");
    html("span", "dot", undefined, chip).style.background = COLORS[i];
    if (many) html("span", "", run.name, chip);
    html("span", `status ${run.status}`, run.status, chip);
    html("span", "path", run.status_detail || run.folder, chip);
    if (!many) { chip.style.cursor = "default"; return; }
    chip.title = "Show or hide this run";
    chip.addEventListener("click", () => {
      if (state.hidden.has(i)) state.hidden.delete(i); else state.hidden.add(i);
      chip.setAttribute("aria-pressed", String(!state.hidden.has(i)));
      drawAll();
    });
  });
}

function tiles() {
  const parent = document.getElementById("tiles");
  if (many) return comparison(parent);
  for (const { name, value, unit, under } of RUNS[0].tiles) {
    const tile = html("div", "tile", undefined, parent);
    html("div", "name", name, tile);
    const shownValue = html("div", "value", value, tile);
    if (unit) html("span", "unit", unit, shownValue);
    html("div", "under", under || " ", tile);
  }
}

function comparison(parent) {
  parent.className = "card section";
  const names = RUNS.reduce((all, run) => (run.tiles.forEach((t) => all.includes(t.name) || all.push(t.name)), all), []);
  const cell = (run, name) => { const t = run.tiles.find((x) => x.name === name); return t ? t.value + (t.unit ? ` ${t.unit}` : "") : "–"; };
  table(parent, ["Run", ...names], RUNS.map((run) => [run.name, ...names.map((name) => cell(run, name))]), 1);
}

function table(parent, head, rows, numbersFrom = 99, classes = () => "") {
  const node = html("table", "", undefined, html("div", "scroll", undefined, parent));
  const top = html("tr", "", undefined, html("thead", "", undefined, node));
  head.forEach((text, i) => html("th", i >= numbersFrom ? "number" : "", text, top));
  const body = html("tbody", "", undefined, node);
  rows.forEach((row, r) => {
    const line = html("tr", "", undefined, body);
    row.forEach((text, i) => html("td", (i >= numbersFrom ? "number " : "") + classes(r, i), text === null || text === undefined ? "–" : text, line));
  });
  return node;
}

function section(title, note) {
  const node = html("section", "card section", undefined, document.getElementById("sections"));
  html("h2", "", title, node);
  if (note) html("p", "note", note, node);
  return node;
}

function charts() {
  const parent = document.getElementById("charts");
  const add = (spec) => new Chart({ marks: restarts, ...spec }, parent, page);
  const loss = fixed(4), short = (value, tick) => (tick ? trim(value.toFixed(3)) : loss(value));
  add({ title: "Loss", hint: "nats per token; training smoothed, validation at the circles", wide: true, height: 340, format: short, log: () => state.logLoss, alwaysLegend: true,
    series: () => [...trainSeries("loss", { smoothed: true, name: "train" }), ...evalSeries("loss")] });
  add({ title: "Validation perplexity", hint: "per dataset", format: (v, tick) => (tick ? si(v) : v.toFixed(2)), log: true, series: () => evalSeries("perplexity") });
  add({ title: "Bits per byte", hint: "compares across tokenizers", format: short, series: () => evalSeries("bits_per_byte") });
  add({ title: "Gradient norm", hint: "before clipping, log scale", format: tiny, log: true, series: () => trainSeries("grad_norm", { smoothed: true }) });
  add({ title: "Learning rate", format: tiny, zero: true, series: () => trainSeries("lr") });
  add({ title: "Throughput", hint: "tokens per second, all ranks", format: (v) => si(v), zero: true, series: () => trainSeries("tokens_per_second") });
  add({ title: "Model FLOPs utilisation", hint: "dashed: by 6 x parameters", format: percent, zero: true,
    series: () => [...trainSeries("mfu", { name: "model FLOPs" }), ...trainSeries("mfu_6n", { name: "6N", dash: "5 4" })] });
  add({ title: "Peak memory", hint: "GB, rank 0", format: fixed(2), zero: true, series: () => trainSeries("memory_gb") });
  add({ title: "Waiting for data", hint: "share of the step", format: percent, zero: true, series: () => trainSeries("data_share") });
  for (const { key, title, hint, log } of DATA.layer_charts) {
    add({ title, hint, format: tiny, log, series: () => layerSeries(key) });
  }
}

// Per-layer statistics: five layers from the first to the last; of several runs only those two.
function layerSeries(key) {
  return shown().flatMap(({ run, i }) => {
    const table = run.layers[key];
    if (!table) return [];
    const chosen = table.layers.map((layer, j) => ({
      label: label(run, `layer ${layer}`), color: many ? COLORS[i] : `var(--s${j % 8})`, dash: many && j ? "5 4" : "", points: points({ ...table, y: table.values[j] }, "y"),
    }));
    return many && chosen.length > 2 ? [chosen[0], chosen[chosen.length - 1]] : chosen;
  });
}

function controls() {
  const group = document.getElementById("x-axis");
  for (const key of Object.keys(X_NAMES)) {
    const button = html("button", "", X_NAMES[key], group);
    button.type = "button";
    button.setAttribute("aria-pressed", String(key === state.x));
    button.addEventListener("click", () => {
      state.x = key;
      for (const other of group.children) other.setAttribute("aria-pressed", String(other === button));
      drawAll();
    });
  }
  const slider = document.getElementById("smoothing"), value = document.getElementById("smoothing-value");
  const slide = () => { state.smoothing = Number(slider.value); value.textContent = state.smoothing.toFixed(2); drawAll(); };
  slider.value = state.smoothing;
  value.textContent = state.smoothing.toFixed(2);
  slider.addEventListener("input", slide);
  document.getElementById("log-loss").addEventListener("change", (event) => { state.logLoss = event.target.checked; drawAll(); });
  document.getElementById("skip-start").addEventListener("change", (event) => { state.skip = event.target.checked; drawAll(); });
}

function blends() {
  const runs = RUNS.filter((run) => run.blend.length);
  if (!runs.length) return;
  const node = section("Data blend", "Share of the training tokens each source was given.");
  for (const run of runs) {
    if (many) html("p", "note", run.name, node);
    const bar = html("div", "blend", undefined, node);
    run.blend.forEach((source, i) => {
      const part = html("div", "", undefined, bar);
      part.style.cssText = `flex: ${source.share}; background: var(--s${i % 8})`;
      part.title = `${source.name} ${percent(source.share)}`;
    });
    table(node, ["Source", "Share", "Folder", "Tokens in it", "Epochs"],
      run.blend.map((s) => [s.name, percent(s.share), s.path, s.tokens ? si(s.tokens, 2) : "–", s.epochs === null ? "–" : s.epochs.toFixed(2)]));
  }
}

function samples() {
  if (!RUNS.some((run) => run.samples.length)) return;
  const node = section("Generated text", "The prompt is coloured; the newest continuation stands first.");
  RUNS.forEach((run, i) => {
    const prompts = [...new Set(run.samples.map((sample) => sample.prompt))];
    for (const prompt of prompts) {
      const all = run.samples.filter((sample) => sample.prompt === prompt).reverse();
      sampleCard(node, run, i, all[0]);
      if (all.length < 2) continue;
      const details = html("details", "", undefined, node);
      html("summary", "", `${all.length - 1} earlier`, details);
      all.slice(1).forEach((sample) => sampleCard(details, run, i, sample));
    }
  });
}

function sampleCard(parent, run, i, sample) {
  const card = html("div", "sample", undefined, parent);
  const meta = html("div", "meta", undefined, card);
  html("span", "dot", undefined, meta).style.background = COLORS[i];
  html("span", "", label(run, `step ${sample.step.toLocaleString("en")}`), meta);
  const text = html("pre", "", undefined, card);
  html("span", "prompt", sample.prompt, text);
  text.append(sample.text);
}

function events() {
  const head = [...(many ? ["Run"] : []), "Step", "Time (UTC)", "Event", "Details"];
  const rows = (saves) => RUNS.flatMap((run) => run.events.filter((event) => (event.event === "save") === saves)
    .map((event) => [...(many ? [run.name] : []), event.step.toLocaleString("en"), event.time, event.event, event.details]));
  if (!rows(false).length && !rows(true).length) return;
  const node = section("Events");
  if (rows(false).length) table(node, head, rows(false));
  if (!rows(true).length) return;
  const details = html("details", "", undefined, node);
  html("summary", "", `${rows(true).length} saves`, details);
  table(details, head, rows(true));
}

function checkpoints() {
  const rows = RUNS.flatMap((run) => run.checkpoints.map((c) => [...(many ? [run.name] : []), c.name, si(c.bytes, 2) + "B", c.latest ? "latest" : ""]));
  if (rows.length) table(section("Checkpoints"), [...(many ? ["Run"] : []), "Folder", "Size", ""], rows);
}

function configs() {
  if (!RUNS.some((run) => run.config)) return;
  if (!many) {
    const node = section("Configuration", "The resolved configuration, every default written out.");
    const details = html("details", "", undefined, node);
    html("summary", "", "Show config.yaml", details);
    html("pre", "", RUNS[0].config_text, details);
    return;
  }
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.config)))];
  const differing = keys.filter((key) => new Set(RUNS.map((run) => run.config[key])).size > 1);
  const row = (key) => [key, ...RUNS.map((run) => (key in run.config ? run.config[key] : "–"))];
  const node = section("Configuration", `${differing.length} of ${keys.length} keys differ.`);
  const head = ["Key", ...RUNS.map((run) => run.name)];
  table(node, head, differing.map(row), 99, (_, i) => (i ? "value differs" : "key"));
  const details = html("details", "", undefined, node);
  html("summary", "", `The ${keys.length - differing.length} keys they share`, details);
  table(details, head.slice(0, 2), keys.filter((key) => !differing.includes(key)).map((key) => row(key).slice(0, 2)), 99, (_, i) => (i ? "value" : "key"));
}

header();
tiles();
controls();
charts();
blends();
samples();
events();
checkpoints();
configs();
document.getElementById("footer").textContent = DATA.footer;
drawAll();
document.documentElement.dataset.ready = String(document.querySelectorAll("path.series").length);
