/**
 * The chat page: conversations on one side, the server on the other, and what happens between them.
 *
 * An answer belongs to its conversation, not to what is shown: it goes on while another conversation is looked at.
 */

import { example, limits, streamChat } from "./api.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { closeOnBackdrop, confirmDelete, showPicture } from "./dialogs.js";
import { byId, newId } from "./dom.js";
import { History, picturesOf } from "./history.js";
import { explained, messagesOf } from "./requests.js";
import { Settings } from "./settings.js";
import { Sidebar } from "./sidebar.js";
import { stagesOf, Stopwatch } from "./stats.js";
import { TurnList } from "./turns.js";

const KEEP_MS = 1000; // between two writes of a growing answer
const DEFAULT_LIMITS = { max_picture_bytes: 20 << 20, max_picture_pixels: 50_000_000, max_body_bytes: 128 << 20 }; // until the server said
const EXAMPLE_QUESTION = "Describe the image please";
const TITLE_LENGTH = 60;

let serverLimits = DEFAULT_LIMITS;
let current = newConversation();
let editedIndex = null; // of the turn that the next message replaces
const running = new Map(); // conversation id → AbortController

const settings = new Settings();
const connection = new Connection(settings);
const archive = new History((why) => {
  byId("history-note").textContent = `Conversations are lost when this page is closed: ${why}.`;
  byId("history-note").classList.add("trouble");
});
const turns = new TurnList({
  blobOf: (id) => archive.blob(id),
  edit,
  retry,
  showPicture: async (picture) => showPicture(picture, await archive.blob(picture.id)),
});
const sidebar = new Sidebar({ open, create, rename, remove });
const composer = new Composer({ onSend: send, onStop: stop, limitsOf: () => serverLimits });

start();

async function start() {
  closeOnBackdrop();
  byId("open-settings").addEventListener("click", () => byId("settings").showModal());
  byId("cancel-edit").addEventListener("click", cancelEdit);
  byId("try-example").addEventListener("click", tryExample);
  document.addEventListener("keydown", onKey);
  addEventListener("hashchange", () => open(location.hash.slice(1)));
  connection.open().catch(() => {}); // the list of models says so; the next question tries again
  const limited = limits().then((found) => (serverLimits = found));
  limited.catch(() => {}); // the server itself refuses what is too big
  await archive.open();
  open(location.hash.slice(1));
}

// Asking and answering

function send({ text, pictures }) {
  const conversation = current;
  if (editedIndex !== null) truncate(conversation, editedIndex, pictures);
  const kept = pictures.map(({ blob, ...picture }) => picture);
  conversation.turns.push({ role: "user", text, pictures: kept });
  if (!conversation.isNamed) conversation.title = titleOf(conversation);
  for (const { blob, ...picture } of pictures) archive.addPicture(conversation.id, picture, blob);
  address(`#${conversation.id}`);
  show(conversation);
  answer(conversation);
}

/** Writes one answer at the end of a conversation whose last turn is the user's. */
async function answer(conversation) {
  const turn = { role: "assistant", text: "", status: "streaming", asked: Date.now(), model: byId("model").value };
  const controller = new AbortController();
  conversation.turns.push(turn);
  running.set(conversation.id, controller);
  if (conversation === current) turns.append(turn);
  refresh();
  say("Answering");
  let watch = new Stopwatch();
  let usage = null;
  let names = new Map();
  const keeping = setInterval(() => keep(conversation), KEEP_MS);
  keep(conversation);
  try {
    turn.model = await connection.chosenModel(controller.signal);
    const found = await messagesOf(conversation.turns, { system: settings.system, blobOf: (id) => archive.blob(id) });
    names = found.names;
    const body = { model: turn.model, messages: found.messages, ...settings.sampling() };
    const result = await connection.withKey(() => {
      watch = new Stopwatch();
      return streamChat(body, {
        signal: controller.signal,
        maxBytes: serverLimits.max_body_bytes,
        onHead: (headers) => (watch.stages = stagesOf(headers)),
        onText(text) {
          watch.piece();
          turn.text += text;
          turns.update(turn);
        },
      });
    });
    usage = result.usage;
    Object.assign(turn, { status: "done", finishReason: result.finishReason, warnings: result.warnings });
    say("Answer finished");
  } catch (error) {
    const isStopped = controller.signal.aborted;
    Object.assign(turn, isStopped ? { status: "stopped" } : { status: "failed", error: explained(error, names) });
    if (isStopped) say("Stopped");
    if (error.code === "model_not_found") connection.open().catch(() => {}); // the server has another one now
  }
  clearInterval(keeping);
  turn.stats = watch.stats(usage);
  running.delete(conversation.id);
  turns.update(turn);
  refresh();
  await keep(conversation);
}

