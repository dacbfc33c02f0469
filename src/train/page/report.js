"use strict";
// Draws the run in the element "data" into the element "page". Texts only ever become text nodes.

const { about, run } = JSON.parse(document.getElementById("data").textContent);
const { preflight, plan } = about;
const steps = preflight.steps;
const page = document.getElementById("page");
const SVG = "http://www.w3.org/2000/svg";

// ---------------------------------------------------------------- elements

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}
const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const color = (name) => `var(--${name})`;

// ---------------------------------------------------------------- numbers

const grouped = (count) => Math.round(count).toLocaleString("en-US");
function short(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size >= 10000) return grouped(value);
  if (size !== 0 && size < 0.001) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(Number(value.toPrecision(4)));
}
function bytes(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value >= 1e9) return `${(value / 1e9).toFixed(2)} GB`;
  return value >= 1e5 ? `${(value / 1e6).toFixed(1)} MB` : `${(value / 1e3).toFixed(1)} kB`;
}
function clock(seconds) {
  const whole = Math.max(0, Math.round(seconds));
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h > 0 ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}`;
}
const many = (count, what) => `${grouped(count)} ${what}${count === 1 ? "" : "s"}`;
const percent = (part, whole) => `${((100 * part) / Math.max(1, whole)).toFixed(1)} %`;

// ---------------------------------------------------------------- hovering

const tip = el("div", { id: "tip", role: "status" });
function showTip(event, ...rows) {
  tip.replaceChildren(...rows);
  tip.style.display = "block";
  const { width, height } = tip.getBoundingClientRect();
  const left = event.clientX + 14 + width > innerWidth ? event.clientX - 14 - width : event.clientX + 14;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.min(event.clientY + 14, innerHeight - height - 4)}px`;
}
const hideTip = () => { tip.style.display = "none"; };
const swatch = (name) => el("i", { style: `background:${color(name)}` });
const tipRow = (name, label, value) => el("div", { class: "legend" }, el("span", {}, name ? swatch(name) : null, `${label} `, el("b", {}, value)));

// ---------------------------------------------------------------- charts

const HEIGHT = 210, LEFT = 58, RIGHT = 12, TOP = 8, BOTTOM = 24;
const charts = [];

/** Has `draw(width)` fill an SVG element, in units that are pixels: now, and whenever its width changes. */
function sized(drawing, draw) {
  let width = 0;
  const set = (next) => {
    if (next === width) return;
    width = next;
    drawing.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    draw(width);
  };
  set(500);
  new ResizeObserver(([entry]) => set(Math.max(160, Math.round(entry.contentRect.width)))).observe(drawing);
}

/** Round numbers from about `low` to about `high`. */
function ticks(low, high, count) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((digit) => digit * power).find((width) => width >= raw * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const all = [];
  for (let i = first; i * step <= high + step * 1e-9; i += 1) all.push(Number((i * step).toPrecision(12)));
  return all;
}

function bounds(series, log, zero) {
  const values = series.flatMap(({ points }) => points.flatMap((point) => point.slice(1)));
  const usable = values.filter((value) => !log || value > 0);
  let low = Math.min(...usable), high = Math.max(...usable);
  if (log) return [Math.log10(low), Math.max(Math.log10(high), Math.log10(low) + 1e-6)];
  const room = (high - (zero ? 0 : low) || Math.abs(high) || 1) * 0.06;
  return [zero || (low >= 0 && low < (high - low) * 0.8) ? 0 : low - room, high + room];
}

function logTicks(low, high) {
  const all = [];
  for (let power = Math.floor(low); power <= Math.ceil(high); power += 1) {
    for (const digit of high - low > 2.5 ? [1] : [1, 2, 5]) all.push(digit * 10 ** power);
  }
  return all.filter((value) => Math.log10(value) >= low - 1e-9 && Math.log10(value) <= high + 1e-9);
}

/** The point of `points` whose step is nearest to `step`. */
function nearest(points, step) {
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle; else high = middle;
  }
  return Math.abs(points[low][0] - step) <= Math.abs(points[high][0] - step) ? points[low] : points[high];
}

