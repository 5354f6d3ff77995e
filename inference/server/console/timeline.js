// The picture of continuous batching: rows are requests, columns are steps; above it how full each step was.
// Cells live in an image of one pixel each, so a frame costs the same with eight requests and with eight hundred.

import { CHUNK, DECODE, KEPT, LOST, count, duration } from "./live.js";
import { Plot } from "./plot.js";

const LEFT = 38;
const STRIP = 46; // height of what is above the rows
const GAP = 12;
const BOTTOM = 18;
const LANES = 1024;
const NAMES = ["prefill chunk", "decode", "end of the prefill", "preempted"];

export class Timeline extends Plot {
  constructor(canvas, tip, theme, live) {
    super(canvas, tip, theme);
    this.live = live;
    this.budget = 1;
    this.column = 7; // CSS pixels a step
    this.head = 0; // the step at the right border, as it glides
    this.goal = 0;
    this.painted = 0; // the newest step in the image
    this.mine = ""; // beginning of the ids of the playground's own requests
    this.image = new OffscreenCanvas(KEPT, LANES);
    this.cells = this.image.getContext("2d");
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    canvas.addEventListener("wheel", (event) => this.wheel(event), { passive: false });
  }

  /** Take new steps. */
  add(steps) {
    for (const step of steps) {
      this.wipe(step.number);
      this.paint(step);
    }
    if (steps.length) this.goal = steps.at(-1).number;
    if (this.goal - this.head > KEPT || this.goal < this.head || this.calm.matches) this.head = this.goal;
    this.dirty ||= steps.length > 0;
  }

  /** Forget what the columns up to a step have shown before, also those of steps that nobody has told us. */
  wipe(number) {
    const from = number > this.painted ? Math.max(this.painted, number - KEPT) + 1 : number - KEPT + 1; // another server
    for (let i = from; i <= number; i += 1) this.cells.clearRect((i + KEPT) % KEPT, 0, 1, LANES);
    this.painted = number;
  }

  /** The theme has changed. */
  repaint() {
    this.cells.clearRect(0, 0, KEPT, LANES);
    for (const step of this.live.steps) this.paint(step);
    this.dirty = true;
  }

  paint(step) {
    const x = step.number % KEPT;
    for (const { kind, lane, count: tokens } of step.cells) {
      if (kind === LOST) continue;
      this.cells.globalAlpha = kind === DECODE ? 1 : 0.5 + 0.5 * Math.sqrt(Math.min(1, tokens / this.budget));
      this.cells.fillStyle = kind === DECODE ? this.theme.decode : this.theme.prefill;
      this.cells.fillRect(x, lane, 1, 1);
    }
  }

  zoom(factor) {
    this.column = Math.min(24, Math.max(2, this.column * factor));
    this.dirty = true;
  }

  wheel(event) {
    if (!event.ctrlKey && !event.shiftKey) return;
    event.preventDefault();
    this.zoom(event.deltaY < 0 || event.deltaX < 0 ? 1.15 : 1 / 1.15);
  }

  frame() {
    if (this.head < this.goal) {
      const rest = this.goal - this.head;
      this.head = rest < 0.02 ? this.goal : this.head + Math.max(rest * 0.12, Math.min(rest, 0.02));
      this.dirty = true;
    }
    super.frame();
  }

  /** Left border of a step's column. */
  x(number) {
    return this.width - (this.head - number + 1) * this.column;
  }

  /** Upper border of a lane. */
  y(lane) {
    return this.top + lane * this.row;
  }

  /** The playground's requests. */
  own() {
    return this.mine ? [...this.live.requests.values()].filter((request) => request.id.startsWith(this.mine)) : [];
  }

  get top() {
    return STRIP + GAP;
  }

  draw(ctx) {
    const columns = Math.min(KEPT - 1, Math.ceil((this.width - LEFT) / this.column) + 1);
    const first = Math.floor(this.head) - columns + 1;
    this.visible = this.live.steps.filter((step) => step.number >= first && step.number <= Math.ceil(this.head));
    this.lanes = this.visible.reduce((most, step) => Math.max(most, step.lanes), 8);
    this.row = (this.height - this.top - BOTTOM) / this.lanes;
    ctx.save();
    ctx.beginPath();
    ctx.rect(LEFT, 0, this.width - LEFT, this.height);
    ctx.clip();
    this.rows(ctx, first, columns);
    this.strip(ctx);
    this.marks(ctx);
    ctx.restore();
    this.axes(ctx);
  }

  rows(ctx, first, columns) {
    ctx.imageSmoothingEnabled = false;
    const height = this.lanes * this.row;
    for (let from = Math.max(0, first); from < first + columns + 1; ) {
      const place = from % KEPT;
      const size = Math.min(first + columns + 1 - from, KEPT - place);
      ctx.drawImage(this.image, place, 0, size, this.lanes, this.x(from), this.top, size * this.column, height);
      from += size;
    }
    ctx.fillStyle = this.theme.surface;
    if (this.row >= 4) {
      const gap = this.row >= 8 ? 2 : 1;
      for (let i = 0; i <= this.lanes; i += 1) ctx.fillRect(LEFT, this.top + i * this.row - gap / 2, this.width, gap);
    }
    if (this.column >= 5) {
      for (let i = 0; i <= columns; i += 1) ctx.fillRect(this.x(first + i) - 0.5, this.top, 1, height);
    }
  }

  /** Tokens of each step, as a share of the budget. */
  strip(ctx) {
    const width = Math.max(1, this.column - (this.column >= 5 ? 1 : 0));
    for (const step of this.visible) {
      const prefill = (STRIP * step.prefill) / this.budget;
      const decode = (STRIP * step.decode) / this.budget;
      ctx.fillStyle = this.theme.decode;
      ctx.fillRect(this.x(step.number), STRIP - decode, width, decode);
      ctx.fillStyle = this.theme.prefill;
      ctx.fillRect(this.x(step.number), STRIP - decode - prefill, width, prefill);
    }
  }

