// A small chart over the last seconds: lines with a band to a high quantile, stacked areas, or steps.

import { SPAN, quantile } from "./live.js";
import { Plot } from "./plot.js";

const LEFT = 50;
const BOTTOM = 16;
const TOP = 8;

/** A round number that is at least x; its half is as round, and whole where counts are shown. */
function round(x, counts) {
  const power = 10 ** Math.floor(Math.log10(x));
  return (counts ? [2, 4, 6, 10] : [1, 2, 5, 10]).map((n) => n * power).find((n) => n >= x * 0.999);
}

/** Values by second of the latest SPAN seconds. `series`: {name, color, of(second)}; `kind`: band (of times), or stack
 *  or step (of counts). */
export class Chart extends Plot {
  constructor(canvas, tip, theme, live, { kind, series, format, least }) {
    super(canvas, tip, theme);
    Object.assign(this, { live, kind, series, format, least });
    this.until = 0;
  }

  /** Move to the present. */
  advance() {
    this.until = this.live.now - 1; // the second that is not over yet is left out
    this.dirty = true;
  }

  x(time) {
    return LEFT + ((time - this.until + SPAN) / SPAN) * (this.width - LEFT - 2);
  }

  y(value) {
    return TOP + (1 - value / this.top) * (this.height - TOP - BOTTOM);
  }

  /** [time of its middle, value of each series], of the seconds shown; a series without a value has undefined. */
  points() {
    const found = [];
    for (let time = Math.ceil(this.until - SPAN); time < this.until; time += 1) {
      const second = this.live.seconds.get(time);
      const values = this.series.map((line) => (second ? line.of(second) : line.idle));
      if (this.kind === "stack") for (let i = 1; i < values.length; i += 1) values[i] += values[i - 1];
      found.push([time + 0.5, values]);
    }
    return found;
  }

  draw(ctx) {
    this.shown = this.points();
    const most = Math.max(0, ...this.shown.flatMap(([, values]) => values.filter((v) => v !== undefined)));
    this.top = round(Math.max(most * 1.08, this.least), this.kind !== "band");
    this.axes(ctx);
    if (this.kind === "band") this.band(ctx);
    else for (let i = this.series.length - 1; i >= 0; i -= 1) this.area(ctx, i);
    if (this.at) this.cross(ctx);
  }

  axes(ctx) {
    ctx.strokeStyle = this.theme.line;
    ctx.lineWidth = 1;
    for (const part of [0, 0.5, 1]) {
      const y = Math.round(this.y(part * this.top)) + 0.5;
      ctx.beginPath();
      ctx.moveTo(LEFT, y);
      ctx.lineTo(this.width, y);
      ctx.stroke();
      this.text(part ? this.format(part * this.top) : "0", LEFT - 6, y, { align: "right", baseline: "middle" });
    }
    for (const ago of [60, 30]) {
      this.text(`−${ago} s`, this.x(this.until - ago), this.height - 2, { align: "center" });
    }
    this.text("now", this.width, this.height - 2, { align: "right" });
  }

  /** Runs of neighbouring seconds that have a value. */
  runs(index) {
    const runs = [[]];
    for (const [time, values] of this.shown) {
      if (values[index] === undefined) runs.push([]);
      else runs.at(-1).push([this.x(time), this.y(values[index]), time]);
    }
    return runs.filter((run) => run.length);
  }

  /** The median as a line, and a band from it to the second series. */
  band(ctx) {
    const [middle, high] = [this.runs(0), this.runs(1)];
    ctx.fillStyle = ctx.strokeStyle = this.theme[this.series[0].color];
    ctx.lineJoin = ctx.lineCap = "round";
    middle.forEach((run, i) => {
      ctx.globalAlpha = 0.2;
      ctx.beginPath();
      for (const [x, y] of run) ctx.lineTo(x, y);
      for (const [x, y] of [...high[i]].reverse()) ctx.lineTo(x, y);
      ctx.fill();
      ctx.globalAlpha = 1;
      ctx.lineWidth = 1.75;
      ctx.beginPath();
      for (const [x, y] of run) ctx.lineTo(x, y);
      ctx.stroke();
      if (run.length > 1) return;
      ctx.beginPath();
      ctx.arc(run[0][0], run[0][1], 2, 0, 7);
      ctx.fill();
    });
  }

  area(ctx, index) {
    const color = this.theme[this.series[index].color];
    for (const run of this.runs(index)) {
      const trace = () => {
        ctx.beginPath();
        for (const [x, y] of run) ctx.lineTo(x, y);
      };
      trace();
      ctx.lineTo(run.at(-1)[0], this.y(0));
      ctx.lineTo(run[0][0], this.y(0));
      ctx.globalAlpha = this.kind === "stack" ? 0.35 : 0.14;
      ctx.fillStyle = ctx.strokeStyle = color;
      ctx.fill();
      ctx.globalAlpha = 1;
      ctx.lineWidth = 1.5;
      ctx.lineJoin = "round";
      trace();
      ctx.stroke();
    }
  }

  nearest() {
    const time = this.until - SPAN + ((this.at.x - LEFT) / (this.width - LEFT - 2)) * SPAN;
    return this.shown.find(([middle]) => Math.abs(middle - time) <= 0.5);
  }

  cross(ctx) {
    const found = this.nearest();
    if (!found) return;
    const x = this.x(found[0]);
    ctx.strokeStyle = this.theme.ink3;
    ctx.lineWidth = 1;
    ctx.beginPath();
    ctx.moveTo(x, TOP);
    ctx.lineTo(x, this.height - BOTTOM);
    ctx.stroke();
    found[1].forEach((value, i) => {
      if (value === undefined) return;
      ctx.fillStyle = this.theme[this.series[i].color];
      ctx.beginPath();
      ctx.arc(x, this.y(value), 3.2, 0, 7);
      ctx.fill();
    });
  }

  tell() {
    const found = this.nearest();
    if (!found) return null;
    const second = this.live.seconds.get(found[0] - 0.5);
    const rows = this.series.map((line) => {
      const value = second ? line.of(second) : line.idle;
      return [line.name, value === undefined ? "none" : this.format(value, true), this.theme[line.color]];
    });
    return [`${Math.round(this.until + 1 - found[0])} s ago`, ...rows];
  }

  pitch() {
    return [(this.width - LEFT - 2) / SPAN, 0];
  }

  start() {
    return { x: this.width - 4, y: this.height / 2 };
  }
}

/** The median and the 95th percentile of a list of times. */
export function quantiles(list, color) {
  return [
    { name: "median", color, of: (second) => quantile(second[list], 0.5) },
    { name: "95th percentile", color, of: (second) => quantile(second[list], 0.95) },
  ];
}