function stop() {
  running.get(current.id)?.abort();
}

/** The last answer anew. */
function retry() {
  if (running.has(current.id)) return;
  current.turns.pop();
  turns.show(current.turns);
  answer(current);
}

async function edit(index) {
  if (running.has(current.id)) return;
  const turn = current.turns[index];
  const pictures = await Promise.all(
    turn.pictures.map(async (picture) => ({ ...picture, blob: await archive.blob(picture.id) })),
  );
  editedIndex = index;
  byId("editing").hidden = false;
  composer.fill({ text: turn.text, pictures: pictures.filter((picture) => picture.blob) });
  composer.focus();
}

function cancelEdit() {
  if (editedIndex === null) return false;
  editedIndex = null;
  byId("editing").hidden = true;
  composer.clear();
  composer.focus();
  return true;
}

/** Takes away the turns from `index` on, and the pictures that only they had. */
function truncate(conversation, index, keptPictures) {
  const keptIds = new Set(
    [...picturesOf(conversation.turns.slice(0, index)), ...keptPictures].map((picture) => picture.id),
  );
  const removed = picturesOf(conversation.turns.splice(index));
  editedIndex = null;
  byId("editing").hidden = true;
  archive.removePictures(removed.map((picture) => picture.id).filter((id) => !keptIds.has(id)));
}

async function tryExample() {
  try {
    await composer.add([new File([await example()], "example.png", { type: "image/png" })]);
  } catch (error) {
    return composer.notice(error.message);
  }
  byId("message").value ||= EXAMPLE_QUESTION;
  byId("message").dispatchEvent(new Event("input"));
}

// Conversations

function newConversation() {
  return { id: newId(), title: "New chat", isNamed: false, updated: Date.now(), turns: [] };
}

function create() {
  cancelEdit();
  current = newConversation();
  address("");
  show(current);
  composer.focus();
}

/** Shows the conversation; without one of that name an empty one. */
function open(id) {
  const found = archive.get(id);
  const isUnused = current.turns.length === 0;
  cancelEdit();
  current = found ?? (isUnused ? current : newConversation());
  for (const turn of current.turns) {
    if (turn.status === "streaming" && !running.has(current.id)) turn.status = "stopped"; // the page was left
  }
  if (found) address(`#${id}`);
  show(current);
  composer.focus();
}

/** The conversation in the address bar, for reloading and the back button. */
function address(hash) {
  if (location.hash !== hash) history.pushState(null, "", location.pathname + location.search + hash);
}

async function rename(conversation, title) {
  Object.assign(conversation, { title, isNamed: true });
  await archive.save(conversation);
  refresh();
}

async function remove(conversation) {
  if (!(await confirmDelete(conversation.title))) return;
  running.get(conversation.id)?.abort();
  conversation.isDeleted = true;
  await archive.remove(conversation);
  if (conversation === current) create();
  refresh();
}

/** What is kept of a conversation is kept now. */
async function keep(conversation) {
  if (conversation.isDeleted) return;
  conversation.updated = Date.now();
  await archive.save(conversation);
  refresh();
}

function titleOf({ turns: [{ text, pictures }] }) {
  const line = text.split("\n")[0] || pictures[0]?.name || "New chat";
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line;
}

// What is shown

function show(conversation) {
  turns.show(conversation.turns);
  refresh();
}

function refresh() {
  const isEmpty = current.turns.length === 0;
  byId("welcome").hidden = !isEmpty;
  byId("turns").hidden = isEmpty;
  byId("conversation-title").textContent = current.title;
  byId("conversation-title").hidden = isEmpty;
  document.title = isEmpty ? "Chat · vlm-server" : `${current.title} · vlm-server`;
  composer.isBusy = running.has(current.id);
  sidebar.show(archive.list(), current.id);
}

/** For screen readers, in a few words; the text of an answer is not read out while it grows. */
function say(words) {
  byId("status").textContent = words;
}

function onKey(event) {
  if (event.key !== "Escape" || event.defaultPrevented || document.querySelector("dialog[open]")) return;
  if (sidebar.close()) return;
  if (running.has(current.id)) stop();
  else cancelEdit();
}
