/** Short texts in `localStorage` and `sessionStorage`. Where the browser forbids these, they live as long as the page. */

const inMemory = new Map();

/** `kind`: "localStorage" or "sessionStorage". Null where there is nothing. */
export function load(kind, key) {
  const kept = inMemory.get(`${kind}/${key}`);
  if (kept !== undefined) return kept;
  try {
    return window[kind].getItem(key);
  } catch {
    return null;
  }
}

/** Null removes it. */
export function store(kind, key, value) {
  try {
    if (value === null) window[kind].removeItem(key);
    else window[kind].setItem(key, value);
    inMemory.delete(`${kind}/${key}`);
  } catch {
    inMemory.set(`${kind}/${key}`, value);
  }
}
