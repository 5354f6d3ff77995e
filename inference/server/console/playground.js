// The playground: a request, its stream, and what it took.

import { stream } from "./api.js";
import { expertColor } from "./color.js";
import { byId, chosen, el, onChoice } from "./dom.js";
import { duration } from "./live.js";
import { buildSettings, readSettings, showSettings } from "./settings.js";
import { TokenView, surprise } from "./tokens.js";

const PATHS = { chat: "/v1/chat/completions", complete: "/v1/completions" };

export class Playground {
  constructor(tip, theme, timeline) {
    this.tip = tip;
    this.timeline = timeline;
    this.shades = { mode: chosen("shade"), layer: 0, layers: [], experts: 0, theme };
    this.model = null;
    this.history = [];
    this.views = [];
    this.running = null;
    buildSettings(byId("first-settings"), byId("settings"));
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.stop());
    byId("clear").addEventListener("click", () => this.clear());
    byId("layer").addEventListener("input", () => this.shade());
    onChoice("shade", () => this.shade());
    onChoice("endpoint", () => this.endpoint());
    this.endpoint();
    this.shade();
  }

  /** Learn about the model from `/v1/console/state`. */
  set(state) {
    this.model = state.phase === "ready" ? state.model : null;
    const layers = state.moe?.routed_layers ?? [];
    if (layers.join() !== this.shades.layers.join()) {
      this.shades.layers = layers;
      this.shades.experts = layers.length ? state.moe.num_experts : 0;
      byId("layer").max = Math.max(0, layers.length - 1);
      this.shade();
    }
    this.known = true;
    this.buttons();
  }

  endpoint() {
    const chat = chosen("endpoint") === "chat";
    byId("prompt").placeholder = chat ? "Say something" : "A text that the model goes on with";
    showSettings(chosen("endpoint"));
    this.clear();
  }

  buttons() {
    byId("send").disabled = this.running !== null || this.model === null;
    byId("stop").disabled = this.running === null;
  }

  clear() {
    this.stop();
    this.history = [];
    this.views = [];
    const words = "Tokens appear with their probability, their alternatives and the experts that they went to: hover, or use the arrow keys.";
    byId("log").replaceChildren(el("p", { className: "hint" }, words));
  }

  /** Another colouring, layer or theme. */
  shade() {
    this.shades.mode = chosen("shade");
    this.shades.layer = Math.min(Number(byId("layer").value), Math.max(0, this.shades.layers.length - 1));
    const experts = this.shades.mode === "experts" && this.shades.layers.length > 0;
    byId("layer-box").hidden = !experts;
    byId("layer-name").textContent = this.shades.layers[this.shades.layer] ?? "";
    byId("legend").replaceChildren(...this.legend(experts));
    for (const view of this.views) view.paint();
  }

  legend(experts) {
    if (experts) {
      const shown = Array.from({ length: Math.min(this.shades.experts, 16) }, (_, id) => {
        const chip = el("i", { className: "chip" });
        chip.style.background = expertColor(id, this.shades.experts);
        return el("span", {}, chip, `${id}`);
      });
      return [...shown, this.shades.experts > 16 && `… ${this.shades.experts} experts`].filter(Boolean);
    }
    if (this.shades.mode === "experts") return this.known ? ["This model is dense: it has no experts."] : [];
    if (this.shades.mode === "plain") return [];
    return [1, 0.5, 0.2, 0.05, 0.01].map((share) => {
      const chip = el("i", { className: "chip" });
      chip.style.background = surprise(this.shades.theme, Math.log(share));
      return el("span", {}, chip, `${100 * share} %`);
    });
  }

  stop() {
    this.running?.abort();
  }

  async send() {
    const words = byId("prompt").value;
    if (this.running || this.model === null || words === "") return;
    const endpoint = chosen("endpoint");
    const log = byId("log");
    log.querySelector(".hint")?.remove();
    let body;
    try {
      body = this.body(endpoint, words);
    } catch (error) {
      return log.append(el("p", { className: "error", role: "alert" }, error.message));
    }
    if (endpoint === "chat") {
      log.append(el("p", { className: "said" }, words));
      byId("prompt").value = "";
    }
    this.running = new AbortController();
    this.buttons();
    await new Answer(this, log, endpoint, words).run(body, this.running.signal);
    this.running = null;
    this.buttons();
  }

  body(endpoint, words) {
    const { fields, alternatives, system } = readSettings(endpoint);
    const routed = this.shades.layers.length ? { routed_experts: true } : {};
    const body = { model: this.model, stream: true, ...fields, ...routed };
    if (endpoint === "complete") return { ...body, prompt: words, logprobs: alternatives };
    const messages = system ? [{ role: "system", content: system }] : [];
    messages.push(...this.history, { role: "user", content: words });
    return { ...body, messages, logprobs: true, top_logprobs: alternatives };
  }
}

/** One call and what is shown of it. */
class Answer {
  constructor(playground, log, endpoint, words) {
    Object.assign(this, { playground, log, endpoint, words });
    this.history = playground.history; // of this conversation, also when it is cleared
    this.views = new Map();
    this.tokens = 0;
    this.reasons = new Set();
    this.stats = el("p", { className: "stats", role: "status" }, "waiting for the first token …");
    this.box = el("div", { className: "said-back" }, this.stats);
    log.append(this.box);
  }

  async run(body, signal) {
    this.sent = performance.now();
    try {
      for await (const chunk of stream(PATHS[this.endpoint], body, signal)) this.take(chunk, body.echo);
    } catch (error) {
      if (signal.aborted) this.reasons.add("stopped");
      else this.box.append(el("p", { className: "error", role: "alert" }, error.message));
    }
    this.over = true;
    this.tell();
    this.keep();
  }

  take(chunk, echo) {
    this.playground.timeline.mine = chunk.id;
    const atEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    for (const choice of chunk.choices) {
      const tokens = this.view(choice.index).add(choice, echo);
      if (choice.finish_reason) this.reasons.add(choice.finish_reason);
      if (!tokens) continue;
      this.latest = performance.now();
      this.first ??= this.latest;
      this.tokens += tokens;
    }
    this.tell();
    if (atEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  view(index) {
    if (!this.views.has(index)) {
      const box = el("p", { className: "tokens" });
      if (this.endpoint === "complete" && !byId("set-echo").checked) this.before(box);
      const made = el("span", { className: "made" });
      box.append(made);
      this.stats.before(box);
      const view = new TokenView(made, this.playground.tip, this.playground.shades);
      this.views.set(index, view);
      this.playground.views.push(view);
    }
    return this.views.get(index);
  }

  before(box) {
    box.append(el("span", { className: "prompt" }, this.words));
  }

  tell() {
    if (this.first === undefined) {
      if (this.over) this.stats.textContent = [...this.reasons].join(", ") || "no answer";
      return;
    }
    const seconds = (this.latest - this.first) / 1000;
    const rate = this.tokens > 1 && seconds > 0 ? `${((this.tokens - 1) / seconds).toFixed(1)} tokens/s` : null;
    const parts = [
      `first token ${duration((this.first - this.sent) / 1000)}`,
      rate,
      `${this.tokens} token${this.tokens === 1 ? "" : "s"}`,
      [...this.reasons].join(", "),
    ];
    this.stats.textContent = parts.filter(Boolean).join(" · ");
  }

  /** What was said goes into the next request. */
  keep() {
    const said = this.views.get(0)?.text;
    if (this.endpoint !== "chat" || !said) return;
    this.history.push({ role: "user", content: this.words }, { role: "assistant", content: said });
  }
}
