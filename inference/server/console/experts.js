// Experts by layer: how much of the layer's tokens each of them got, against an equal share.

import { count } from "./live.js";
import { Plot } from "./plot.js";

const LEFT = 38;
const RIGHT = 62;
const BOTTOM = 30;
const TOP = 16;
const FAR = 2; // the colours end at 2^FAR times the mean, and at its inverse

export class HeatMap extends Plot {
  constructor(canvas, tip, theme) {
    super(canvas, tip, theme);
    this.since = false; // show all since the server's start instead of the window
    this.layers = [];
  }

  /** Take an answer of `/v1/experts`. */
  set(answer) {
    this.answer = answer;
    const shown = this.since ? answer.since_start : answer.window;
    this.seconds = shown.seconds;
    this.layers = shown.layers;
    this.total = answer.since_start.layers;
    this.counts = this.layers.map((layer) => layer.counts);
    this.sums = this.counts.map((row) => row.reduce((a, b) => a + b, 0));
    this.dirty = true;
  }

  /** Load over the mean of the layer: 1 is an equal share. */
  load(layer, expert) {
    const sum = this.sums[layer];
    return sum ? (this.counts[layer][expert] * this.counts[layer].length) / sum : undefined;
  }

  /** Without a token in what is shown. */
  dead(layer, expert) {
    return this.sums[layer] > 0 && this.counts[layer][expert] === 0;
  }

  worst(layer) {
    return Math.max(...this.counts[layer].map((_, expert) => this.load(layer, expert) ?? 0));
  }

  color(load) {
    return this.theme.balance(0.5 + Math.log2(Math.max(load, 1e-9)) / (2 * FAR));
  }

  draw(ctx) {
    const layers = this.layers.length;
    if (!layers) return;
    const experts = this.counts[0].length;
    this.cw = (this.width - LEFT - RIGHT) / experts;
    this.ch = Math.min((this.height - TOP - BOTTOM) / layers, 84);
    const gap = Math.min(this.cw, this.ch) >= 7 ? 1.5 : 0;
    for (let l = 0; l < layers; l += 1) {
      for (let e = 0; e < experts; e += 1) this.one(ctx, l, e, gap);
      this.balance(ctx, l);
    }
    this.axes(ctx, layers, experts);
    if (this.sums.every((sum) => sum === 0)) this.idle();
    const hit = this.hit();
    if (!hit) return;
    ctx.strokeStyle = this.theme.ink;
    ctx.lineWidth = 2;
    ctx.strokeRect(this.x(hit.expert), this.y(hit.layer), this.cw - gap, this.ch - gap);
  }

  one(ctx, layer, expert, gap) {
    const load = this.load(layer, expert);
    const [x, y, w, h] = [this.x(expert), this.y(layer), this.cw - gap, this.ch - gap];
    if (load === undefined || this.dead(layer, expert)) {
      const small = Math.min(w, h) < 6;
      ctx.fillStyle = load !== undefined && small ? this.theme.lost : this.theme.free;
      ctx.fillRect(x, y, w, h);
      if (load === undefined || small) return;
      ctx.strokeStyle = this.theme.lost;
      const r = Math.min(w, h) * 0.26;
      ctx.lineWidth = Math.max(1, Math.min(2, r / 2));
      ctx.beginPath();
      for (const side of [-1, 1]) {
        ctx.moveTo(x + w / 2 - r, y + h / 2 - side * r);
        ctx.lineTo(x + w / 2 + r, y + h / 2 + side * r);
      }
      ctx.stroke();
      return;
    }
    ctx.fillStyle = this.color(load);
    ctx.fillRect(x, y, w, h);
    if (load >= 2 && Math.min(w, h) >= 7) {
      ctx.strokeStyle = this.theme.ink;
      ctx.lineWidth = 1.5;
      ctx.strokeRect(x + 1.5, y + 1.5, w - 3, h - 3);
    }
  }

  /** At the right: the busiest expert of the layer over the mean, as a bar and a number. */
  balance(ctx, layer) {
    if (!this.sums[layer]) return;
    const worst = this.worst(layer);
    const x = this.width - RIGHT + 8;
    const y = this.y(layer) + this.ch / 2;
    ctx.fillStyle = this.color(worst);
    const thick = Math.min(4, this.ch);
    const room = this.ch < 11 ? RIGHT - 10 : 18;
    ctx.fillRect(x, y - thick / 2, Math.min(1, Math.log2(worst) / 3) * room + 2, thick);
    if (this.ch >= 11) this.text(`${worst.toFixed(1)}×`, this.width, y, { align: "right", baseline: "middle", color: this.theme.ink2 });
  }

  axes(ctx, layers, experts) {
    const rows = [1, 2, 4, 5, 10, 20].find((n) => n * this.ch >= 13) ?? 40;
    for (let l = 0; l < layers; l += rows) {
      this.text(`${this.layers[l].layer}`, LEFT - 6, this.y(l) + this.ch / 2, { align: "right", baseline: "middle" });
    }
    const columns = [1, 2, 4, 8, 16, 32, 64].find((n) => n * this.cw >= 24) ?? 128;
    const bottom = this.y(layers) + 11;
    for (let e = 0; e < experts; e += columns) this.text(`${e}`, this.x(e) + this.cw / 2, bottom, { align: "center" });
    this.text("expert", (LEFT + this.width - RIGHT) / 2, bottom + 14, { align: "center" });
    this.text("layer", LEFT - 6, 9, { align: "right" });
    this.text("busiest", this.width, 9, { align: "right" });
  }

  idle() {
    const words = this.since ? "no token yet" : `no token in the last ${Math.round(this.seconds)} s`;
    const middle = [(LEFT + this.width - RIGHT) / 2, this.y(this.counts.length / 2)];
    this.text(words, ...middle, { align: "center", baseline: "middle", color: this.theme.ink2 });
  }

  x(expert) {
    return LEFT + expert * this.cw;
  }

  y(layer) {
    return TOP + layer * this.ch;
  }

  hit() {
    if (!this.at || !this.cw) return null;
    const [expert, layer] = [Math.floor((this.at.x - LEFT) / this.cw), Math.floor((this.at.y - TOP) / this.ch)];
    return this.layers[layer]?.counts[expert] === undefined ? null : { layer, expert };
  }

  tell() {
    const hit = this.hit();
    if (!hit) return null;
    const { layer, expert } = hit;
    const load = this.load(layer, expert);
    const share = this.sums[layer] ? (100 * this.counts[layer][expert]) / this.sums[layer] : 0;
    return [
      `layer ${this.layers[layer].layer}, expert ${expert}`,
      ["load", load === undefined ? "none" : `${load.toFixed(2)} × the mean`, load ? this.color(load) : undefined],
      ["share of the layer", `${share.toFixed(1)} %`],
      ["tokens", count(this.counts[layer][expert])],
      ["since start", count(this.total[layer].counts[expert])],
      this.dead(layer, expert) && [this.total[layer].counts[expert] ? "idle in this window" : "dead since start", "×"],
      ["router's entropy in the layer", `${this.layers[layer].entropy.toFixed(2)} nats`],
      this.layers[layer].dropped > 0 && ["dropped in the layer", `${(100 * this.layers[layer].drop_fraction).toFixed(2)} %`],
    ];
  }

  pitch() {
    return [this.cw, this.ch];
  }

  bounds() {
    const { x, y } = this.start();
    return [x, y, this.width - RIGHT - this.cw / 2, this.y(this.counts.length - 0.5)];
  }

  start() {
    return { x: LEFT + this.cw / 2, y: TOP + this.ch / 2 };
  }
}
