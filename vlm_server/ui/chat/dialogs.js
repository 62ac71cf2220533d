/** The questions that the page asks: for an API key, and whether to delete. Each resolves once the dialog is closed. */

import { apiKey } from "./api.js";
import { byId } from "./dom.js";
import { pictureElement } from "./pictures.js";

/** Whether the user gave a key; then it is set. */
export async function askForKey(reason) {
  byId("key-reason").textContent = reason;
  byId("key").value = "";
  byId("remember-key").checked = apiKey.isRemembered();
  if ((await answered(byId("key-dialog"))) !== "ok") return false;
  apiKey.set(byId("key").value.trim(), { remember: byId("remember-key").checked });
  return true;
}

export async function confirmDelete(title) {
  byId("delete-name").textContent = title;
  return (await answered(byId("delete-dialog"))) === "ok";
}

export function showPicture(picture, blob) {
  byId("lightbox").querySelector("img, .no-picture").replaceWith(pictureElement(picture, blob));
  byId("lightbox").showModal();
}

/** A click beside a dialog closes it, as Escape does. */
export function closeOnBackdrop() {
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close("");
    });
  }
}

const lastAnswers = new WeakMap();

async function answered(dialog) {
  await lastAnswers.get(dialog); // a dialog's close event comes a moment after it closed: it must not answer the next question
  const answer = new Promise((resolve) => {
    dialog.returnValue = "";
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
  lastAnswers.set(dialog, answer);
  return answer;
}
