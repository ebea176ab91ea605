"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/* Makes an element; text is always text, never HTML. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/* Light and dark. */
function keep(theme) { try { localStorage.setItem("kdzoo-theme", theme); } catch { /* a page from disk may not */ } }
function kept() { try { return localStorage.getItem("kdzoo-theme") || ""; } catch { return ""; } }
byId("theme").value = kept();
document.documentElement.dataset.theme = kept();
byId("theme").addEventListener("change", (event) => {
  document.documentElement.dataset.theme = event.target.value;
  keep(event.target.value);
});

/* Sorting: by the number that a cell begins with, else by its text; what is empty stands last. */
function keyOf(cell) {
  const text = cell.textContent.trim().replace(/,/g, "").replace("\u2212", "-").replace(/^</, "");
  const number = parseFloat(text);
  return cell.classList.contains("n") && !Number.isNaN(number) ? number : text;
}
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = head.closest("table").tBodies[0];
    const column = head.cellIndex, down = head.getAttribute("aria-sort") !== "descending" && head.classList.contains("n")
      || head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const rows = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
    rows.sort(([a], [b]) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      const order = typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
      return down ? -order : order;
    });
    body.append(...rows.map(([, row]) => row));
  });
}
for (const box of document.querySelectorAll(".more-columns")) {
  box.addEventListener("change", () => box.closest("section").querySelector("table").classList.toggle("all", box.checked));
}

/* Filtering: rows by method and pair, sections by data. Figures follow. */
function matches(method) { return method.toLowerCase().includes(byId("method").value.trim().toLowerCase()); }
function filter() {
  const pair = byId("pair").value, of = byId("data-of").value;
  let shown = 0, all = 0;
  for (const section of document.querySelectorAll("section.data")) {
    const rows = [...section.querySelectorAll("tbody tr")];
    for (const row of rows) row.hidden = !matches(row.dataset.method) || (pair !== "" && row.dataset.pair !== pair);
    const left = rows.filter((row) => !row.hidden).length;
    section.hidden = (of !== "" && section.dataset.of !== of) || left === 0;
    all += rows.length;
    shown += section.hidden ? 0 : left;
  }
  byId("count").textContent = shown === all ? "" : `${shown} of ${all} rows`;
}
function follow(figure) {
  const choice = figure.querySelector("select[name=pair]"), pair = byId("pair").value;
  if (choice && [...choice.options].some((option) => option.value === pair)) choice.value = pair;
  if (figure.drawn) figure.redraw();
}
for (const [id, event] of [["method", "input"], ["pair", "change"], ["data-of", "change"]]) {
  byId(id).addEventListener(event, () => {
    filter();
    document.querySelectorAll("figure[data-figure]").forEach(follow);
  });
}

/* Figures. */
const LAYOUT = {
  autosize: true, height: 380, margin: { l: 64, r: 16, t: 8, b: 52 }, hovermode: "closest", hoverdistance: 40,
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false,
  font: { family: getComputedStyle(document.body).fontFamily, size: 13 },
  hoverlabel: { align: "left", namelength: -1, font: { size: 13 } },
  legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom" },
};
const CONFIG = { displayModeBar: false, responsive: true, doubleClick: "autosize" };
function joined(target, more) {
  const result = { ...target };
  for (const [key, value] of Object.entries(more || {})) {
    const nested = value && typeof value === "object" && !Array.isArray(value);
    result[key] = nested ? joined(result[key], value) : value;
  }
  return result;
}
function titled(layout) {
  for (const axis of ["xaxis", "yaxis"]) {
    const title = layout[axis] && layout[axis].title;
    if (typeof title === "string") layout[axis] = { ...layout[axis], title: { text: title, standoff: 10, font: { size: 13 } } };
  }
  return layout;
}
/* Gives a <figure> the choices of a figure, and draws it as they stand. */
function prepare(element, figure) {
  const selects = figure.selects.filter((one) => one.options.length > 1).map((one) => {
    const select = make("select", { name: one.name }, ...one.options.map((option) => make("option", {}, option)));
    select.addEventListener("change", () => element.redraw());
    element.querySelector(".choices").append(make("label", {}, `${one.label} `, select));
    return select;
  });
  const plot = element.querySelector(".plot");
  element.redraw = () => {
    const chosen = Object.fromEntries(figure.selects.map((one) => [one.name, one.options[0]]));
    for (const select of selects) chosen[select.name] = select.value;
    const traces = figure.traces.filter((trace) => Object.entries(chosen).every(([name, value]) => trace.meta[name] === value)
      && (trace.meta.method === undefined || matches(trace.meta.method)));
    let layout = joined(LAYOUT, figure.layout);
    for (const [name, value] of Object.entries(chosen)) layout = joined(layout, (figure.layouts[name] || {})[value]);
    Plotly.react(plot, traces, titled(layout), CONFIG);
    if (!element.drawn) {
      element.drawn = true;
      walk(plot);
      plot.on("plotly_click", ({ points: [point] }) => {
        const { run } = point.data.meta;
        if (run !== undefined) choose(run);
      });
    }
  };
}
/* Arrow keys step through the points of a figure: left and right along a curve, up and down to the next one. */
function walk(plot) {
  let curve = 0, point = -1;
  plot.addEventListener("keydown", (event) => {
    const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowUp: [1, 0], ArrowDown: [-1, 0] }[event.key];
    if (!step || !plot.data.length) return;
    event.preventDefault();
    const count = plot.data.length;
    curve = (((curve + step[0]) % count) + count) % count;
    const points = plot.data[curve].y.length;
    point = Math.max(0, Math.min(points - 1, point + step[1]));
    Plotly.Fx.hover(plot, [{ curveNumber: curve, pointNumber: point }]);
  });
}

