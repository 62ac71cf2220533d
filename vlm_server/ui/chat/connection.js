/** The server behind the page: which models it has, and the key that it wants. */

import { ApiError, apiKey, models } from "./api.js";
import { askForKey } from "./dialogs.js";
import { byId, element } from "./dom.js";

export class Connection {
  #select = byId("model");
  #settings;

  constructor(settings) {
    this.#settings = settings;
    this.#select.addEventListener("change", () => (settings.model = this.#select.value));
    byId("change-key").addEventListener("click", () => this.#changeKey());
  }

  /** Fills the list of models; asks for a key where one is needed. Rejects with ApiError, or AbortError. */
  async open(signal) {
    try {
      const names = (await this.withKey(() => models(signal))).map((model) => model.id);
      const chosen = names.includes(this.#settings.model) ? this.#settings.model : names[0];
      this.#select.replaceChildren(
        ...names.map((name) => element("option", { value: name, selected: name === chosen }, name)),
      );
      this.#select.disabled = false;
    } catch (error) {
      this.#select.replaceChildren(element("option", {}, error.status === 401 ? "Locked" : "Not connected"));
      this.#select.disabled = true;
      throw error;
    }
  }

  /** The chosen model; where none is known yet, the server is asked once more. */
  async chosenModel(signal) {
    if (this.#select.disabled) await this.open(signal);
    return this.#select.value;
  }

  /** `call()`, and again with each key that the user gives while the server wants another. */
  async withKey(call) {
    for (;;) {
      try {
        return await call();
      } catch (error) {
        if (!(error instanceof ApiError) || error.status !== 401) throw error;
        const reason = apiKey.get()
          ? "This server does not know that key."
          : "This server answers with an API key only.";
        if (!(await askForKey(reason))) throw error;
      }
    }
  }

  async #changeKey() {
    byId("settings").close();
    if (await askForKey("Leave it empty to forget the key.")) await this.open().catch(() => {});
  }
}
