// One answer, token by token: what was how probable, what else could have come, and which experts it went to.

import { expertColor } from "./color.js";
import { el } from "./dom.js";

const BITS = 7; // the colours of probabilities end at 2^-BITS

/** How a token is written where it stands alone. */
function spell(text) {
  return text === "" ? "(part of a character)" : `“${text.replaceAll("\n", "↵").replaceAll("\t", "⇥")}”`;
}

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return `${share >= 99.95 || share === 0 ? share.toFixed(0) : share.toFixed(share < 1 ? 2 : 1)} %`;
};

const bytesOf = (name) =>
  name.startsWith("bytes:") ? name.match(/[0-9a-f]{2}(?=\\|$)/g)?.map((hex) => parseInt(hex, 16)) : null;

/** The colour of a token by its probability: none at 100 %. */
export const surprise = (theme, logprob) => theme.surprise(-logprob / Math.LN2 / BITS);

export class TokenView {
  /** `shades` is the playground's: {mode, layer, theme, experts}. */
  constructor(box, tip, shades) {
    Object.assign(this, { box, tip, shades });
    this.tokens = [];
    this.rows = []; // experts of each computed token, the prompt's first
    this.prompt = undefined; // how many rows are the prompt's
    this.current = -1;
    this.decoder = new TextDecoder();
    this.text = "";
    this.painted = 0; // tokens whose experts are painted
    box.tabIndex = 0;
    box.setAttribute("role", "group");
    box.setAttribute("aria-label", "Answer. Arrow keys read its tokens.");
    box.addEventListener("pointerover", (event) => this.point(event.target.dataset?.index));
    box.addEventListener("pointerleave", () => this.point(undefined));
    box.addEventListener("blur", () => this.point(undefined));
    box.addEventListener("keydown", (event) => this.key(event));
  }

  /** Take a choice of a chunk. */
  add(choice, echo) {
    const fresh = choice.delta ? this.chat(choice) : this.completion(choice);
    if (choice.routed_experts?.length) {
      this.rows.push(...choice.routed_experts);
      if (echo) this.prompt = 0;
      else if (this.prompt === undefined && fresh.length) this.prompt = this.rows.length - fresh.length + 1;
    }
    for (const token of fresh) this.append(token);
    this.text += choice.delta ? (choice.delta.content ?? "") : choice.text;
    this.paint(this.painted);
    return fresh.length;
  }

  chat(choice) {
    return (choice.logprobs?.content ?? []).map(({ token, logprob, bytes, top_logprobs: top }) => ({
      name: token, logprob, bytes, top: top.map((other) => [other.token, other.logprob]),
    }));
  }

  completion({ logprobs }) {
    return (logprobs?.tokens ?? []).map((name, i) => ({
      name, logprob: logprobs.token_logprobs[i], bytes: bytesOf(name),
      top: Object.entries(logprobs.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]),
    }));
  }

  append(token) {
    const bytes = token.bytes ? Uint8Array.from(token.bytes) : new TextEncoder().encode(token.name);
    token.text = this.decoder.decode(bytes, { stream: true });
    token.span = el("span", { className: `token ${token.text === "" ? "part" : token.text.includes("\n") ? "line" : ""}` }, token.text);
    token.span.dataset.index = this.tokens.length;
    this.tokens.push(token);
    this.box.append(token.span);
  }

  /** Experts of token i, by layer; undefined where it was not computed (the last one never is). */
  experts(i) {
    return this.prompt === undefined ? undefined : this.rows[this.prompt + i];
  }

  /** Colour the tokens from one on. */
  paint(from = 0) {
    const { mode, layer, theme, experts } = this.shades;
    for (let i = from; i < this.tokens.length; i += 1) {
      const { span, logprob } = this.tokens[i];
      const went = this.experts(i)?.[layer];
      span.style.background = mode === "probability" && logprob !== null ? surprise(theme, logprob) : "";
      if (mode !== "experts" || !went) continue;
      const colors = went.map((id) => (id < 0 ? "transparent" : expertColor(id, experts)));
      const stripes = colors.map((color, k) => `${color} ${(100 * k) / colors.length}% ${(100 * (k + 1)) / colors.length}%`);
      span.style.background =
        `linear-gradient(90deg, ${stripes.join(", ")}) 0 100% / 100% 4px no-repeat, ` +
        `color-mix(in oklab, ${colors[0]} ${theme.dark ? 34 : 30}%, transparent)`;
    }
    this.painted = Math.max(0, this.tokens.length - 1); // the last one's experts are still to come
  }

  point(index) {
    this.tokens[this.current]?.span.classList.remove("current");
    this.current = index === undefined ? -1 : Number(index);
    const token = this.tokens[this.current];
    if (!token) return this.tip.hide();
    token.span.classList.add("current");
    const box = token.span.getClientRects()[0] ?? token.span.getBoundingClientRect();
    this.tip.show(box.left, box.bottom - 8, this.tell(token, this.current), this.aloud);
    this.aloud = false;
  }

  key(event) {
    const way = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") this.point(undefined);
    if (way === undefined) return;
    event.preventDefault();
    this.aloud = true;
    this.point(Math.min(this.tokens.length - 1, Math.max(0, this.current + way)));
  }

  tell(token, index) {
    const rows = [spell(token.text || token.name)];
    if (token.logprob !== null) rows.push(["probability", percent(token.logprob)]);
    for (const [name, logprob] of token.top) rows.push(this.bar(name, logprob, name === token.name));
    if (!this.shades.experts) return rows;
    const went = this.experts(index);
    if (!went) return [...rows, ["experts", "not computed: it is the last"]];
    const { layer, layers, experts } = this.shades;
    rows.push([`experts in layer ${layers[layer]}`, went[layer].map((id) => (id < 0 ? `${-1 - id} (dropped)` : id)).join(", ")]);
    const strip = went.map((ids, l) => {
      const cells = ids.map((id) => {
        const cell = el("i");
        cell.style.background = id < 0 ? "" : expertColor(id, experts);
        return cell;
      });
      return el("span", { className: l === layer ? "on" : "" }, ...cells);
    });
    rows.push(el("div", { className: "strip" }, el("small", {}, "layers"), ...strip));
    return rows;
  }

  bar(name, logprob, own) {
    const line = el("div", { className: own ? "bar own" : "bar" }, el("span", {}, spell(name)), el("b", {}, percent(logprob)));
    line.style.setProperty("--share", `${Math.max(0.5, 100 * Math.exp(logprob))}%`);
    return line;
  }
}