function drawSeries({ points, hue, dots }, x, y) {
  const at = (point, value) => `${x(point[0]).toFixed(1)},${y(value).toFixed(1)}`;
  const shapes = [];
  if (points.some((point) => point.length > 2)) {
    const upper = points.map((point) => at(point, point[3] ?? point[1]));
    const lower = points.map((point) => at(point, point[2] ?? point[1])).reverse();
    shapes.push(svg("polygon", { class: "band", fill: color(hue), points: [...upper, ...lower].join(" ") }));
  }
  shapes.push(svg("polyline", { class: "line", stroke: color(hue), points: points.map((point) => at(point, point[1])).join(" ") }));
  if (dots && points.length <= 60 || points.length === 1) {
    for (const point of points) shapes.push(svg("circle", { cx: x(point[0]), cy: y(point[1]), r: 3, fill: color(hue) }));
  }
  return shapes;
}

function axes(width, x, y, [low, high], log, format) {
  const shapes = [];
  for (const value of log ? logTicks(low, high) : ticks(low, high, 5)) {
    const at = y(value);
    shapes.push(svg("line", { class: "grid-line", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }));
    shapes.push(svg("text", { x: LEFT - 7, y: at + 4, "text-anchor": "end" }, format(value)));
  }
  for (const step of ticks(0, steps.total, Math.min(6, Math.floor(width / 70))).filter(Number.isInteger)) {
    shapes.push(svg("text", { x: x(step), y: HEIGHT - 6, "text-anchor": "middle" }, grouped(step)));
  }
  const vertical = (step, kind, title) => svg("line", { class: kind, x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }, svg("title", {}, title));
  if (steps.epochs > 1 && steps.epochs <= 40) {
    for (let epoch = 1; epoch < steps.epochs; epoch += 1) shapes.push(vertical(epoch * steps.per_epoch, "epoch", `end of epoch ${epoch}`));
  }
  for (const step of run.totals.resumed_after) shapes.push(vertical(step, "resume", `resumed after step ${step}`));
  return shapes;
}

/** A card with curves over the steps; nothing where no curve has a point. `log` offers a logarithmic axis, `zero` begins it at 0. */
function chart(title, candidates, { format = short, tick = format, log = null, zero = false } = {}) {
  const series = candidates
    .map((one) => ({ ...one, points: (run.curves[one.curve] ?? []) }))
    .filter(({ points }) => points.length > 0);
  if (series.length === 0) return null;
  let width = 0;
  const x = (step) => LEFT + ((width - LEFT - RIGHT) * step) / Math.max(1, steps.total);
  const canLog = log !== null && series.every(({ points }) => points.every((point) => point[2] === undefined ? point[1] > 0 : point[2] > 0));
  const state = { log: Boolean(log) && canLog };
  const drawing = svg("svg", { role: "img", "aria-label": `${title} over steps` });
  const cursor = svg("g", {});
  let y = null;
  function draw() {
    const [low, high] = bounds(series, state.log, zero);
    y = (value) => HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * ((state.log ? Math.log10(value) : value) - low)) / (high - low);
    drawing.replaceChildren(...axes(width, x, y, [low, high], state.log, tick), ...series.flatMap((one) => drawSeries(one, x, y)), cursor);
  }
  function point(step) {
    cursor.replaceChildren();
    if (step === null) return;
    cursor.append(svg("line", { class: "cursor", x1: x(step), x2: x(step), y1: TOP, y2: HEIGHT - BOTTOM }));
    for (const { points, hue } of series) {
      const found = nearest(points, step);
      cursor.append(svg("circle", { cx: x(found[0]), cy: y(found[1]), r: 3.5, fill: color(hue), stroke: color("card"), "stroke-width": 1.5 }));
    }
  }
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const share = (((event.clientX - box.left) / box.width) * width - LEFT) / (width - LEFT - RIGHT);
    const step = nearest(series[0].points, Math.min(1, Math.max(0, share)) * steps.total)[0];
    charts.forEach((other) => other(step));
    showTip(event, el("div", { class: "soft" }, `step ${grouped(step)}`), ...series.map(({ points, hue, label }) => {
      const found = nearest(points, step);
      const range = found.length > 2 ? ` (${format(found[2])} to ${format(found[3])})` : "";
      const other = found[0] === step ? "" : ` at ${grouped(found[0])}`;
      return tipRow(hue, label, format(found[1]) + range + other);
    }));
  });
  drawing.addEventListener("pointerleave", () => { hideTip(); charts.forEach((other) => other(null)); });
  charts.push(point);
  sized(drawing, (pixels) => {
    width = pixels;
    draw();
  });
  const toggle = canLog ? el("button", { type: "button", "aria-pressed": state.log, onclick: (event) => {
    state.log = !state.log;
    event.currentTarget.setAttribute("aria-pressed", state.log);
    draw();
  } }, "log") : null;
  const legend = el("div", { class: "legend" }, series.map(({ curve, label, hue }) => {
    const [kind, key] = curve.split("/");
    return el("span", {}, swatch(hue), `${label} `, el("b", {}, format(run.last[kind][key])));
  }), toggle);
  return el("section", { class: "card chart" }, el("div", { class: "title" }, el("h3", {}, title), legend), drawing);
}

