/** What an answer cost: tokens, speed, and where the time went, from the header `Server-Timing` and this page's own clock. */

import { element, icon } from "./dom.js";

/** Milliseconds by stage. */
export function stagesOf(headers) {
  const entries = (headers.get("server-timing") ?? "")
    .split(",")
    .map((entry) => /^\s*([\w-]+);dur=([\d.]+)/.exec(entry));
  return Object.fromEntries(entries.filter(Boolean).map(([, name, duration]) => [name, Number(duration)]));
}

/** The clock of one answer. `stats()` is what is kept of it. */
export class Stopwatch {
  #started = performance.now();
  #first = null;
  #last = null;
  #pieces = 0;
  stages = {};

  /** Milliseconds since the question was sent. */
  get elapsed() {
    return performance.now() - this.#started;
  }

  piece() {
    this.#last = performance.now();
    this.#first ??= this.#last;
    this.#pieces++;
  }

  stats(usage) {
    return {
      first: this.#first === null ? null : this.#first - this.#started,
      generate: this.#first === null ? null : this.#last - this.#first,
      total: this.elapsed,
      pieces: this.#pieces,
      stages: this.stages,
      usage,
    };
  }
}

/** One line that opens to all of it. */
export function statsElement(stats) {
  const table = element("div", { class: "stats-body" });
  const details = element(
    "details",
    { class: "stats" },
    element("summary", {}, icon("chevron"), summary(stats)),
    table,
  );
  const { usage } = stats;
  const rows = stagesShown(stats);
  if (rows.length) table.append(bar(rows), list("Time", rows.map(stageRow)));
  if (usage) table.append(list("Tokens", tokenRows(usage)));
  return details;
}

export function duration(ms) {
  return ms < 999.5
    ? `${ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms`
    : `${(ms / 1000).toFixed(ms < 99_950 ? 2 : 0)} s`;
}

/** A line that breaks between its parts, never within one. */
function summary({ first, pieces, usage, generate }) {
  const count = usage ? usage.completion_tokens : pieces;
  const speed = tokensPerSecond({ usage, pieces, generate });
  const parts = [
    `${usage ? "" : "about "}${count} ${count === 1 ? "token" : "tokens"}`,
    speed && `${speed < 100 ? speed.toFixed(1) : Math.round(speed)} tokens/s`,
    `first after ${duration(first)}`,
  ];
  const shown = parts.filter(Boolean).flatMap((part) => [" · ", element("span", { class: "part" }, part)]);
  return element("span", {}, ...shown.slice(1));
}

/** Of the tokens after the first; an interrupted answer has no usage, and one piece is about a token. */
function tokensPerSecond({ usage, pieces, generate }) {
  const count = (usage ? usage.completion_tokens : pieces) - 1;
  return count > 0 && generate > 0 ? (1000 * count) / generate : null;
}

/** `[class, name, ms, note]`, one after the other from the question to the last token. */
function stagesShown({ stages, first, generate }) {
  const sum = (...names) => names.reduce((total, name) => total + (stages[name] ?? 0), 0);
  const server = sum("template", "pictures", "tokenize", "queue", "encode", "prefill");
  const pictureNote = ["fetch", "decode", "preprocess"]
    .filter((name) => `picture-${name}` in stages)
    .map((name) => `${name} ${duration(stages[`picture-${name}`])}`);
  const rows = [
    ["network", server ? "Upload and network" : "To the first token", Math.max(0, first - server)],
    ["pictures", "Pictures", stages.pictures, pictureNote.join(", ")],
    ["template", "Template and tokenizer", server ? sum("template", "tokenize") : undefined],
    ["queue", "Queue", stages.queue],
    ["encode", "Vision encoder", stages.encode],
    ["prefill", "Prefill, to the first token", stages.prefill],
    ["generate", "Generation", generate],
  ];
  return rows.filter(([, , ms]) => ms !== undefined && ms !== null);
}

function bar(rows) {
  const made = element("div", { class: "bar", "aria-hidden": "true" });
  for (const [stage, , ms] of rows) {
    const part = element("span", { class: `stage-${stage}` });
    part.style.flexGrow = ms;
    made.append(part);
  }
  return made;
}

const stageRow = ([stage, name, ms, note]) => [
  element("span", { class: `dot stage-${stage}` }),
  name,
  duration(ms),
  note,
];

function tokenRows({ prompt_tokens, completion_tokens, prompt_tokens_details: details }) {
  const notes = [
    details?.image_tokens && `${details.image_tokens} for pictures`,
    details?.cached_tokens && `${details.cached_tokens} cached`,
  ].filter(Boolean);
  return [
    [null, "Prompt", prompt_tokens.toLocaleString("en"), notes.join(", ")],
    [null, "Answer", completion_tokens.toLocaleString("en")],
  ];
}

function list(title, rows) {
  const made = element("dl", { "aria-label": title });
  for (const [mark, name, value, note] of rows) {
    made.append(
      element(
        "div",
        {},
        element("dt", {}, mark, name, note ? element("small", {}, note) : null),
        element("dd", {}, value),
      ),
    );
  }
  return made;
}
