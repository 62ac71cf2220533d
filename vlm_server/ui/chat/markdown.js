/**
 * Answers as Markdown. HTML in an answer is text; pictures become links, since an answer may name any address; what is left is sanitised
 * once more before it enters the page.
 */

import { copyButton, element } from "./dom.js";
import MarkdownIt from "./vendor/markdown-it.mjs";
import DOMPurify from "./vendor/purify.mjs";

const ALLOWED = {
  ALLOWED_TAGS: [
    ..."p br hr strong em s code pre blockquote ul ol li a h1 h2 h3 h4 h5 h6 table thead tbody tr th td".split(" "),
  ],
  ALLOWED_ATTR: ["href", "title", "start", "class"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};
const OUR_CLASSES = /^(?:language-\S+|align-(?:left|right|center))$/;

const parser = new MarkdownIt({ html: false, linkify: true, breaks: true });
parser.linkify.set({ fuzzyLink: false, fuzzyEmail: false });
parser.validateLink = (url) => /^(?:https?:\/\/|mailto:)/i.test(url.trim());
parser.renderer.rules.image = (tokens, index) => {
  const url = parser.utils.escapeHtml(tokens[index].attrGet("src"));
  return `<a href="${url}">${parser.utils.escapeHtml(tokens[index].content) || url}</a>`;
};
for (const cell of ["th_open", "td_open"]) parser.renderer.rules[cell] = alignedByClass;

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.hasAttribute("class") && !OUR_CLASSES.test(node.className)) node.removeAttribute("class");
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

/** Shows a text that grows: blocks that did not change keep their elements, and with them a selection. */
export class MarkdownView {
  constructor() {
    this.element = element("div", { class: "markdown" });
    this.blocks = [];
  }

  show(text) {
    const blocks = renderedBlocks(text);
    let same = 0;
    while (same < blocks.length && blocks[same] === this.blocks[same]) same++;
    while (this.element.children.length > same) this.element.lastChild.remove();
    this.element.append(...blocks.slice(same).map(sanitised));
    this.blocks = blocks;
  }
}

/** One HTML string for each block at the top level. */
function renderedBlocks(text) {
  const env = {};
  const blocks = [];
  let open = [];
  for (const token of parser.parse(text, env)) {
    open.push(token);
    if (token.level > 0 || token.nesting > 0) continue;
    blocks.push(parser.renderer.render(open, parser.options, env));
    open = [];
  }
  return blocks;
}

function sanitised(html) {
  const block = element("div", {}, DOMPurify.sanitize(html, ALLOWED));
  for (const pre of block.querySelectorAll("pre")) {
    const language = pre.firstElementChild?.className.replace("language-", "") ?? "";
    const head = element(
      "div",
      { class: "code-head" },
      element("span", {}, language),
      copyButton("Copy code", () => pre.textContent),
    );
    const frame = element("div", { class: "code" });
    pre.replaceWith(frame);
    pre.tabIndex = 0; // scrolls sideways by keyboard
    frame.append(head, pre);
  }
  for (const table of block.querySelectorAll("table")) {
    const frame = element("div", { class: "table", tabIndex: 0, role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return block;
}

/** The policy of this page forbids style attributes, by which markdown-it aligns the cells of tables. */
function alignedByClass(tokens, index, options, env, renderer) {
  const token = tokens[index];
  const style = token.attrGet("style");
  if (style) token.attrs = [["class", style.replace("text-align:", "align-")]];
  return renderer.renderToken(tokens, index, options);
}
