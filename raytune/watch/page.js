"use strict";
// Rows are asked for again and again, and one run besides while it is open. Everything is shown as text, never as HTML.
const token = new URLSearchParams(location.search).get("token");
const find = selector => document.querySelector(selector);
const chosen = () => decodeURIComponent(location.hash.slice(1));
let everyMs = 1000, timer = 0, round = 0;

async function call(path, body) {
  const headers = { Authorization: `Bearer ${token}` };
  if (body) headers["Content-Type"] = "application/json";
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const facts = await response.json();
  if (!response.ok) throw new Error(facts.message);
  return facts;
}

function say(text) {
  find("#message").textContent = text;
  find("#message").hidden = !text;
}

function make(name, text, classes) {
  const element = document.createElement(name);
  if (text !== undefined) element.textContent = text;
  if (classes) element.className = classes;
  return element;
}

function draw(name, attributes) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

// --- Words -------------------------------------------------------------------------------------------------------------------

const number = value => typeof value !== "number" ? value ?? "" : Math.abs(value) >= 1e4 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : value.toPrecision(4);
const gib = bytes => bytes === null ? "-" : (bytes / 2 ** 30).toFixed(1);
const memory = row => row.memory_bytes === null && row.planned_bytes === null ? "" : `${gib(row.memory_bytes)} / ${gib(row.planned_bytes)}`;
const dollars = usd => usd === null ? "" : `$${usd.toFixed(2)}`;
const count = value => value === null ? "" : value >= 1e6 ? `${(value / 1e6).toPrecision(3)}M` : value >= 1e3 ? `${(value / 1e3).toPrecision(3)}k` : value.toFixed(0);

function duration(seconds) {
  if (seconds === null) return "";
  const whole = Math.round(seconds), pad = value => String(value).padStart(2, "0");
  if (whole >= 86400) return `${Math.floor(whole / 86400)}d${pad(Math.floor(whole % 86400 / 3600))}h`;
  if (whole >= 3600) return `${Math.floor(whole / 3600)}h${pad(Math.floor(whole % 3600 / 60))}m`;
  return whole >= 60 ? `${Math.floor(whole / 60)}m${pad(whole % 60)}s` : `${whole}s`;
}

const left = row => row.left_s === null ? "" : `${row.left_is_most ? "≤ " : ""}${duration(row.left_s)}`;
const steps = row => `${row.step}/${row.num_steps ?? "?"}`;

// --- Curves ------------------------------------------------------------------------------------------------------------------

// Equal factors as equal heights, where what comes late would all lie on the ground otherwise.
function scale(values) {
  const finite = values.filter(Number.isFinite);
  const low = Math.min(...finite), high = Math.max(...finite), isLog = low > 0 && high > 10 * low;
  const of = isLog ? Math.log : value => value;
  return { low, high, isLog, height: value => high > low ? (of(value) - of(low)) / (of(high) - of(low)) : .5 };
}

// Pieces between values that are no numbers; x and y from 0 to 1.
function line(points, width, height) {
  let path = "", pen = "M";
  for (const [x, y] of points) {
    if (y === null) { pen = "M"; continue; }
    path += `${pen}${(x * width).toFixed(1)} ${((1 - y) * height).toFixed(1)}`;
    pen = "L";
  }
  return draw("path", { d: path });
}

function sparkline(values) {
  const svg = draw("svg", { width: 110, height: 22, role: "img", "aria-label": "loss of training" });
  if (values.length > 1) {
    const { height } = scale(values);
    svg.append(line(values.map((value, at) => [at / (values.length - 1), Number.isFinite(value) ? height(value) : null]), 110, 22));
  }
  return svg;
}

function figure(name, curve, saves) {
  const element = make("figure"), values = curve.map(([, value]) => value);
  const { low, high, isLog, height } = scale(values);
  element.append(make("figcaption", `${name}${isLog ? ", logarithmic" : ""}${saves.length ? "; dotted: checkpoints" : ""}`));
  if (!Number.isFinite(low)) return element;
  const first = curve[0][0], last = curve.at(-1)[0], x = step => last > first ? (step - first) / (last - first) : .5;
  const svg = draw("svg", { viewBox: "0 0 440 176", preserveAspectRatio: "none", role: "img", "aria-label": `${name}: ${number(values.at(-1))} at step ${last}` });
  const plot = draw("g", { transform: "translate(4 16)" });
  for (const y of [0, 70, 140]) plot.append(draw("line", { x1: 0, x2: 432, y1: y, y2: y }));
  for (const step of saves) if (step >= first && step <= last) plot.append(draw("line", { class: "save", x1: x(step) * 432, x2: x(step) * 432, y1: 0, y2: 140 }));
  plot.append(line(curve.map(([step, value]) => [x(step), Number.isFinite(value) ? height(value) : null]), 432, 140));
  svg.append(plot);
  const ends = make("p", undefined, "note");
  ends.textContent = `${number(high)} highest, ${number(low)} lowest, ${number(values.at(-1))} now; steps ${first} to ${last}`;
  element.append(svg, ends);
  return element;
}

// --- Rows --------------------------------------------------------------------------------------------------------------------