  /** Where requests begin, which are the playground's, who was preempted, and what the pointer is at. */
  marks(ctx) {
    const hit = this.hit();
    const thick = Math.max(1.5, this.row * 0.2);
    for (const step of this.visible) {
      const x = this.x(step.number);
      ctx.fillStyle = this.theme.ink;
      if (this.row >= 4) for (const { lane } of step.begun) ctx.fillRect(x - 0.75, this.y(lane) + 1, 1.5, this.row - 2);
      for (const { lane } of step.losses) this.lost(ctx, x, this.y(lane));
    }
    ctx.fillStyle = this.theme.mine;
    for (const request of this.own()) {
      for (const { number, lane } of request.cells) {
        ctx.fillRect(this.x(number), this.y(lane + 1) - thick, this.column + 0.5, thick);
      }
    }
    ctx.fillStyle = this.theme.ink;
    ctx.globalAlpha = 0.28;
    for (const { number, lane } of hit?.cell?.request.cells ?? []) {
      ctx.fillRect(this.x(number), this.y(lane), this.column, this.row);
    }
    ctx.globalAlpha = 1;
    if (!hit) return;
    ctx.strokeStyle = this.theme.ink;
    ctx.lineWidth = 1.5;
    ctx.globalAlpha = 0.6;
    ctx.strokeRect(this.x(hit.step.number), 1, this.column, this.top + this.lanes * this.row - 2);
    ctx.globalAlpha = 1;
  }

  lost(ctx, x, y) {
    const size = Math.min(9, Math.max(4, Math.min(this.row, 9)));
    const [cx, cy] = [x + this.column / 2, y + this.row / 2];
    ctx.strokeStyle = this.theme.lost;
    ctx.lineWidth = 2;
    ctx.beginPath();
    for (const side of [-1, 1]) {
      ctx.moveTo(cx - size / 2, cy - (side * size) / 2);
      ctx.lineTo(cx + size / 2, cy + (side * size) / 2);
    }
    ctx.stroke();
  }

  axes(ctx) {
    ctx.strokeStyle = this.theme.line;
    ctx.lineWidth = 1;
    ctx.setLineDash([3, 3]);
    ctx.beginPath();
    ctx.moveTo(LEFT, 0.5);
    ctx.lineTo(this.width, 0.5);
    ctx.stroke();
    ctx.setLineDash([]);
    ctx.beginPath();
    ctx.moveTo(LEFT, STRIP + 0.5);
    ctx.lineTo(this.width, STRIP + 0.5);
    ctx.stroke();
    this.text(count(this.budget), LEFT - 6, 9, { align: "right" });
    this.text("0", LEFT - 6, STRIP, { align: "right" });
    const every = [1, 2, 5, 10, 20, 50, 100, 200].find((n) => this.lanes / n <= 6) ?? 500;
    for (let lane = 0; lane < this.lanes; lane += every) {
      const y = this.top + (lane + 0.5) * this.row;
      this.text(`${lane + 1}`, LEFT - 6, y, { align: "right", baseline: "middle" });
    }
    const stride = [5, 10, 20, 50, 100, 200].find((n) => n * this.column >= 70) ?? 500;
    for (let number = Math.ceil(this.head / stride) * stride; this.x(number) > LEFT; number -= stride) {
      const x = this.x(number) + this.column / 2;
      if (number > 0 && x < this.width - 16 && x > LEFT + 16) {
        this.text(count(number), x, this.height - 4, { align: "center" });
      }
    }
  }

  /** The step and the cell under the pointer. */
  hit() {
    if (!this.at || this.at.x < LEFT || !this.visible) return null;
    const number = Math.floor(this.head + 1 - (this.width - this.at.x) / this.column);
    const step = this.visible.find((one) => one.number === number);
    const lane = Math.floor((this.at.y - this.top) / this.row);
    return step ? { step, cell: step.cells.find((cell) => cell.lane === lane) } : null;
  }

  tell() {
    const hit = this.hit();
    if (!hit) return null;
    const { step, cell } = hit;
    const about = [
      ["took", duration(step.seconds)],
      ["tokens", `${count(step.tokens)} of ${count(this.budget)}`],
      ["prefill", count(step.prefill), this.theme.prefill],
      ["decode", count(step.decode), this.theme.decode],
      ["running · waiting", `${step.running} · ${step.waiting}`],
    ];
    if (!cell) return [`step ${count(step.number)}`, ...about];
    const { request, kind, start, count: tokens } = cell;
    const place = start < request.prompt ? `tokens ${start + 1}–${start + tokens} of ${request.prompt}` : "computed again";
    const what = kind === DECODE ? `token ${start + 2 - request.prompt} of the answer` : place;
    return [
      `${request.id.slice(0, 17)}…`,
      kind === LOST
        ? [NAMES[LOST], "its blocks are gone, it waits", this.theme.lost]
        : [NAMES[kind === DECODE ? DECODE : CHUNK], what, kind === DECODE ? this.theme.decode : this.theme.prefill],
      ["first token after", duration(request.ttft)],
      ["in step", count(step.number)],
      ...about.slice(0, 2),
    ];
  }

  pitch() {
    return [this.column, this.row || 8];
  }

  bounds() {
    const { x, y } = this.start();
    return [LEFT + 1, y, x, y + (this.lanes - 1) * this.row];
  }

  start() {
    return { x: this.width - this.column / 2, y: this.top + (this.row || 8) / 2 };
  }
}
