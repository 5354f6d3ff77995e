// Every sampling setting of the API as a form; a field that is left empty is not sent.

import { el } from "./dom.js";

const INT = { kind: "int", step: 1 };
const NUMBER = { kind: "number" };

/** name → how it is asked for; `empty` is what the server takes when nothing is given. */
export const SETTINGS = {
  max_tokens: { ...INT, min: 1, value: 128, help: "the most tokens to generate" },
  temperature: { ...NUMBER, min: 0, max: 2, step: 0.05, empty: "1", help: "0 always takes the most probable token" },
  top_p: { ...NUMBER, min: 0.01, max: 1, step: 0.01, empty: "1", help: "the smallest set of tokens of this probability" },
  top_k: { ...INT, min: -1, empty: "0", help: "so many most probable tokens; 0 or −1: all" },
  min_p: { ...NUMBER, min: 0, max: 1, step: 0.01, empty: "0", help: "least probability, as a share of the greatest" },
  seed: { ...INT, min: 0, empty: "any", help: "the same seed gives the same answer" },
  n: { ...INT, min: 1, max: 128, empty: "1", help: "answers to one prompt" },
  min_tokens: { ...INT, min: 0, empty: "0", help: "no stop before so many tokens" },
  repetition_penalty: { ...NUMBER, min: 0.01, max: 100, step: 0.05, empty: "1", help: "above 1: against tokens seen" },
  presence_penalty: { ...NUMBER, min: -2, max: 2, step: 0.1, empty: "0", help: "against tokens that came once" },
  frequency_penalty: { ...NUMBER, min: -2, max: 2, step: 0.1, empty: "0", help: "against tokens by how often they came" },
  alternatives: { ...INT, min: 0, max: 20, value: 5, help: "most probable tokens shown beside each one (logprobs)" },
  priority: { ...INT, empty: "0", help: "lower is served earlier" },
  cache_salt: { kind: "text", empty: "none", help: "prefixes are shared under one salt only" },
  stop_token_ids: { kind: "ints", empty: "none", help: "token ids that end the answer: 1, 2" },
  allowed_token_ids: { kind: "ints", empty: "all", help: "only these token ids: 1, 2" },
  stop: { kind: "lines", empty: "none", help: "texts that end the answer, one a line, at most 4" },
  bad_words: { kind: "lines", empty: "none", help: "texts that must not come, one a line" },
  logit_bias: { kind: "json", empty: '{"42": -5}', help: "token id → what is added to its logit, as JSON" },
  system: { kind: "text", only: "chat", empty: "none", help: "the system message" },
  shape: { kind: "choice", of: ["none", "json", "regex", "grammar", "choice"], help: "what the answer must look like" },
  shape_text: { kind: "area", label: "its form", empty: "a JSON Schema, a regex, …", help: "choices: one a line" },
  ignore_eos: { kind: "bool", help: "go on after the end" },
  include_stop_str_in_output: { kind: "bool", help: "keep the stop text" },
  skip_special_tokens: { kind: "bool", value: true, help: "hide special tokens" },
  echo: { kind: "bool", only: "complete", help: "begin with the prompt" },
};

const FIRST = new Set(["max_tokens", "temperature", "top_p", "seed"]);
const WIDE = new Set(["lines", "json", "area"]);

function field(name, about) {
  const id = `set-${name}`;
  const common = { id, title: about.help };
  if (about.kind === "bool") {
    const box = el("input", { ...common, type: "checkbox", checked: about.value ?? false });
    return el("label", { className: "check", title: about.help }, box, about.label ?? name);
  }
  let input;
  if (about.kind === "choice") input = el("select", common, ...about.of.map((value) => el("option", { value }, value)));
  else if (WIDE.has(about.kind)) input = el("textarea", { ...common, rows: 2, placeholder: about.empty ?? "" });
  else {
    const limits = Object.fromEntries(["min", "max", "step"].filter((k) => k in about).map((k) => [k, about[k]]));
    const type = about.kind === "int" || about.kind === "number" ? "number" : "text";
    input = el("input", { ...common, type, ...limits, placeholder: about.empty ?? "", value: about.value ?? "" });
  }
  return el("label", { className: WIDE.has(about.kind) ? "wide" : "" }, about.label ?? name, input);
}

/** Build the form: what is asked for most in a box of its own. */
export function buildSettings(first, rest) {
  for (const [name, about] of Object.entries(SETTINGS)) (FIRST.has(name) ? first : rest).append(field(name, about));
}

/** Show the settings that an endpoint has. */
export function showSettings(endpoint) {
  for (const [name, { only }] of Object.entries(SETTINGS)) {
    document.getElementById(`set-${name}`).parentElement.hidden = only !== undefined && only !== endpoint;
  }
}

function read(name, { kind, empty, only }, endpoint) {
  const input = document.getElementById(`set-${name}`);
  if (only !== undefined && only !== endpoint) return undefined;
  if (kind === "bool") return input.checked;
  const text = input.value;
  if (text.trim() === "" || (kind === "choice" && text === "none")) return undefined;
  if (kind === "int" || kind === "number") return Number(text);
  if (kind === "ints") return text.split(/[\s,]+/).filter(Boolean).map(Number);
  if (kind === "lines") return text.split("\n").filter((line) => line !== "");
  if (kind !== "json") return text;
  try {
    return JSON.parse(text);
  } catch {
    throw new Error(`${name} must be JSON, such as ${empty}`);
  }
}

function shape(kind, text) {
  if (!kind) return undefined;
  if (text === undefined) throw new Error(`shape is ${kind}: say in the field beside it what form that is`);
  if (kind === "choice") return { choice: text.split("\n").filter((line) => line !== "") };
  if (kind !== "json") return { [kind]: text };
  try {
    return { json: JSON.parse(text) };
  } catch {
    throw new Error("the form must be a JSON Schema");
  }
}

/** The settings as fields of a request; Error says which can not be read. */
export function readSettings(endpoint) {
  const found = {};
  for (const [name, about] of Object.entries(SETTINGS)) {
    const value = read(name, about, endpoint);
    if (value !== undefined) found[name] = value;
  }
  const { shape: kind, shape_text: text, alternatives = 0, system, ...fields } = found;
  const wanted = shape(kind, text);
  if (wanted) fields.structured_outputs = wanted;
  return { fields, alternatives, system };
}