function row(facts) {
  const element = make("tr", undefined, facts.state + (facts.path === chosen() ? " chosen" : ""));
  const name = make("td", undefined, facts.kind), button = make("button", facts.name);
  button.type = "button";
  name.append(button);
  const bar = make("td", undefined, "bar"), progress = make("progress");
  progress.setAttribute("max", facts.num_steps || 1);
  progress.setAttribute("value", Math.min(facts.step, facts.num_steps || 1));
  bar.append(progress);
  const curve = make("td");
  curve.append(sparkline(facts.curve));
  element.append(
    name, make("td", facts.state, "state"), make("td", steps(facts), "number"), bar, make("td", number(facts.loss), "number"),
    make("td", number(facts.validation_loss), "number"), curve, make("td", count(facts.tokens_per_s), "number"),
    make("td", memory(facts), "number"), make("td", left(facts), "number"), make("td", dollars(facts.usd), "number"), make("td", facts.note, "note"));
  element.dataset.path = facts.path;
  return element;
}

// Elements stay, so that a click that has begun ends where it began, and what has the focus keeps it.
function renewed(old, fresh) {
  if (!old) return fresh;
  old.className = fresh.className;
  [...fresh.cells].forEach((cell, at) => { if (old.cells[at].innerHTML !== cell.innerHTML) old.cells[at].replaceChildren(...cell.childNodes); });
  return old;
}

function showRows(facts) {
  find("#storage").textContent = `${facts.storage} · ${facts.rows.filter(one => one.state === "running").length} running`;
  document.title = `raytune · ${facts.storage}`;
  const body = find("#runs tbody"), known = new Map([...body.rows].map(one => [one.dataset.path, one]));
  const shown = facts.rows.map(one => renewed(known.get(one.path), row(one)));
  if (shown.length !== body.rows.length || shown.some((one, at) => one !== body.rows[at])) body.replaceChildren(...shown);
  find("#empty").hidden = facts.rows.length > 0;
}

function showRun(facts) {
  const one = facts.row, section = find("#run");
  section.hidden = false;
  find("#run h2").textContent = `${one.path} · ${one.state}`;
  find("#save").disabled = facts.refusals.save !== null;
  find("#stop").disabled = facts.refusals.stop !== null;
  find("#why").textContent = one.state === "running" || one.state === "starting" ? facts.refusals.save ?? facts.refusals.stop ?? "" : "";
  find("#report").hidden = !facts.report;
  if (facts.report) find("#report").href = facts.report;
  find("dialog p").textContent = facts.warning;
  const shown = [["step", steps(one)], ["loss", number(one.loss)], ["validation loss", number(one.validation_loss)], ["tokens/s", count(one.tokens_per_s)],
    ["GiB of planned", memory(one)], ["left", left(one)], ["at work", duration(one.at_work_s)], ["cost so far", dollars(one.usd)]];
  find(".facts").replaceChildren(...shown.filter(([, value]) => value !== "").map(([name, value]) => {
    const group = make("div");
    group.append(make("dt", name), make("dd", value));
    return group;
  }));
  find("#curves").replaceChildren(...Object.entries(facts.curves ?? {}).map(([name, curve]) => figure(name, curve, facts.saves)));
  for (const name of ["events", "asked"]) {
    const text = [facts[name] ?? ""].flat().join("\n");
    if (find(`#${name}`).textContent !== text) find(`#${name}`).textContent = text;
    find(`#${name}`).parentElement.hidden = !text;
  }
}

// --- Asking ------------------------------------------------------------------------------------------------------------------

async function look() {
  clearTimeout(timer);
  const own = ++round;
  try {
    const rows = await call("/api/rows"), path = chosen();
    const run = path && rows.rows.some(one => one.path === path) ? await call(`/api/run?path=${encodeURIComponent(path)}`) : null;
    if (own !== round) return; // a later look has begun
    showRows(rows);
    if (run) showRun(run); else find("#run").hidden = true;
    everyMs = rows.every_s * 1000;
    if (rows.problem || find("#message").dataset.kind === "problem") say(rows.problem);
    find("#message").dataset.kind = rows.problem ? "problem" : "";
  } catch (error) {
    if (own !== round) return;
    say(error instanceof TypeError ? "The command that serves this page does not answer. Was it ended?" : error.message);
    find("#message").dataset.kind = "problem";
  }
  timer = setTimeout(look, document.hidden ? 10 * everyMs : everyMs);
}

async function wish(name) {
  try {
    say((await call("/api/ask", { path: chosen(), wish: name })).message);
  } catch (error) {
    say(error.message);
  }
  find("#message").dataset.kind = "answer";
  look();
}

find("#runs tbody").addEventListener("click", event => {
  const path = event.target.closest("tr")?.dataset.path;
  if (path) location.hash = encodeURIComponent(path);
});
find("#close").addEventListener("click", () => { location.hash = ""; });
find("#save").addEventListener("click", () => wish("save"));
find("#stop").addEventListener("click", () => find("dialog").showModal());
find("dialog").addEventListener("close", () => { if (find("dialog").returnValue === "yes") wish("stop"); find("dialog").returnValue = ""; });
addEventListener("hashchange", () => { say(""); look(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
look();