/** The axes and columns of a histogram; `told(row)` is what hovering over one says. */
function columnShapes(width, rows, most, hue, mark, told) {
  const shapes = [], base = HEIGHT - BOTTOM, wide = (width - LEFT - RIGHT) / rows.length;
  for (const value of ticks(0, most, 3).filter(Number.isInteger)) {
    const at = base - ((base - TOP) * value) / most;
    shapes.push(svg("line", { class: "grid-line", x1: LEFT, x2: width - RIGHT, y1: at, y2: at }), svg("text", { x: LEFT - 7, y: at + 4, "text-anchor": "end" }, grouped(value)));
  }
  const longest = Math.max(...rows.map((row) => row.name.length));
  const every = Math.ceil((longest * 7 + 10) / wide);
  rows.forEach((row, i) => {
    const height = row.count > 0 ? Math.max(1.5, ((base - TOP) * row.count) / most) : 0, left = LEFT + i * wide;
    const gap = Math.min(wide * 0.12, 10), breadth = Math.min(wide - 2 * gap, 90);
    shapes.push(svg("rect", {
      class: "hit", x: left + (wide - breadth) / 2, y: base - height, width: breadth, height, rx: 2, fill: color(hue),
      onpointermove: (event) => showTip(event, el("div", { class: "soft" }, row.title ?? row.name), told(row)),
      onpointerleave: hideTip,
    }));
    if (i % every === 0) shapes.push(svg("text", { x: left + wide / 2, y: HEIGHT - 6, "text-anchor": "middle" }, row.name));
  });
  if (mark !== null && mark.at <= rows.length) {
    const x = LEFT + mark.at * wide, late = mark.at > rows.length * 0.7;
    shapes.push(svg("line", { class: "resume", x1: x, x2: x, y1: TOP, y2: base }), svg("text", { x: x + (late ? -6 : 6), y: TOP + 10, "text-anchor": late ? "end" : "start" }, mark.text));
  }
  return shapes;
}

/** A card with a column for each of `rows`, {name, count, title}; `mark` is a vertical line. */
function columns(title, note, rows, hue, mark = null) {
  if (rows.length === 0) return null;
  const most = Math.max(1, ...rows.map((row) => row.count)), all = rows.reduce((sum, row) => sum + row.count, 0);
  const drawing = svg("svg", { role: "img", "aria-label": title });
  sized(drawing, (width) => drawing.replaceChildren(...columnShapes(width, rows, most, hue, mark, (row) => tipRow(hue, note, `${grouped(row.count)}, ${percent(row.count, all)}`))));
  return el("section", { class: "card chart" }, el("div", { class: "title" }, el("h3", {}, title), el("span", { class: "soft" }, `${grouped(all)} ${note}`)), drawing);
}

// ---------------------------------------------------------------- sections

const section = (title, ...children) => {
  const shown = children.flat().filter(Boolean);
  return shown.length > 0 ? [el("h2", {}, title), ...shown] : [];
};
const gridOf = (kind) => (...children) => children.some(Boolean) ? el("div", { class: kind }, children.filter(Boolean)) : null;
const [grid, wideGrid] = [gridOf("grid"), gridOf("grid two")];
const table = (rows, ...head) => el("table", {}, head.length > 0 ? el("tr", {}, head) : null, rows);
const row = (name, ...values) => el("tr", {}, el("td", { class: "name" }, name), values.map((value) => el("td", {}, value)));
const fact = (value, name, hint) => el("div", { class: "card fact", title: hint ?? null }, el("b", {}, value), el("span", {}, name));

const METRICS = [["ndcg@10", "nDCG@10", "blue"], ["mrr@10", "MRR@10", "orange"], ["map", "MAP", "green"], ["recall@10", "Recall@10", "violet"]];

