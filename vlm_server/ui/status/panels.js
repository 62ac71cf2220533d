/** What the page shows, panel by panel: each is made once and drawn anew with every sample. A number that the server lacks is left out. */

import { element } from "../dom.js";
import { bytes } from "../pictures.js";
import { Bar, Chart } from "./charts.js";
import { sumAt, valueAt } from "./samples.js";

/** Milliseconds by stage; `of` says of what each is the mean. */
const STAGES = [
  { name: "Fetch", of: "picture", color: "network", sum: "vision.time_s.fetch", count: "vision.num_done.fetch" },
  { name: "Decode", of: "picture", color: "pictures", sum: "vision.time_s.decode", count: "vision.num_done.decode" },
  { name: "Preprocess", of: "picture", color: "pictures", sum: "vision.time_s.preprocess", count: "vision.num_done.preprocess" },
  { name: "Queue", of: "request", color: "queue", sum: "stages.queue.time_s", count: "stages.queue.num" },
  { name: "Encode", of: "picture", color: "encode", sum: "engine.encode_time_s", count: "engine.num_images_encoded" },
  { name: "Prefill", of: "request", color: "prefill", sum: "stages.prefill.time_s", count: "stages.prefill.num" },
  { name: "Generate", of: "token", color: "generate", sum: "stages.decode.time_s", count: "stages.decode.num" },
];

/** Which counters say how often a cache had what was asked for. */
const CACHES = [
  { name: "Prefixes", what: "prompt tokens", hits: ["engine.num_cached_prompt_tokens"], all: ["engine.num_prompt_tokens"] },
  {
    name: "Embeddings", what: "pictures", hits: ["engine.num_embedding_cache_hits"],
    all: ["engine.num_embedding_cache_hits", "engine.num_embedding_cache_misses"],
    used: "engine.embedding_cache_bytes", limit: "embedding_cache_bytes",
  },
  {
    name: "Processed pictures", what: "pictures", hits: ["vision.num_cache_hits"], all: ["vision.num_cache_hits", "vision.num_cache_misses"],
    used: "vision.cache_bytes", limit: "processed_cache_bytes",
  },
  {
    name: "Downloads", what: "pictures", hits: ["vision.num_http_fresh", "vision.num_http_revalidated"],
    all: ["vision.num_http_fresh", "vision.num_http_revalidated", "vision.num_http_misses"],
    used: "vision.http_cache_bytes", limit: "http_cache_bytes",
  },
]; // prettier-ignore

const SILENT = "no numbers from the engine now";

export const number = (value) => (value >= 10_000 ? `${(value / 1000).toFixed(value < 100_000 ? 1 : 0)}k` : `${Math.round(value * 10) / 10}`);
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;

export function duration(seconds) {
  const ms = 1000 * seconds;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 1 : 0)} s`;
}

function panel(title, ...children) {
  const heading = element("h2", { id: `panel-${title.toLowerCase().replace(/\W+/g, "-")}` }, title);
  return element("section", { class: "panel", "aria-labelledby": heading.id }, heading, ...children);
}

class Requests {
  #chart = new Chart("Requests", [{ name: "in the batch", color: "generate" }, { name: "waiting", color: "queue" }], { format: number, ceiling: () => 4 });
  #note = element("p", { class: "note" });
  element = panel("Requests", this.#chart.element, this.#note);

  draw(samples, status, end) {
    this.#chart.draw(samples.gauges((sample) => [valueAt(sample, "engine.num_running"), valueAt(sample, "engine.num_waiting")]), end);
    const { engine } = status.sample;
    this.#note.textContent = SILENT;
    if (engine === null) return;
    const oldest = engine.oldest_waiting_s ? ` · the oldest waits ${duration(engine.oldest_waiting_s)}` : "";
    const { max_batch_size: rows, max_waiting: places } = status.limits;
    this.#note.textContent = `last step ${engine.num_batched_requests} of ${rows} rows · at most ${places} may wait${oldest}`;
  }
}

class Tokens {
  #chart = new Chart("Tokens per second", [{ name: "written", color: "generate" }, { name: "read", color: "prefill" }], { format: number, ceiling: () => 10 });
  #note = element("p", { class: "note" });
  element = panel("Tokens per second", this.#chart.element, this.#note);

  draw(samples, status, end) {
    const read = (sample) => {
      const [all, cached] = ["num_prompt_tokens", "num_cached_prompt_tokens"].map((name) => valueAt(sample, `engine.${name}`));
      return [valueAt(sample, "engine.num_output_tokens"), all === null ? null : all - cached];
    };
    this.#chart.draw(samples.rates(read), end);
    const { engine } = status.sample;
    this.#note.textContent = SILENT;
    if (engine === null) return;
    const { num_output_tokens: written, num_prompt_tokens: prompts } = engine;
    this.#note.textContent = `since the engine's start: ${number(written)} written, ${number(prompts)} of prompts`;
  }
}

