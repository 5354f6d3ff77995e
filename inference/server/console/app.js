// The page: asks for the engine's steps and state, and lets every drawing move.

import { getJson } from "./api.js";
import { Chart, quantiles } from "./chart.js";
import { Theme } from "./color.js";
import { byId, choose, chosen, el, onChoice } from "./dom.js";
import { HeatMap } from "./experts.js";
import { KvGrid } from "./kv.js";
import { Live, count, duration, quantile } from "./live.js";
import { Playground } from "./playground.js";
import { Tip } from "./plot.js";
import { Timeline } from "./timeline.js";

const STEPS_MS = 200;
const STATE_MS = 1000;
const RETRY_MS = 2000;
const CHART_MS = 250;
const KEYS = [
  ["/", "write a prompt"], ["Ctrl Enter", "send it"], ["Esc", "stop the answer"],
  ["1 2 3", "colour tokens: plain, probability, experts"], ["[ ]", "layer before, layer after"], ["P", "pause the drawings"],
  ["+ −", "fewer or more steps in the timeline"], ["T", "light or dark"], ["← → ↑ ↓", "read the drawing or answer that has the focus"],
  ["?", "this list"],
];
const THEME = "turnout-theme";

const stored = localStorage.getItem(THEME);
if (stored) document.documentElement.dataset.theme = stored;

const theme = new Theme([
  "surface", "ink", "ink2", "ink3", "line", "decode", "prefill", "lost", "mine", "free", "cached", "used", "first", "gap",
]);
const tip = new Tip(byId("tip"), byId("voice"));
const live = new Live();
const timeline = new Timeline(byId("timeline"), tip, theme, live);
const kv = new KvGrid(byId("kv"), tip, theme);
const heat = new HeatMap(byId("heat"), tip, theme);
const time = (seconds, exact) => (exact ? duration(seconds) : seconds >= 1 ? `${seconds} s` : `${+(1000 * seconds).toFixed(1)} ms`);
const charts = [
  new Chart(byId("ttft"), tip, theme, live, { kind: "band", series: quantiles("ttft", "first"), format: time, least: 0.002 }),
  new Chart(byId("tpot"), tip, theme, live, { kind: "band", series: quantiles("gaps", "gap"), format: time, least: 0.002 }),
  new Chart(byId("flow"), tip, theme, live, {
    kind: "stack", format: short, least: 10,
    series: [
      { name: "decode, tokens/s", color: "decode", of: (second) => second.decode, idle: 0 },
      { name: "prefill, tokens/s", color: "prefill", of: (second) => second.prefill, idle: 0 },
    ],
  }),
  new Chart(byId("queue"), tip, theme, live, {
    kind: "step", format: short, least: 2,
    series: [
      { name: "running", color: "decode", of: (second) => second.running, idle: 0 },
      { name: "waiting", color: "prefill", of: (second) => second.waiting, idle: 0 },
    ],
  }),
];
const plots = [...charts, timeline, kv, heat];
const playground = new Playground(tip, theme, timeline);
let paused = false;
let mixture = false; // the model has experts

function short(number, exact) {
  if (exact || number < 1000) return Number.isInteger(number) ? count(number) : number.toFixed(1);
  return `${(number / 1000).toFixed(number < 10000 ? 1 : 0)}k`;
}

/** A share for people; what is there is never 0 %. */
function percent(part, whole) {
  const share = (100 * part) / whole;
  return part && share < 0.5 ? "< 1 %" : `${share.toFixed(0)} %`;
}

/** Call again and again, `pause` milliseconds after each answer, while the page is looked at. */
async function repeat(work, pause) {
  for (;;) {
    let rest = pause;
    try {
      if (!document.hidden) await work();
    } catch (error) {
      rest = RETRY_MS;
      phase(error.status ? `error ${error.status}` : "offline", "bad");
    }
    await new Promise((resolve) => setTimeout(resolve, rest));
  }
}

function phase(words, kind) {
  const box = byId("phase");
  if (box.textContent !== words) box.textContent = words;
  box.className = `phase ${kind}`;
}

async function takeSteps() {
  if (paused) return;
  const fresh = live.take(await getJson(`/v1/console/steps?since=${live.last}`));
  timeline.add(fresh);
}