function header() {
  const { totals, last } = run;
  const tone = { finished: "good", "stopped early": "good", failed: "bad", preempted: "now", training: "now" }[run.status];
  const updated = el("span", { class: "soft" });
  const age = () => Date.now() / 1000 - run.written;
  const tell = () => {
    const when = new Date(run.written * 1000).toLocaleString();
    const ago = age() < 90 ? `${Math.max(0, Math.round(age()))} s ago` : when;
    const silent = age() > 900 ? "; it may have been stopped since" : "";
    updated.textContent = run.status === "training" ? `written ${ago}${silent}` : `${run.status} ${when}`;
  };
  tell();
  if (run.status === "training") {
    setInterval(tell, 1000);
    // A page that is no longer written belongs to a run that was killed.
    setInterval(() => { if (!document.hidden && age() < 3600 && tip.style.display !== "block") location.reload(); }, 20000);
  }
  const validation = run.best ?? last.validation;
  const main = METRICS.find(([key]) => validation?.[key] !== undefined);
  return [
    el("div", { class: "head" }, el("h1", {}, about.name || "run"), el("span", { class: `chip ${tone}` }, run.status), updated),
    el("p", { class: "soft" }, `${plan.model.model_name_or_path} · ${plan.loss_type} · ${plan.data.train_dataset}`),
    el("div", { class: "bar", role: "progressbar", "aria-valuenow": totals.step, "aria-valuemax": steps.total }, el("i", { style: `width:${(100 * totals.step) / Math.max(1, steps.total)}%;background:${color("blue")}` })),
    el("div", { class: "facts" },
      fact(grouped(totals.step), `of ${many(steps.total, "step")}, ${many(steps.epochs, "epoch")}`),
      main ? fact(validation[main[0]].toFixed(4), `${main[1]}, ${run.best ? "best" : "last"}, step ${grouped(validation.step)}`) : null,
      last.train ? fact(short(last.train.loss), "training loss") : null,
      last.train ? fact(clock(totals.elapsed_s), run.status === "training" ? `trained, ${clock(last.train.left_s)} left` : "training time", "validation and saving left out") : null,
      last.train ? fact(short(totals.pairs / Math.max(1e-9, totals.elapsed_s)), "pairs/s on average") : null,
      last.train ? fact(short(totals.tokens / Math.max(1e-9, totals.elapsed_s)), "tokens/s on average") : null,
      last.memory || last.train?.memory_bytes ? fact(bytes(last.memory ? last.memory.peak_gpu || last.memory.peak_process : last.train.memory_bytes), last.memory?.peak_gpu ? "peak GPU memory" : "peak memory of a worker") : null),
    preflight.warnings.map((text) => el("div", { class: "card warn" }, text)),
  ];
}

function curves() {
  return section("Curves", wideGrid(
    chart("Loss", [{ curve: "train/loss", label: "training", hue: "blue" }, { curve: "validation/loss", label: "validation", hue: "orange", dots: true }], { log: false }),
    chart("Ranking", METRICS.map(([key, label, hue]) => ({ curve: `validation/${key}`, label, hue, dots: true }))),
    chart("Learning rate", [{ curve: "train/lr", label: "lr", hue: "violet" }], { zero: true }),
    chart("Gradient norm", [{ curve: "train/grad_norm", label: "2-norm", hue: "green" }], { log: false }),
    chart("Throughput", [{ curve: "train/pairs_per_s", label: "pairs/s", hue: "blue" }], { zero: true }),
    chart("Memory of rank 0", [{ curve: "train/memory_bytes", label: "peak", hue: "violet" }], { format: bytes, tick: (value) => bytes(value).replace(/\.0+ /, " "), zero: true })));
}

function ranking(query) {
  const line = (hit, relevant) => {
    const text = el("div", { class: "document", onclick: (event) => event.currentTarget.classList.toggle("whole") }, hit.text);
    return el("tr", { class: relevant ? "relevant" : null }, el("td", { class: "number" }, String(hit.rank)), el("td", { class: "number" }, hit.score.toFixed(3)), el("td", { class: "number" }, short(hit.label)), el("td", {}, text));
  };
  const rest = query.relevant.rank > query.top.length ? [query.relevant] : [];
  const rows = [...query.top, ...rest].map((hit) => line(hit, hit.rank === query.relevant.rank));
  return table(rows, el("th", { class: "number" }, "rank"), el("th", { class: "number" }, "score"), el("th", { class: "number" }, "label"), el("th", {}, "document"));
}