class Memory {
  #total = 0;
  #bar = new Bar();
  #chart = new Chart(
    "KV blocks",
    [{ name: "in use", color: "generate" }, { name: "kept", color: "prefill" }, { name: "free", color: "free" }],
    { format: number, isStacked: true, ceiling: () => this.#total },
  );
  #note = element("p", { class: "note" });
  element = panel("KV cache", this.#bar.element, this.#chart.element, this.#note);

  draw(samples, status, end) {
    const names = ["num_referenced_blocks", "num_cached_blocks", "num_free_blocks"];
    const { engine } = status.sample;
    this.#total = engine?.num_blocks ?? this.#total;
    this.#chart.draw(samples.gauges((sample) => names.map((name) => valueAt(sample, `engine.${name}`))), end);
    this.#note.textContent = SILENT;
    this.#bar.set([], 0, SILENT);
    if (engine === null) return;
    const [used, kept, free] = names.map((name) => engine[name]);
    const parts = [{ color: "generate", value: used }, { color: "prefill", value: kept }];
    const share = (value) => percent(this.#total ? value / this.#total : 0);
    this.#bar.set(parts, this.#total, `${share(used)} in use, ${share(kept)} kept for prefixes, ${share(free)} free`);
    const size = status.engine.info?.block_size;
    this.#note.textContent = `${share(used)} in use, ${share(kept)} kept for prefixes · ${number(this.#total)} blocks${size ? ` of ${size} tokens` : ""}`;
  }
}

class Pictures {
  #steps = ["Fetch", "Decode", "Preprocess", "Encoder"].map((name) => ({ name, value: element("strong", {}, "–") }));
  #chart = new Chart("Pictures per minute", [{ name: "asked for", color: "pictures" }, { name: "encoded", color: "encode" }], { format: number, ceiling: () => 10 });
  #note = element("p", { class: "note" });
  element;

  constructor() {
    const flow = element("ol", { class: "flow", "aria-label": "Pictures in each stage now" });
    flow.append(...this.#steps.map(({ name, value }) => element("li", {}, value, element("span", {}, name))));
    this.element = panel("Pictures", flow, this.#chart.element, this.#note);
  }

  draw(samples, status, end) {
    const { sample } = status;
    const now = ["fetch", "decode", "preprocess"].map((stage) => valueAt(sample, `vision.num_in_flight.${stage}`));
    for (const [at, value] of [...now, valueAt(sample, "engine.num_images_waiting")].entries()) {
      this.#steps[at].value.textContent = value ?? "–";
      this.#steps[at].value.parentElement.classList.toggle("busy", Boolean(value));
    }
    const read = (each) => ["vision.num_pictures", "engine.num_images_encoded"].map((path) => valueAt(each, path)).map((value) => value && 60 * value);
    this.#chart.draw(samples.rates(read), end);
    this.#note.textContent = `per minute · ${number(sample.vision.num_pictures)} asked for since the start`;
  }
}

class StageTimes {
  #rows = STAGES.map((stage) => {
    const options = { format: duration, isSmall: true, ceiling: () => 0.001 };
    const chart = new Chart(`${stage.name}, mean time per ${stage.of}`, [{ name: stage.name, color: stage.color }], options);
    const mean = element("strong", {}, "–");
    const label = element("p", { class: "note" }, mean, ` per ${stage.of} in the last minute`);
    return { ...stage, chart, mean, element: element("li", {}, chart.element, label) };
  });
  #list = element("ul", { class: "stages" }, ...this.#rows.map((row) => row.element));
  element = panel("Stage times", this.#list);

  constructor() {
    this.element.classList.add("wide");
  }

  draw(samples, status, end) {
    for (const { chart, mean, sum, count } of this.#rows) {
      chart.draw(samples.means([sum], [count]), end);
      const seconds = samples.recentMean([sum], [count]);
      mean.textContent = seconds === null ? "–" : duration(seconds);
    }
  }
}

class Caches {
  #body = element("tbody");
  element;

  constructor() {
    const head = element("tr", {}, ...["Cache", "Last 5 min", "Since the start", "Memory"].map((name) => element("th", { scope: "col" }, name)));
    this.element = panel("Caches", element("table", { class: "caches" }, element("thead", {}, head), this.#body));
    this.element.classList.add("double");
  }

  draw(samples, status) {
    this.#body.replaceChildren(...CACHES.flatMap((cache) => this.#row(cache, samples, status)));
  }

  #row(cache, samples, { sample, limits }) {
    const [hits, asked] = [sumAt(sample, cache.hits), sumAt(sample, cache.all)];
    if (hits === null || cache.all.some((path) => valueAt(sample, path) === null)) return [];
    const share = samples.share(cache.hits, cache.all);
    const bar = new Bar();
    bar.set([{ color: "generate", value: share ?? 0 }], 1, share === null ? "nothing asked for" : percent(share));
    const used = cache.used ? valueAt(sample, cache.used) : null;
    const limit = limits[cache.limit];
    const memory = used === null ? "KV blocks" : `${bytes(used)}${limit ? ` of ${bytes(limit)}` : ""}`;
    return [
      element(
        "tr",
        {},
        element("th", { scope: "row" }, cache.name),
        element("td", {}, element("span", { class: "ratio" }, bar.element, share === null ? "–" : percent(share))),
        element("td", {}, asked ? `${percent(hits / asked)} of ${number(asked)} ${cache.what}` : `no ${cache.what} yet`),
        element("td", {}, memory),
      ),
    ];
  }
}

/** Whatever has a `used` and a `limit`, wherever the server tells of it. */
class Budgets {
  #list = element("ul", { class: "budgets" });
  element = panel("Budgets", this.#list);

  draw(samples, { sample }) {
    const found = Object.entries({ ...sample.vision?.budgets, ...sample.engine?.budgets }).filter(([, budget]) => budget && "limit" in budget);
    this.element.hidden = found.length === 0;
    this.#list.replaceChildren(...found.map(([name, budget]) => budgetRow(name, budget)));
  }
}

function budgetRow(name, { used, limit, num_waiting: waiting = 0, num_refused: refused = 0 }) {
  const bar = new Bar();
  const format = name.includes("bytes") ? bytes : number;
  bar.set([{ color: waiting ? "encode" : "generate", value: used }], limit, percent(limit ? used / limit : 0));
  const words = [`${format(used)} of ${format(limit)}`, waiting && `${waiting} waiting`, refused && `${number(refused)} refused`];
  return element("li", {}, element("strong", {}, name.replaceAll("_", " ")), bar.element, element("span", {}, words.filter(Boolean).join(" · ")));
}

class Trouble {
  #list = element("dl", { class: "facts" });
  element = panel("Trouble since the start", this.#list);

  draw(samples, { sample, engine }) {
    const failed = Object.entries(sample.vision.num_failed ?? {}).sort(([, a], [, b]) => b - a);
    const rows = [["Engine started again", engine.num_restarts], ["Requests preempted", sample.engine?.num_preemptions ?? "–"]];
    rows.push(...failed.map(([code, count]) => [`Pictures: ${code}`, number(count)]));
    if (!failed.length) rows.push(["Pictures refused", 0]);
    this.#list.replaceChildren(...facts(rows));
  }
}

/** All that the server tells, as it tells it: what has no panel of its own can still be read. */
class Everything {
  #body = element("tbody");
  #details;
  element;

  constructor() {
    const table = element("table", {}, this.#body);
    this.#details = element("details", {}, element("summary", {}, "All numbers"), table);
    this.element = element("section", { class: "panel wide", "aria-label": "All numbers" }, this.#details);
  }

  draw(samples, { sample, limits, num_turns }) {
    if (!this.#details.open) return;
    const rows = [...flat({ engine: sample.engine, pictures: sample.vision, stages: sample.stages, limits, num_turns })];
    const cells = rows.map(([name, value]) => element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(value))));
    this.#body.replaceChildren(...cells);
  }
}

function* flat(value, path = "") {
  if (value === null || typeof value !== "object") yield [path, typeof value === "number" ? Math.round(value * 1e4) / 1e4 : value];
  else if (Array.isArray(value)) yield [path, value.join(" ")];
  else for (const [name, inner] of Object.entries(value)) yield* flat(inner, path ? `${path}.${name}` : name);
}

/** Terms and what they are, for a `dl`. */
export const facts = (rows) => rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, String(value))));

export const allPanels = () => [
  ...[new Requests(), new Tokens(), new Memory(), new Pictures(), new StageTimes()],
  ...[new Caches(), new Budgets(), new Trouble(), new Everything()],
];
