// What every drawing shares: a canvas in device pixels, a pointer that is a mouse or the arrow keys, a tooltip.

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** The page's one tooltip; what it says is also read out while the keyboard moves it. */
export class Tip {
  constructor(box, voice) {
    this.box = box;
    this.voice = voice;
  }

  /** Show rows beside a point of the window: a title, then [label, value, colour] or elements. */
  show(x, y, [title, ...rows], aloud) {
    const head = document.createElement("strong");
    head.textContent = title;
    const shown = rows.filter(Boolean);
    this.box.replaceChildren(head, ...shown.map((row) => (row instanceof Node ? row : this.row(...row))));
    this.box.hidden = false;
    const { width, height } = this.box.getBoundingClientRect();
    const left = x + 14 + width > innerWidth - 8 ? x - 14 - width : x + 14;
    const top = y + 16 + height > innerHeight - 8 ? y - 12 - height : y + 16;
    this.box.style.left = `${Math.max(8, left)}px`;
    this.box.style.top = `${Math.max(8, top)}px`;
    if (aloud) this.voice.textContent = [...this.box.children].map((line) => line.textContent).join(", ");
  }

  row(label, value, color) {
    const line = document.createElement("div");
    const name = document.createElement("span");
    const number = document.createElement("b");
    name.textContent = label;
    number.textContent = value;
    if (color) {
      const swatch = document.createElement("i");
      swatch.style.background = color;
      name.prepend(swatch);
    }
    line.append(name, number);
    return line;
  }

  hide() {
    this.box.hidden = true;
  }
}

/** A drawing; `draw` and `tell` are the subclass's. `at` is where the pointer is, in CSS pixels, or null. */
export class Plot {
  constructor(canvas, tip, theme) {
    this.canvas = canvas;
    this.ctx = canvas.getContext("2d");
    this.tip = tip;
    this.theme = theme;
    this.at = null;
    this.dirty = true;
    this.width = this.height = 0;
    new ResizeObserver(() => this.resize()).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.point(event.offsetX, event.offsetY, false));
    canvas.addEventListener("pointerdown", (event) => this.point(event.offsetX, event.offsetY, false));
    canvas.addEventListener("pointerleave", () => this.leave());
    canvas.addEventListener("blur", () => this.leave());
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  resize() {
    this.width = this.canvas.clientWidth;
    this.height = this.canvas.clientHeight;
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.round(this.width * ratio);
    this.canvas.height = Math.round(this.height * ratio);
    this.dirty = true;
  }

  point(x, y, aloud) {
    this.at = { x, y };
    this.aloud = aloud;
    this.dirty = true;
  }

  leave() {
    if (this.at) this.tip.hide();
    this.at = null;
    this.dirty = true;
  }

  key(event) {
    if (event.key === "Escape") this.leave();
    const arrow = ARROWS[event.key];
    if (!arrow) return;
    event.preventDefault();
    if (!this.at) {
      const { x, y } = this.start();
      return this.point(x, y, true);
    }
    const [dx, dy] = this.pitch();
    const [left, top, right, bottom] = this.bounds();
    const x = Math.min(right, Math.max(left, this.at.x + arrow[0] * dx));
    const y = Math.min(bottom, Math.max(top, this.at.y + arrow[1] * dy));
    this.point(x, y, true);
  }

  /** Where the arrow keys may go. */
  bounds() {
    return [0, 0, this.width - 1, this.height - 1];
  }

  /** How far an arrow key moves. */
  pitch() {
    return [8, 8];
  }

  /** Where the arrow keys begin. */
  start() {
    return { x: this.width / 2, y: this.height / 2 };
  }

  /** Draw if anything has changed. */
  frame() {
    if (!this.dirty || !this.width) return;
    this.dirty = false;
    const ratio = this.canvas.width / this.width;
    this.ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    this.ctx.clearRect(0, 0, this.width, this.height);
    this.ctx.font = `11px ${this.theme.sans}`;
    this.draw(this.ctx);
    if (!this.at) return;
    const rows = this.tell(this.at);
    if (!rows) return this.tip.hide();
    const box = this.canvas.getBoundingClientRect();
    this.tip.show(box.left + this.at.x, box.top + this.at.y, rows, this.aloud);
    this.aloud = false;
  }

  text(words, x, y, { align = "left", color = this.theme.ink3, baseline = "alphabetic" } = {}) {
    this.ctx.fillStyle = color;
    this.ctx.textAlign = align;
    this.ctx.textBaseline = baseline;
    this.ctx.fillText(words, x, y);
  }
}