/** The first, best and last figures of the validations. */
function progress() {
  const figures = [["loss", "loss"], ...METRICS].filter(([key]) => run.curves[`validation/${key}`]);
  if (figures.length === 0) return null;
  const at = (key, pick) => {
    const [step, value] = pick(run.curves[`validation/${key}`]);
    return el("td", { class: "number", title: `step ${grouped(step)}` }, value.toFixed(4));
  };
  const better = (key) => (a, b) => (key === "loss" ? b[1] < a[1] : b[1] > a[1]) ? b : a;
  const rows = figures.map(([key, label]) => el("tr", {}, el("td", {}, label), at(key, (all) => all[0]), at(key, (all) => all.reduce(better(key))), at(key, (all) => all[all.length - 1])));
  const head = ["", "first", "best", "last"].map((name, i) => el("th", { class: i > 0 ? "number" : null }, name));
  const { queries: count, skipped } = run.last.validation;
  const left = skipped > 0 ? `; ${grouped(skipped)} without a relevant document are left out` : "";
  return el("section", { class: "card" }, el("div", { class: "title" }, el("h3", {}, "Validation figures"), el("span", { class: "soft" }, count === undefined ? "" : `over ${grouped(count)} queries${left}`)), table(rows, ...head));
}

function queries() {
  if (run.queries === null) return [];
  const { bins, worst, step } = run.queries;
  const rows = bins.map((count, i) => ({ name: `${i / 10}`, title: `nDCG@10 from ${i / 10} to ${(i + 1) / 10}`, count }));
  const list = worst.map((query, i) => el("details", { class: "card", open: i === 0 ? "" : null },
    el("summary", {}, el("span", { class: "query" }, query.query), el("span", { class: "soft" }, `relevant at ${query.relevant.rank} of ${query.hits}`), el("span", { class: "chip" }, `nDCG@10 ${query.ndcg.toFixed(3)}`)),
    el("div", {}, el("p", { class: "soft mono" }, `${preflight.validation.load.path}:${query.line}`), ranking(query))));
  const none = worst.length === 0 ? el("p", { class: "soft between" }, "Every query is ranked perfectly.") : null;
  return section(`Validation queries after step ${grouped(step)}`, wideGrid(columns("Queries by nDCG@10", "queries", rows, "blue"), progress()),
    worst.length > 0 ? el("p", { class: "soft between" }, `The ${worst.length} worst, with the first documents of their ranking; the most relevant document is shaded.`) : none, list);
}

function labelRows(labels) {
  if (labels.Values) return labels.Values.map(([value, count]) => ({ name: short(value), title: `label ${short(value)}`, count }));
  const { min, max, counts } = labels.Bins, edge = (i) => min + ((max - min) * i) / counts.length;
  return counts.map((count, i) => ({ name: short(edge(i)), title: `label from ${short(edge(i))} to ${short(edge(i + 1))}`, count }));
}

function dataset(name, { load, lengths }) {
  const rows = lengths.bins.map((count, i) => ({ name: grouped(i * lengths.bin_width + 1), title: `${grouped(i * lengths.bin_width + 1)} to ${grouped((i + 1) * lengths.bin_width)} tokens`, count }));
  const sample = lengths.measured < lengths.pairs ? "pairs measured" : "pairs";
  const dropped = Object.entries(load.dropped).map(([why, { count, first_line: first }]) => `${grouped(count)} ${why}, first at line ${first}`);
  return [
    el("section", { class: "card" }, el("div", { class: "title" }, el("h3", {}, name)), table([
      row("file", load.path), row("form", load.kind), row("records", grouped(load.records)), row("pairs", grouped(load.pairs)), row("queries", grouped(load.queries)),
      row("tokens", `half up to ${grouped(lengths.percentiles[0])}, 90 % up to ${grouped(lengths.percentiles[1])}, 99 % up to ${grouped(lengths.percentiles[2])}, longest ${grouped(lengths.longest)}`),
      row("truncated", `${percent(lengths.truncated, lengths.measured)} at max_len ${grouped(lengths.max_len)}`),
      lengths.long_queries > 0 ? row("long queries", `${grouped(lengths.long_queries)} alone exceed max_len, first at line ${lengths.long_query_lines.join(", ")}`) : null,
      dropped.length > 0 ? row("dropped", dropped.join("; ")) : null, ...load.notes.map((note) => row("note", note))].filter(Boolean))),
    columns(`Labels, ${name}`, "pairs", labelRows(load.labels), "green"),
    columns(`Tokens of a pair, ${name}`, sample, rows, "violet", { at: lengths.max_len / lengths.bin_width, text: `max_len ${grouped(lengths.max_len)}` }),
  ];
}

