/** The conversation as it is shown: one list item per turn. Knows how a turn looks, not what happens when its buttons are pressed. */

import { byId, copyButton, element, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";
import { pictureElement } from "./pictures.js";
import { statsElement } from "./stats.js";

const NEAR_THE_END = 80; // pixels; who reads further up is left there
const FRAME_MS = 60; // between two renderings of a growing answer

export class TurnList {
  #list = byId("turns");
  #scroller = byId("scroller");
  #toLatest = byId("to-latest");
  #actions;
  #items = [];

  /** `actions`: `{blobOf, edit(index), retry(), showPicture(picture)}`. */
  constructor(actions) {
    this.#actions = actions;
    this.#scroller.addEventListener("scroll", () => this.#noteScroll(), { passive: true });
    this.#toLatest.addEventListener("click", () => this.scrollToEnd());
    new ResizeObserver(() => this.#follow()).observe(this.#list);
  }

  #follows = true;

  /** Shows these turns and no others. */
  show(turns) {
    for (const item of this.#items) item.end();
    this.#items = turns.map((turn, index) => this.#item(turn, index));
    this.#list.replaceChildren(...this.#items.map((item) => item.element));
    this.#markLast();
    this.scrollToEnd();
  }

  /** Adds the turn at the end. */
  append(turn) {
    const item = this.#item(turn, this.#items.length);
    this.#items.push(item);
    this.#list.append(item.element);
    this.#markLast();
    this.scrollToEnd();
  }

  /** The turn has changed. Nothing happens for one that is not shown. */
  update(turn) {
    this.#items.find((item) => item.turn === turn)?.update();
  }

  scrollToEnd() {
    this.#follows = true;
    this.#follow();
  }

  #item(turn, index) {
    return turn.role === "user" ? new Question(turn, index, this.#actions) : new Answer(turn, this.#actions);
  }

  #markLast() {
    this.#items.forEach((item, index) => item.element.classList.toggle("last", index === this.#items.length - 1));
  }

  #follow() {
    if (this.#follows) this.#scroller.scrollTop = this.#scroller.scrollHeight;
    this.#noteScroll();
  }

  #noteScroll() {
    const { scrollTop, scrollHeight, clientHeight } = this.#scroller;
    this.#follows = scrollHeight - scrollTop - clientHeight < NEAR_THE_END;
    this.#toLatest.hidden = this.#follows;
  }
}

class Question {
  constructor(turn, index, actions) {
    this.turn = turn;
    const pictures = element(
      "div",
      { class: "pictures" },
      ...turn.pictures.map((picture) => thumbnail(picture, actions)),
    );
    this.element = element(
      "li",
      { class: "turn question" },
      element("h2", { class: "visually-hidden" }, "You"),
      turn.pictures.length ? pictures : null,
      turn.text ? element("div", { class: "bubble" }, turn.text) : null,
      element(
        "div",
        { class: "turn-foot" },
        iconButton("edit", "Edit this message", () => actions.edit(index)),
        turn.text ? copyButton("Copy this message", () => turn.text) : null,
      ),
    );
  }

  update() {}

  end() {}
}

class Answer {
  #markdown = new MarkdownView();
  #waiting = element("p", { class: "waiting" });
  #foot = element("div", { class: "turn-foot" });
  #problem = element("div", {});
  #timer = null;
  #rendering = null;
  #actions;

  constructor(turn, actions) {
    this.turn = turn;
    this.#actions = actions;
    this.element = element(
      "li",
      { class: "turn answer" },
      element("h2", { class: "visually-hidden" }, "Answer"),
      this.#markdown.element,
      this.#waiting,
      this.#problem,
      this.#foot,
    );
    this.update();
  }

  /** A growing text is rendered a few times a second, whatever else at once. */
  update() {
    if (this.turn.status !== "streaming") this.#render();
    else if (this.#rendering === null)
      this.#rendering = setTimeout(() => this.#render(), this.turn.text ? FRAME_MS : 0);
  }

  end() {
    clearTimeout(this.#rendering);
    clearInterval(this.#timer);
  }

  #render() {
    const { turn } = this;
    clearTimeout(this.#rendering);
    this.#rendering = null;
    const isStreaming = turn.status === "streaming";
    this.element.setAttribute("aria-busy", String(isStreaming));
    this.element.classList.toggle("streaming", isStreaming && turn.text !== "");
    this.#markdown.show(turn.text);
    this.#showWaiting(isStreaming && !turn.text);
    this.#problem.replaceChildren(...(isStreaming ? [] : problems(turn)));
    this.#foot.replaceChildren(...(isStreaming ? [] : this.#footer()));
  }

  /** Seconds count up until the first token: the page is alive, and so is the question. */
  #showWaiting(isWaiting) {
    this.#waiting.hidden = !isWaiting;
    clearInterval(this.#timer);
    if (!isWaiting) return;
    const seconds = element("span", {});
    const tick = () => (seconds.textContent = ` ${((Date.now() - this.turn.asked) / 1000).toFixed(1)} s`);
    this.#waiting.replaceChildren(element("span", { class: "pulse" }), "Waiting for the first token", seconds);
    tick();
    this.#timer = setInterval(tick, 100);
  }

  #footer() {
    const { turn } = this;
    const retry =
      turn.status === "failed"
        ? element(
            "button",
            { type: "button", class: "button small", onclick: this.#actions.retry },
            icon("retry"),
            "Try again",
          )
        : iconButton("retry", "Answer again", this.#actions.retry);
    const copy = turn.text ? copyButton("Copy the answer", () => turn.text) : null;
    const buttons = element("span", { class: "turn-buttons" }, copy, element("span", { class: "only-last" }, retry));
    return turn.stats?.pieces ? [statsElement(turn.stats), buttons] : [buttons];
  }
}

/** Why an answer is not whole, and what the server warned about. */
function problems(turn) {
  const found = [];
  if (turn.status === "failed")
    found.push(element("div", { class: "problem", role: "alert" }, icon("alert"), element("p", {}, turn.error)));
  if (turn.status === "stopped")
    found.push(element("p", { class: "remark" }, turn.text ? "Stopped" : "Stopped before the first token"));
  if (turn.status === "done" && !turn.text)
    found.push(element("p", { class: "remark" }, "The model answered with no text."));
  if (turn.finishReason === "length") found.push(element("p", { class: "remark" }, "Cut off at the limit of tokens"));
  for (const warning of turn.warnings ?? []) found.push(element("p", { class: "remark" }, `Warning: ${warning}`));
  return found;
}

function thumbnail(picture, actions) {
  const label = `Show ${picture.name}`;
  const button = element("button", {
    type: "button",
    class: "thumbnail",
    title: picture.name,
    "aria-label": label,
    onclick: () => actions.showPicture(picture),
  });
  actions.blobOf(picture.id).then((blob) => button.append(pictureElement(picture, blob)));
  return button;
}
