/** A conversation as the messages of a request. */

import { dataUrl } from "./pictures.js";

/**
 * `{messages, names}`: what is sent, and which picture stands at which path, to name it in an error.
 *
 * Answers that never came are left out; what the user said before and after one becomes a single message, since many chat templates
 * want users and answers to take turns. Rejects with an Error where a picture is lost.
 */
export async function messagesOf(turns, { system, blobOf }) {
  const messages = system.trim() ? [{ role: "system", content: system }] : [];
  const names = new Map();
  for (const turn of turns) {
    if (turn.role === "assistant") {
      if (turn.text) messages.push({ role: "assistant", content: turn.text });
      continue;
    }
    if (messages.at(-1)?.role !== "user") messages.push({ role: "user", content: [] });
    const { content } = messages.at(-1);
    for (const picture of turn.pictures) {
      const blob = await blobOf(picture.id);
      if (!blob)
        throw new Error(
          `The picture “${picture.name}” is no longer in this browser. Remove its message, or start a new chat.`,
        );
      names.set(`messages[${messages.length - 1}].content[${content.length}].image_url`, picture.name);
      content.push({ type: "image_url", image_url: { url: await dataUrl(blob) } });
    }
    if (turn.text) content.push({ type: "text", text: turn.text });
  }
  return { messages, names };
}

/** What the server said, with the picture's name in place of its path in the request. */
export function explained(error, names) {
  const path = [...names.keys()].find((path) => error.param === path || error.message.startsWith(`${path}:`));
  const message = path ? `Picture “${names.get(path)}”: ${error.message.replaceAll(`${path}: `, "")}` : error.message;
  return message.charAt(0).toUpperCase() + message.slice(1);
}
