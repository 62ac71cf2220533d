/** The last minutes as samples of gauges and counters, and what follows from two of them: rates, means, shares. Draws nothing. */

export const SPAN_S = 300;
const STEP_S = 5; // rates are taken between samples so far apart: of one second alone they jump
const RECENT_S = 60;

/** One number of a sample: `engine.num_running`, `vision.time_s.fetch`; null where it is not there. */
export function valueAt(sample, path) {
  let value = sample;
  for (const name of path.split(".")) value = value?.[name];
  return typeof value === "number" ? value : null;
}

/** The sum of several numbers; null where none of them is there. */
export function sumAt(sample, paths) {
  const values = paths.map((path) => valueAt(sample, path)).filter((value) => value !== null);
  return values.length ? values.reduce((sum, value) => sum + value, 0) : null;
}

export class Samples {
  #all = [];
  #startedAt = null;

  get last() {
    return this.#all.at(-1) ?? null;
  }

  /** In the order of their time; one that is not newer than the last is dropped. `startedAt`: of the server; with it its clock begins. */
  add(samples, startedAt) {
    if (startedAt !== this.#startedAt) this.#all = [];
    this.#startedAt = startedAt;
    for (const sample of samples) {
      if (this.last === null || sample.at_s > this.last.at_s) this.#all.push(sample);
    }
    while (this.#all.length && this.#all[0].at_s < this.last.at_s - SPAN_S - STEP_S) this.#all.shift();
  }

  /** Points `{at, values}` of gauges: each of `read(sample)`. */
  gauges(read) {
    return this.#all.map((sample) => ({ at: sample.at_s, values: read(sample) }));
  }

  /** Points of counters per second. `read(sample)`: their values; null where unknown. */
  rates(read) {
    return this.#pairs((before, after, seconds) => read(after).map((value, at) => grown(read(before)[at], value, seconds)));
  }

  /** Points of what one of `count` took on average, in what `sum` counts; null while there was none. */
  means(sum, count) {
    return this.#pairs((before, after) => [ratio(delta(before, after, sum), delta(before, after, count))]);
  }

  /** The same over the last minute as one number. */
  recentMean(sum, count) {
    const [before, after] = this.#ends(RECENT_S);
    return before ? ratio(delta(before, after, sum), delta(before, after, count)) : null;
  }

  /** The share that `parts` had in `whole` over all of the time that is shown. */
  share(parts, whole) {
    const [before, after] = this.#ends(SPAN_S);
    return before ? ratio(delta(before, after, parts), delta(before, after, whole)) : null;
  }

  #ends(seconds) {
    const after = this.last;
    const before = this.#all.find((sample) => after.at_s - sample.at_s <= seconds && isSameLife(sample, after));
    return before && before !== after ? [before, after] : [null, after];
  }

  #pairs(compare) {
    const points = [];
    let before = null;
    for (const sample of this.#all) {
      if (before !== null && sample.at_s - before.at_s < STEP_S) continue;
      if (before !== null) {
        const values = compare(before, sample, sample.at_s - before.at_s);
        points.push({ at: sample.at_s, values });
      }
      before = sample;
    }
    return points;
  }
}

/** Counters begin anew with a new engine. */
const isSameLife = (before, after) =>
  before.engine === null || after.engine === null || before.engine.num_steps <= after.engine.num_steps;

function delta(before, after, paths) {
  const [from, to] = [sumAt(before, paths), sumAt(after, paths)];
  return from === null || to === null || to < from ? null : to - from;
}

const grown = (from, to, seconds) => (from === null || to === null || to < from ? null : (to - from) / seconds);
const ratio = (part, whole) => (part === null || !whole ? null : part / whole);