/* One run. */
const BLUE = "#0072B2", ORANGE = "#D55E00", GRAY = "#808080", MOST = 24;
function byClass(run, names) {
  const other = run.baseline === null ? undefined : data.runs[run.baseline].accuracy;
  const beside = other || run.teacher || run.accuracy;
  let rows = run.accuracy.map((value, i) => ({ i, value, change: value - beside[i] })).filter((row) => row.value !== null);
  rows.sort((a, b) => a.change - b.change || a.i - b.i);
  const all = rows.length;
  if (all > MOST) rows = [...rows.slice(0, MOST / 2), ...rows.slice(-MOST / 2)];
  const cut = (name) => (name.length > 24 ? `${name.slice(0, 23)}\u2026` : name).replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const trace = (name, values, color, symbol, size) => ({
    type: "scatter", mode: "markers", name, x: rows.map((row) => values[row.i]), y: rows.map((row) => row.i),
    text: rows.map((row) => cut(names[row.i])), hovertemplate: `<b>%{text}</b><br>${name}: %{x:.1f} %<extra></extra>`,
    marker: { color, symbol, size, line: { width: 2, color } }, meta: {},
  });
  const traces = [];
  if (run.teacher) traces.push(trace("teacher", run.teacher, GRAY, "line-ns-open", 10));
  if (other) traces.push(trace(cut(data.baseline), other, ORANGE, "diamond-open", 12));
  traces.push(trace("this student", run.accuracy, BLUE, "circle", 6));
  const layout = {
    height: 110 + 19 * rows.length,
    xaxis: { title: `${run.words[1]} on the images of a class (%)`, zeroline: false },
    yaxis: { type: "category", categoryorder: "array", categoryarray: rows.map((row) => row.i), showgrid: true, automargin: true,
      tickvals: rows.map((row) => row.i), ticktext: rows.map((row) => cut(names[row.i])) },
  };
  const said = (other || run.teacher ? `Below are the classes that lose most against ${other ? data.baseline : "the teacher"}, above those that gain most.` : "")
    + (all > MOST ? ` Shown are ${MOST} of ${all} classes.` : "");
  const [first, ...rest] = run.words[1];
  return block(`${first.toUpperCase()}${rest.join("")} by class`, said, { traces, layout, selects: [], layouts: {} });
}
function block(title, said, figure) {
  const element = make("figure", {}, make("figcaption", {}, make("h3", {}, title), make("p", { class: "quiet" }, said)),
    make("div", { class: "choices" }), make("div", { class: "plot", tabindex: "0", role: "img", "aria-label": title }));
  prepare(element, figure);
  return element;
}
function confusions(run, names) {
  const head = ["true class", "taken for", "student", "teacher"].map((title, i) => make("th", { class: i > 1 ? "n" : "" }, title));
  const rows = run.confusions.map(([label, taken, ours, theirs]) => make("tr", {}, make("td", {}, names[label]),
    make("td", {}, names[taken]), make("td", { class: "n" }, `${ours}`), make("td", { class: "n" }, `${theirs}`)));
  return make("div", {}, make("h3", {}, "Confusions that the student has and the teacher has not"),
    make("p", { class: "quiet" }, rows.length ? "Number of test images that each takes for a wrong class, where the student does so more often."
      : "None: the student confuses no two classes more often than its teacher."),
    rows.length ? make("div", { class: "scroll" }, make("table", { class: "plain" }, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))) : "");
}
function mistakes(run, names) {
  const items = run.mistakes.map((one) => make("li", {}, make("img", { src: one.picture, alt: `test image ${one.title}` }),
    make("strong", {}, names[one.student]), ` (${one.confidence} %)`, make("br"), `${run.words[0]}: ${names[one.label]}`, make("br"),
    one.teacher === null || !run.teacher ? "" : `teacher: ${names[one.teacher]}`, make("div", { class: "quiet" }, one.title)));
  return make("div", { class: "wide" }, make("h3", {}, "Surest mistakes"),
    make("p", { class: "quiet" }, items.length ? "Test images that are taken for another class with the highest probability: what the student takes them for, and how surely."
      : "None: no test image is taken for another class."),
    make("ul", { class: "mistakes" }, ...items));
}
function copied(title, text, said) {
  const pre = make("pre", { tabindex: "0" }, text), button = make("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", () => {
    getSelection().selectAllChildren(pre);
    document.execCommand("copy");
    button.textContent = "Copied";
  });
  return make("div", {}, make("h3", {}, title), make("p", { class: "quiet" }, `${said} `, button), pre);
}
function show(index) {
  const run = data.runs[index], parts = [];
  if (!run) return;
  const names = data.classes[run.classes];
  if (run.notes.length) parts.push(make("ul", { class: "wide notes" }, ...run.notes.map((note) => make("li", {}, note))));
  if (run.accuracy) parts.push(byClass(run, names));
  const side = make("div", {});
  if (run.confusions) side.append(confusions(run, names));
  if (run.spectrum) side.append(block("Frequencies of the feature maps", "By band, in cycles per image.", run.spectrum));
  else side.append(make("div", {}, make("h3", {}, "Frequencies of the feature maps"),
    make("p", { class: "quiet" }, "Not measured. This command measures them, and the next report shows them:"),
    make("pre", { tabindex: "0" }, run.spectrum_command)));
  parts.push(side);
  if (run.mistakes) parts.push(mistakes(run, names));
  if (run.command) parts.push(copied("Command", run.command, run.made_in ? `Makes this run again, in ${run.made_in}.` : "Makes this run again."));
  const facts = make("dl", {}, ...run.facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
  parts.push(make("div", {}, make("h3", {}, "Versions, device and data"), facts));
  if (run.config) parts.push(make("details", { class: "wide" }, make("summary", {}, "All settings (config.yaml)"), make("pre", { tabindex: "0" }, run.config)));
  byId("one-run").replaceChildren(make("div", { class: "pane" }, ...parts));
  if (window.Plotly) for (const figure of byId("one-run").querySelectorAll("figure")) figure.redraw();
}
function choose(index) {
  byId("run").value = index;
  show(index);
  byId("run").focus();
}
byId("run").addEventListener("change", (event) => show(event.target.value));
byId("run").value = data.first;
show(data.first);

/* plotly.js lies packed in the page. A figure is drawn when it comes into view, and all of them for the printer. */
const figures = [...document.querySelectorAll("figure[data-figure]")];
for (const element of figures) prepare(element, data.figures[element.dataset.figure]);
async function unpacked() {
  const bytes = Uint8Array.from(atob(byId("plotly").textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
unpacked().then((code) => {
  document.head.append(make("script", {}, code));
  show(byId("run").value);
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) if (isIntersecting && !target.drawn) target.redraw();
  }, { rootMargin: "600px" });
  figures.forEach((element) => seen.observe(element));
  const plots = () => document.querySelectorAll(".js-plotly-plot");
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details.notes").forEach((details) => { details.open = true; });
    figures.filter((element) => !element.drawn).forEach((element) => element.redraw());
    plots().forEach((plot) => Plotly.relayout(plot, { autosize: false, width: 680 }));
  });
  addEventListener("afterprint", () => plots().forEach((plot) => Plotly.relayout(plot, { autosize: true, width: null })));
  document.documentElement.dataset.ready = "true";
});