async function takeState() {
  const state = await getJson("/v1/console/state");
  phase(state.phase, state.phase === "ready" ? "good" : "busy");
  byId("model").textContent = state.model;
  document.title = `${state.model} · Turnout`;
  playground.set(state);
  if (!state.settings) return;
  mixture = state.moe !== null;
  byId("dense").hidden = mixture;
  byId("heat").hidden = byId("heat-note").hidden = !mixture;
  timeline.budget = state.settings.max_num_batched_tokens;
  if (paused) return;
  facts(state);
  kv.set(state.kv, state.settings.block_size);
  const [free, cached, used] = kv.totals;
  byId("kv-now").textContent = percent(used, free + cached + used);
  byId("kv-note").replaceChildren(
    ...[["used", used], ["cached", cached], ["free", free]].flatMap(([name, number]) => [
      el("i", { className: `key ${name}` }), `${name} ${count(number)} `,
    ]),
    `· blocks of ${state.settings.block_size} tokens`,
  );
}

function facts({ queue, settings }) {
  const hits = queue.prefix_queries ? percent(queue.prefix_hits, queue.prefix_queries) : "–";
  const rows = [
    ["running", `${queue.running} / ${settings.max_num_seqs}`], ["waiting", queue.waiting], ["prefix hits", hits],
    ["preemptions", count(queue.preemptions)], ["steps", count(queue.steps)], ["tokens", count(queue.computed_tokens)],
  ];
  byId("facts").replaceChildren(...rows.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, `${value}`))));
}

async function takeExperts() {
  if (!mixture || paused) return;
  const span = Number(chosen("window"));
  heat.since = span === 0;
  heat.set(await getJson(`/v1/experts?seconds=${span || 10}`));
  const dead = heat.total.reduce((sum, layer) => sum + layer.dead_experts, 0);
  const idle = heat.layers.reduce((sum, layer) => sum + layer.dead_experts, 0);
  const words = heat.since ? `${dead} dead since start` : `${idle} without a token in ${Math.round(heat.seconds)} s, ${dead} since start`;
  byId("dead").replaceChildren(el("i", { className: "key lost" }, "×"), words, el("i", { className: "key busy" }), "≥ 2 × the mean");
}

/** The numbers beside the charts' titles. */
function numbers() {
  byId("ttft-now").textContent = duration(quantile(live.recent("ttft", 30), 0.5));
  byId("tpot-now").textContent = duration(quantile(live.recent("gaps", 10), 0.5));
  const second = live.seconds.get(Math.floor(live.now) - 1);
  byId("flow-now").textContent = second ? short(second.prefill + second.decode, true) : "0";
  const newest = live.seconds.get(Math.floor(live.now)) ?? second;
  byId("queue-now").textContent = newest?.running ?? 0;
  byId("waiting-now").textContent = newest?.waiting ?? 0;
}

function frame() {
  for (const plot of plots) plot.frame();
  requestAnimationFrame(frame);
}

function retheme() {
  theme.read();
  byId("theme-word").textContent = theme.dark ? "Light" : "Dark";
  byId("ramp").style.background = `linear-gradient(90deg, ${Array.from({ length: 17 }, (_, i) => theme.balance(i / 16)).join(", ")})`;
  timeline.repaint();
  playground.shade();
  for (const plot of plots) plot.dirty = true;
}

function switchTheme() {
  document.documentElement.dataset.theme = theme.dark ? "light" : "dark";
  localStorage.setItem(THEME, document.documentElement.dataset.theme);
  retheme();
}

function pause() {
  paused = !paused;
  byId("pause").setAttribute("aria-pressed", `${paused}`);
  byId("pause-word").textContent = paused ? "Resume" : "Pause";
}

function help() {
  byId("help-dialog").showModal();
}

function turnLayer(by) {
  const input = byId("layer");
  input.value = Number(input.value) + by;
  playground.shade();
}

const ACTIONS = {
  "/": () => byId("prompt").focus(),
  p: pause,
  t: switchTheme,
  "?": help,
  1: () => choose("shade", "plain"),
  2: () => choose("shade", "probability"),
  3: () => choose("shade", "experts"),
  "+": () => timeline.zoom(1.25),
  "-": () => timeline.zoom(0.8),
  "[": () => turnLayer(-1),
  "]": () => turnLayer(1),
};

document.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) return playground.send();
  if (event.key === "Escape") return playground.stop();
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("textarea, select, input:not([type=radio])")) return;
  const action = ACTIONS[event.key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
});

byId("pause").addEventListener("click", pause);
byId("theme").addEventListener("click", switchTheme);
byId("help").addEventListener("click", help);
byId("zoom-in").addEventListener("click", ACTIONS["+"]);
byId("zoom-out").addEventListener("click", ACTIONS["-"]);
byId("shortcuts").append(...KEYS.flatMap(([key, what]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, what)]));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);
onChoice("window", takeExperts);

retheme();
repeat(takeState, STATE_MS);
repeat(takeSteps, STEPS_MS);
repeat(takeExperts, STATE_MS);
setInterval(() => {
  if (paused) return;
  for (const chart of charts) chart.advance();
  numbers();
}, CHART_MS);
requestAnimationFrame(frame);
