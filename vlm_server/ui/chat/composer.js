/** Where a message is written: text, pictures by drop, paste and file choice, and the buttons that send and stop. */

import { byId, element, icon } from "./dom.js";
import { bytes, filesOf, pictureElement, pictureOf } from "./pictures.js";

const TOUCH_ONLY = matchMedia("(hover: none) and (pointer: coarse)"); // without a Shift key, Enter has to break lines

export class Composer {
  #form = byId("composer");
  #text = byId("message");
  #attachments = byId("attachments");
  #notices = byId("notices");
  #pictures = [];
  #isBusy = false;
  #numReading = 0;
  #onSend;

  /** `onSend({text, pictures})` gets what was written, pictures with their blobs; `onStop()`; `limitsOf()`: the server's limits. */
  constructor({ onSend, onStop, limitsOf }) {
    this.#onSend = onSend;
    this.limitsOf = limitsOf;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("stop").addEventListener("click", onStop);
    this.#text.addEventListener("keydown", (event) => this.#onKey(event));
    this.#text.addEventListener("input", () => this.#refresh());
    byId("attach").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", (event) => {
      this.add([...event.target.files]);
      event.target.value = ""; // the same file can be chosen again
    });
    document.addEventListener("paste", (event) => this.#onPaste(event));
    this.#acceptDrops();
    if (TOUCH_ONLY.matches) this.#text.enterKeyHint = "enter";
    this.#refresh();
  }

  /** While an answer is written, nothing can be sent and the answer can be stopped. */
  set isBusy(isBusy) {
    const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
    this.#isBusy = isBusy;
    this.#refresh();
    if (hadFocus) this.focus(); // the button that had it is gone
  }

  focus() {
    if (!TOUCH_ONLY.matches) this.#text.focus(); // would open the keyboard over the answer
  }

  /** Puts a message here in place of what was written. */
  fill({ text, pictures }) {
    this.#text.value = text;
    this.#pictures = [...pictures];
    this.#notices.replaceChildren();
    this.#refresh();
  }

  clear() {
    this.fill({ text: "", pictures: [] });
  }

  /** Adds files as pictures, in their order; says which are refused and why. */
  async add(files) {
    this.#notices.replaceChildren();
    this.#numReading += 1;
    this.#refresh();
    for (const file of files) {
      try {
        this.#pictures.push(await pictureOf(file, this.limitsOf()));
      } catch (error) {
        this.notice(error.message);
      }
    }
    this.#numReading -= 1;
    this.#refresh();
    this.focus();
  }

  notice(message) {
    const dismiss = element(
      "button",
      { type: "button", class: "icon-button small", "aria-label": "Dismiss" },
      icon("close"),
    );
    const item = element("div", { class: "notice" }, icon("alert"), element("span", {}, message), dismiss);
    dismiss.addEventListener("click", () => item.remove());
    this.#notices.append(item);
  }

  #send() {
    const text = this.#text.value.trim();
    if (this.#isBusy || this.#numReading || !(text || this.#pictures.length)) return;
    const pictures = this.#pictures;
    this.clear();
    this.#onSend({ text, pictures });
  }

  #onKey(event) {
    const isComposing = event.isComposing || event.keyCode === 229; // 229: the Enter that ends a composition in Safari
    if (event.key !== "Enter" || event.shiftKey || isComposing || TOUCH_ONLY.matches) return;
    event.preventDefault();
    this.#send();
  }

  #onPaste(event) {
    const files = filesOf(event.clipboardData);
    if (event.clipboardData.types.includes("text/plain")) return; // cells of a table come as text and as a picture of it
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    this.add(files);
  }

  #acceptDrops() {
    const zone = byId("drop-zone");
    const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
    for (const name of ["dragenter", "dragover"]) {
      document.addEventListener(name, (event) => {
        if (!holdsFiles(event)) return;
        event.preventDefault();
        event.dataTransfer.dropEffect = "copy";
        zone.hidden = false;
      });
    }
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) zone.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      zone.hidden = true;
      if (!holdsFiles(event)) return;
      event.preventDefault();
      this.add(filesOf(event.dataTransfer));
    });
  }

  #remove(picture) {
    this.#pictures = this.#pictures.filter((other) => other !== picture);
    this.#refresh();
    this.#text.focus();
  }

  #refresh() {
    const items = this.#pictures.map((picture) => this.#attachment(picture));
    if (this.#numReading)
      items.push(element("li", { class: "reading" }, element("span", { class: "pulse" }), "Reading…"));
    this.#attachments.replaceChildren(...items);
    byId("send").hidden = this.#isBusy;
    byId("stop").hidden = !this.#isBusy;
    byId("send").disabled = this.#numReading > 0 || !(this.#text.value.trim() || this.#pictures.length);
    this.#text.style.height = "auto";
    this.#text.style.height = `${this.#text.scrollHeight}px`;
  }

  #elements = new WeakMap();

  /** Made once for each picture: a picture that is decoded anew at every letter flickers. */
  #attachment(picture) {
    if (!this.#elements.has(picture)) {
      const remove = element(
        "button",
        {
          type: "button",
          class: "remove",
          "aria-label": `Remove ${picture.name}`,
          onclick: () => this.#remove(picture),
        },
        icon("close"),
      );
      const caption = element("span", { class: "caption" }, picture.name, element("small", {}, bytes(picture.size)));
      this.#elements.set(
        picture,
        element("li", { class: "attachment" }, pictureElement(picture, picture.blob), caption, remove),
      );
    }
    return this.#elements.get(picture);
  }
}
