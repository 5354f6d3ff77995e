// The KV cache, block by block: used by live requests, kept for its prefix, or free.

import { count } from "./live.js";
import { Plot } from "./plot.js";

const NAMES = ["free", "cached", "used"];

export class KvGrid extends Plot {
  constructor(canvas, tip, theme) {
    super(canvas, tip, theme);
    this.states = new Uint8Array(0);
    this.totals = [0, 0, 0];
    this.size = 16;
  }

  /** Take the pools of `/v1/console/state`. */
  set(pools, blockSize) {
    this.size = blockSize;
    const states = new Uint8Array(pools.reduce((sum, pool) => sum + pool.blocks, 0));
    this.totals = [0, 0, 0];
    let at = 0;
    for (const { runs } of pools) {
      for (let i = 0; i < runs.length; i += 2) {
        states.fill(runs[i], at, at + runs[i + 1]);
        this.totals[runs[i]] += runs[i + 1];
        at += runs[i + 1];
      }
    }
    this.states = states;
    this.dirty = true;
  }

  /** How many blocks a cell stands for, how large it is, how many are in a row. */
  layout() {
    const blocks = Math.max(1, this.states.length);
    let each = 1;
    let cell = Math.sqrt((this.width * this.height) / blocks);
    while (cell < 5) {
      each *= 2;
      cell = Math.sqrt((this.width * this.height) / Math.ceil(blocks / each));
    }
    const cells = Math.ceil(blocks / each);
    let columns = Math.max(1, Math.ceil(this.width / cell));
    while (Math.ceil(cells / columns) * (this.width / columns) > this.height) columns += 1;
    Object.assign(this, { each, columns, cell: Math.min(this.width / columns, 34), cells });
  }

  draw(ctx) {
    this.layout();
    const gap = this.cell >= 7 ? 1.5 : 0.75;
    const side = this.cell - gap;
    const radius = this.cell >= 9 ? 2 : 0;
    for (let i = 0; i < this.cells; i += 1) {
      const [free, cached, used] = this.mix(i);
      const x = (i % this.columns) * this.cell;
      const y = Math.floor(i / this.columns) * this.cell;
      const all = free + cached + used;
      ctx.fillStyle = this.theme.free;
      this.square(ctx, x, y, side, side, radius);
      ctx.fillStyle = this.theme.cached;
      const filled = (side * (cached + used)) / all;
      if (cached) this.square(ctx, x, y + side - filled, side, filled, radius);
      ctx.fillStyle = this.theme.used;
      if (used) this.square(ctx, x, y + side - (side * used) / all, side, (side * used) / all, radius);
    }
    const hit = this.hit();
    if (hit === null) return;
    ctx.strokeStyle = this.theme.ink;
    ctx.lineWidth = 1.5;
    ctx.strokeRect((hit % this.columns) * this.cell, Math.floor(hit / this.columns) * this.cell, side, side);
  }

  square(ctx, x, y, width, height, radius) {
    if (!radius) return ctx.fillRect(x, y, width, height);
    ctx.beginPath();
    ctx.roundRect(x, y, width, height, radius);
    ctx.fill();
  }

  /** How many of a cell's blocks are free, cached, used. */
  mix(index) {
    const found = [0, 0, 0];
    const end = Math.min((index + 1) * this.each, this.states.length);
    for (let block = index * this.each; block < end; block += 1) found[this.states[block]] += 1;
    return found;
  }

  hit() {
    if (!this.at) return null;
    const column = Math.floor(this.at.x / this.cell);
    const index = Math.floor(this.at.y / this.cell) * this.columns + column;
    return column < this.columns && index < this.cells ? index : null;
  }

  tell() {
    const hit = this.hit();
    if (hit === null || !this.states.length) return null;
    const from = hit * this.each;
    const last = Math.min(from + this.each, this.states.length);
    const colors = [this.theme.free, this.theme.cached, this.theme.used];
    if (this.each === 1) {
      const state = this.states[from];
      return [`block ${count(from + 1)}`, [NAMES[state], `${this.size} tokens`, colors[state]]];
    }
    const rows = this.mix(hit).map((number, state) => [NAMES[state], `${number} blocks`, colors[state]]);
    return [`blocks ${count(from + 1)} to ${count(last)}`, ...rows.reverse()];
  }

  pitch() {
    return [this.cell, this.cell];
  }

  bounds() {
    const rows = Math.ceil(this.cells / this.columns);
    return [this.cell / 2, this.cell / 2, (this.columns - 0.5) * this.cell, (rows - 0.5) * this.cell];
  }

  start() {
    return { x: this.cell / 2, y: this.cell / 2 };
  }
}