function data() {
  const single = preflight.epoch.single_label_groups;
  return section("Data",
    el("p", { class: "soft lead" }, `${grouped(preflight.epoch.pairs)} pairs an epoch in ${grouped(steps.per_epoch)} steps of ${grouped(steps.items)} ${steps.unit} over ${many(steps.workers, "worker")}` + (single > 0 ? `; ${grouped(single)} groups left out because their labels are equal` : "")),
    grid(...dataset("training", preflight.train)), preflight.validation ? el("div", { class: "between" }) : null, preflight.validation ? grid(...dataset("validation", preflight.validation)) : null);
}

function memory() {
  const { held, working, activations } = preflight.memory, counted = run.last.memory;
  const kinds = [["parameters", "blue"], ["gradients", "orange"], ["states", "green"], ["host", "violet"]];
  const names = { states: "optimizer states", host: "offloaded to the host" };
  const cell = (value) => el("td", { class: "number" }, value === undefined ? "–" : bytes(value));
  const rows = kinds.filter(([kind]) => kind !== "host" || held.host > 0).map(([kind, hue]) => el("tr", {}, el("td", {}, el("span", { class: "key" }, swatch(hue), names[kind] ?? kind)), cell(held[kind]), cell(counted?.held[kind]), cell(counted?.peak[kind])));
  rows.push(el("tr", {}, el("td", {}, "gathered while in use"), cell(working), cell(), cell()), el("tr", {}, el("td", {}, "activations, at most"), cell(activations), cell(), cell()));
  if (counted) rows.push(el("tr", {}, el("td", {}, "whole process"), cell(), cell(), cell(counted.peak_process)));
  if (counted?.peak_gpu) rows.push(el("tr", {}, el("td", {}, "on a GPU"), cell(), cell(), cell(counted.peak_gpu)));
  const head = ["of a worker", "forecast", "counted", "counted, peak"].map((name, i) => el("th", { class: i > 0 ? "number" : null }, name));
  const environment = about.environment.rows.map(([name, value]) => el("tr", {}, el("td", { class: "name" }, name), el("td", { class: "mono" }, value)));
  const model = preflight.model;
  environment.unshift(row("started", new Date(about.environment.started * 1000).toLocaleString()), row("model", `${model.family}, ${(model.parameters / 1e6).toFixed(1)} M parameters, ${grouped(model.positions)} positions` + (model.revision ? `, revision ${model.revision}` : "")));
  return section("Memory and environment", wideGrid(el("section", { class: "card" }, table(rows, ...head)), el("section", { class: "card" }, table(environment))));
}

function configuration() {
  const shown = (value) => value === null ? "none" : typeof value === "string" ? value || '""' : JSON.stringify(value);
  const training = { ...plan.training, loss_type: plan.loss_type };
  const body = el("table", { class: "settings" });
  const toggle = el("button", { type: "button", "aria-pressed": "false", onclick: (event) => {
    const all = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", all);
    draw(all);
  } }, "show defaults");
  function draw(all) {
    body.replaceChildren();
    for (const [name, fields] of Object.entries({ ...plan, training })) {
      if (fields === null || typeof fields !== "object") continue;
      const rows = Object.entries(fields).filter(([key]) => all || about.origins[key]).map(([key, value]) => el("tr", { class: about.origins[key] ? null : "default" }, el("td", { class: "mono" }, key), el("td", { class: "mono" }, shown(value)), el("td", { class: "soft" }, about.origins[key] ?? "default")));
      if (rows.length > 0) body.append(el("tr", {}, el("th", { colspan: 3 }, name)), ...rows);
    }
  }
  draw(false);
  const notes = [...about.notices, ...preflight.notes].map((note) => el("p", { class: "soft" }, note));
  return section("Configuration", el("section", { class: "card" }, el("div", { class: "title" }, el("h3", {}, "Settings and where they were given"), toggle), body, notes));
}

document.title = `${about.name} · ${run.status}`;
const nothing = Object.keys(run.curves).length === 0 ? el("p", { class: "card soft" }, "No step has been logged yet.") : null;
page.append(...[header(), nothing, curves(), queries(), data(), memory(), configuration()].flat(2).filter(Boolean));
document.body.append(tip);
