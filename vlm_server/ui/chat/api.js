/** The server's API: models, and one chat completion as a stream. Keys are kept here; nothing else of the page sees them. */

import { bytes } from "./pictures.js";
import { load, store } from "./storage.js";

const BASE = new URL("../", import.meta.url); // the page may stand behind a prefix
const KEY = "vlm-server.api-key";

/** What the server refused or failed at. `param`: the path of the field that is to blame, where there is one. */
export class ApiError extends Error {
  constructor(status, message, { code = "", param = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const apiKey = {
  get: () => load("sessionStorage", KEY) ?? load("localStorage", KEY),
  isRemembered: () => load("localStorage", KEY) !== null,
  /** An empty key is no key. */
  set(key, { remember }) {
    store("sessionStorage", KEY, remember ? null : key || null);
    store("localStorage", KEY, remember ? key || null : null);
  },
};

export async function models(signal) {
  return (await (await request("v1/models", { signal })).json()).data;
}

export async function limits() {
  return (await request("ui/limits.json")).json();
}

/** The server's numbers of this moment, with `history` also those of the last minutes. */
export async function status({ history, signal }) {
  return (await request(history ? "status?history=true" : "status", { signal })).json();
}

/** A picture to begin with, as a blob. */
export async function example() {
  return (await request("ui/example.png")).blob();
}

/**
 * One answer. Calls `onHead(headers)` once, then `onText(text)` for each piece; resolves to `{usage, finishReason, warnings}`.
 * Rejects with ApiError (a body over `maxBytes` is not sent), or with AbortError once `signal` is aborted.
 */
export async function streamChat(body, { signal, maxBytes, onHead, onText }) {
  const content = new Blob([JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } })]);
  if (content.size > maxBytes) {
    const sizes = `${bytes(content.size)} with its pictures; the server takes up to ${bytes(maxBytes)}`;
    throw new ApiError(
      413,
      `This conversation has ${sizes}. Start a new chat, or edit a message to take pictures away.`,
    );
  }
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: content,
    signal,
  });
  onHead(response.headers);
  const result = { usage: null, finishReason: null, warnings: [] };
  let isDone = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      isDone = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.code, chunk.error.message, chunk.error);
    const [choice] = chunk.choices;
    if (choice?.delta.content) onText(choice.delta.content);
    result.finishReason = choice?.finish_reason ?? result.finishReason;
    result.usage = chunk.usage ?? result.usage;
    result.warnings = chunk.warnings ?? result.warnings;
  }
  if (!isDone) throw new ApiError(0, "The connection ended before the answer was complete.");
  return result;
}

/** A successful response. Rejects with ApiError, status 0 where no server answers. */
async function request(path, options = {}) {
  const key = apiKey.get();
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, BASE), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError" || error.name === "TimeoutError") throw error;
    throw new ApiError(
      0,
      key && !isByteString(key) ? "The API key holds characters that no key has." : "The server cannot be reached.",
    );
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(
    response.status,
    body?.error?.message ?? `The server answered with status ${response.status}.`,
    body?.error ?? {},
  );
}

/** The data of each server-sent event; lines of other kinds, such as the comments of a silent stream, are skipped. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim();
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The connection to the server broke off.");
  } finally {
    reader.cancel().catch(() => {}); // nothing is left to be read, or nobody reads it
  }
}

const isByteString = (text) => [...text].every((character) => character.codePointAt(0) < 256);
