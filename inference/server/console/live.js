// What the engine's steps tell: times to the first token, gaps between tokens, throughput, and who was in which step.
// All times are seconds on the engine's clock.

export const SPAN = 90; // seconds that the charts show
export const KEPT = 1024; // steps that the timeline can show

// Kinds of cells; what is none of them is the end of a prefill, which gives a token.
export const [CHUNK, DECODE, LOST] = [0, 1, 3];

export class Live {
  constructor() {
    this.offset = 0; // engine clock − page clock
    this.clear();
  }

  clear() {
    this.last = 0; // number of the newest step
    this.steps = []; // the newest ones, oldest first
    this.requests = new Map();
    this.seconds = new Map(); // whole second → what happened in it
    this.lanes = []; // lane → the request that is in it
  }

  get now() {
    return performance.now() / 1000 + this.offset;
  }

  /** Take an answer of `/v1/console/steps`; returns the steps that are new. */
  take(answer) {
    this.offset = answer.clock - performance.now() / 1000;
    if (answer.last < this.last) this.clear(); // another server
    const known = answer.requests.map(([id, arrival, prompt, first]) => {
      const request = this.requests.get(id) ?? { id, arrival, prompt, lane: -1, cells: [] };
      this.requests.set(id, request);
      if (first && !request.first) this.begun(request, first);
      return request;
    });
    const fresh = answer.steps.filter((step) => step.number > this.last);
    for (const step of fresh) this.add(step, known);
    this.forget();
    return fresh;
  }

  add(step, known) {
    if (step.number !== this.last + 1) {
      for (const request of this.requests.values()) request.told = undefined; // steps are missing: no gaps over them
    }
    this.last = step.number;
    step.end = step.start + step.seconds;
    step.prefill = step.decode = 0;
    const second = this.second(Math.floor(step.end));
    step.preempted = step.preempted.map((place) => known[place]);
    for (const request of step.preempted) request.lost = step.number;
    step.cells = [];
    for (let i = 0; i < step.shares.length; i += 4) {
      const [place, start, count, kind] = step.shares.slice(i, i + 4);
      const request = known[place];
      request.seen = step.number;
      step.cells.push({ number: step.number, request, start, count, kind });
      step[kind === DECODE ? "decode" : "prefill"] += count;
      if (kind !== CHUNK) this.token(request, step, second);
    }
    delete step.shares;
    this.seat(step);
    second.prefill += step.prefill;
    second.decode += step.decode;
    second.steps += 1;
    second.running = step.running;
    second.waiting = step.waiting;
    this.steps.push(step);
  }

  /** A request has its first token, whose step may be one that a slow page has missed. */
  begun(request, first) {
    request.first = first;
    request.ttft = first - request.arrival;
    if (first > this.now - SPAN) this.second(Math.floor(first)).ttft.push(request.ttft);
  }

  /** A request got a token. */
  token(request, step, second) {
    if (request.told !== undefined) second.gaps.push(step.end - request.told);
    request.told = step.end;
    second.tokens += 1;
  }

  /** Give every request of a step a lane: the lowest whose request is not in the step, and was not preempted. */
  seat(step) {
    let next = 0;
    for (const cell of step.cells) {
      const request = cell.request;
      if (this.lanes[request.lane] !== request) {
        while (this.lanes[next] && !this.free(this.lanes[next], step.number)) next += 1;
        request.lane = next;
        request.begins = step.number;
        this.lanes[next] = request;
      }
      request.lost = undefined;
      cell.lane = request.lane;
    }
    step.begun = step.cells.filter(({ request }) => request.begins === step.number);
    step.losses = step.preempted.filter((request) => request.lane >= 0);
    for (const cell of step.cells) cell.request.cells.push(cell);
    step.cells.push(...step.losses.map((request) => ({ number: step.number, request, lane: request.lane, kind: LOST })));
    step.lanes = step.cells.reduce((most, cell) => Math.max(most, cell.lane + 1), 0);
  }

  free(request, number) {
    return request.seen < number && (request.lost === undefined || number - request.lost > 300);
  }

  second(time) {
    if (!this.seconds.has(time)) {
      const empty = { prefill: 0, decode: 0, tokens: 0, steps: 0, running: 0, waiting: 0, ttft: [], gaps: [] };
      this.seconds.set(time, empty);
    }
    return this.seconds.get(time);
  }

  forget() {
    if (this.steps.length > KEPT) this.steps.splice(0, this.steps.length - KEPT);
    const oldest = this.steps[0]?.number ?? 0;
    for (const [id, request] of this.requests) {
      if ((request.seen ?? 0) < oldest) {
        request.cells.length = 0;
        if (!(request.first > this.now - SPAN)) this.requests.delete(id);
      } else if (request.cells.length > 2 * KEPT) request.cells.splice(0, KEPT);
    }
    for (const time of this.seconds.keys()) if (time < this.now - SPAN - 5) this.seconds.delete(time);
  }

  /** All values of a list of the last so many seconds. */
  recent(name, seconds) {
    const from = this.now - seconds;
    return [...this.seconds].filter(([time]) => time >= from).flatMap(([, second]) => second[name]);
  }
}

/** The p-quantile of numbers; undefined of none. */
export function quantile(values, p) {
  if (!values.length) return undefined;
  const sorted = [...values].sort((a, b) => a - b);
  const place = p * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (place - low);
}

/** A number of seconds for people. */
export function duration(seconds) {
  if (seconds === undefined) return "–";
  if (seconds < 0.0095) return `${(seconds * 1000).toFixed(1)} ms`;
  return seconds < 0.9995 ? `${Math.round(seconds * 1000)} ms` : `${seconds.toFixed(seconds < 9.95 ? 2 : 1)} s`;
}

/** A count for people, with thin spaces. */
export function count(number) {
  return Math.round(number).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f");
}
