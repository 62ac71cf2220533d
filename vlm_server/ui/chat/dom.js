/** Elements without HTML strings: nothing in this page parses text as HTML but `markdown.js`, which sanitises it. */

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** A new element. Properties that begin with `on` are listeners, `class` and names with a dash are attributes; children may be text. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class" || name === "role" || name.includes("-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** One of the symbols at the end of index.html. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** A button that shows an icon; `label` is its name for screen readers and its tooltip. */
export function iconButton(name, label, onclick) {
  return element(
    "button",
    { type: "button", class: "icon-button small", "aria-label": label, title: label, onclick },
    icon(name),
  );
}

/** A button that copies `text()` and shows that it did. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    button.replaceChildren(icon((await copied(text())) ? "check" : "alert"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** Whether the text is in the clipboard now. Pages that are neither https nor local have no clipboard API, only the old command. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = element("textarea", { value: text, class: "visually-hidden" });
    const focused = document.activeElement;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return done;
  }
}

/** A random name; crypto.randomUUID is missing on pages that are neither https nor local. */
export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}
