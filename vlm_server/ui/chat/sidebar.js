/** The list of conversations; on a narrow window a drawer. */

import { byId, element, iconButton } from "./dom.js";

const NARROW = matchMedia("(max-width: 820px)");

export class Sidebar {
  #sidebar = byId("sidebar");
  #list = byId("conversations");
  #actions;
  #shown = "";

  /** `actions`: `{open(id), create(), rename(conversation, title), remove(conversation)}`. */
  constructor(actions) {
    this.#actions = actions;
    byId("new-chat").addEventListener("click", () => {
      this.close();
      actions.create();
    });
    byId("open-sidebar").addEventListener("click", () => this.#toggle(true));
    byId("close-sidebar").addEventListener("click", () => this.close());
    byId("backdrop").addEventListener("click", () => this.close());
    NARROW.addEventListener("change", () => this.#toggle(false));
    this.#toggle(false);
  }

  /** Whether the drawer was open. */
  close() {
    const wasOpen = this.#sidebar.classList.contains("open");
    this.#toggle(false);
    if (wasOpen) byId("open-sidebar").focus();
    return wasOpen;
  }

  /** Rebuilt only where something has changed, and never under a name that is being written. */
  show(conversations, currentId) {
    const shown = JSON.stringify([currentId, conversations.map(({ id, title }) => [id, title])]);
    if (shown === this.#shown || this.#list.querySelector("input")) return;
    this.#shown = shown;
    this.#list.replaceChildren(
      ...conversations.map((conversation) => this.#item(conversation, conversation.id === currentId)),
    );
  }

  #toggle(isOpen) {
    this.#sidebar.classList.toggle("open", isOpen);
    this.#sidebar.inert = NARROW.matches && !isOpen;
    byId("main").inert = NARROW.matches && isOpen;
    byId("backdrop").hidden = !isOpen;
    byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
    if (isOpen) byId("close-sidebar").focus();
  }

  #item(conversation, isCurrent) {
    const open = element(
      "button",
      {
        type: "button",
        class: "conversation",
        title: conversation.title,
        "aria-current": isCurrent ? "page" : undefined,
        onclick: () => {
          this.close();
          this.#actions.open(conversation.id);
        },
      },
      conversation.title,
    );
    const item = element("li", { class: isCurrent ? "current" : "" }, open);
    item.append(
      iconButton("edit", `Rename ${conversation.title}`, () => this.#rename(item, conversation)),
      iconButton("delete", `Delete ${conversation.title}`, () => this.#actions.remove(conversation)),
    );
    return item;
  }

  /** Enter and leaving the field keep the new name, Escape keeps the old one. */
  #rename(item, conversation) {
    const field = element("input", {
      type: "text",
      value: conversation.title,
      maxLength: 120,
      "aria-label": "Name of the conversation",
    });
    let isOver = false;
    const finish = (title) => {
      if (isOver) return;
      isOver = true;
      field.remove();
      this.#shown = "";
      this.#actions.rename(conversation, title.trim() || conversation.title);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(field.value);
      if (event.key === "Escape") finish(conversation.title);
      event.stopPropagation(); // Escape also stops an answer
    });
    field.addEventListener("blur", () => finish(field.value));
    item.replaceChildren(field);
    field.focus();
    field.select();
  }
}
