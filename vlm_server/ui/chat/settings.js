/** What is asked of the model beside the conversation: sampling, system message and the choice of model. Kept in this browser. */

import { byId } from "./dom.js";
import { load, store } from "./storage.js";

const KEY = "vlm-server.settings";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

/** The dialog's fields, and what they hold. Only what is valid is kept and sent; a field that is not says so where it stands. */
export class Settings {
  constructor() {
    this.values = parsed(load("localStorage", KEY));
    this.form = byId("settings").querySelector("form");
    this.#fill();
    this.form.addEventListener("input", () => this.#read());
    byId("reset-settings").addEventListener("click", () => this.#reset());
  }

  get model() {
    return this.values.model;
  }

  set model(name) {
    this.values.model = name;
    this.#keep();
  }

  get system() {
    return this.values.system ?? "";
  }

  /** The sampling fields of a request; those left to the server are absent. */
  sampling() {
    return Object.fromEntries(NUMBERS.filter((name) => name in this.values).map((name) => [name, this.values[name]]));
  }

  #fill() {
    for (const name of NUMBERS) this.form.elements[name].value = this.values[name] ?? "";
    this.form.elements.system.value = this.system;
  }

  #read() {
    for (const name of NUMBERS) {
      const field = this.form.elements[name];
      const isValid = field.validity.valid;
      field.setAttribute("aria-invalid", String(!isValid));
      if (field.value === "" && isValid) delete this.values[name];
      else if (isValid) this.values[name] = field.valueAsNumber;
    }
    this.values.system = this.form.elements.system.value;
    this.#keep();
  }

  #reset() {
    this.values = { model: this.model };
    this.#fill();
    this.#read();
  }

  #keep() {
    store("localStorage", KEY, JSON.stringify(this.values));
  }
}

function parsed(text) {
  try {
    return JSON.parse(text) ?? {};
  } catch {
    return {};
  }
}
