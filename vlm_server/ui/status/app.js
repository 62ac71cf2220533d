/**
 * The status page: asks the server for its numbers every second and has the panels drawn.
 *
 * What it shows is the server's own word or is marked as old: whoever looks sees at once when the server, or its engine, does not answer.
 */

import { ApiError, apiKey, status } from "../api.js";
import { askForKey, closeOnBackdrop } from "../dialogs.js";
import { byId } from "../dom.js";
import { allPanels, duration, facts } from "./panels.js";
import { Samples } from "./samples.js";

const INTERVAL_MS = 1000;
const ANSWER_LIMIT_MS = 5000;
const SILENT_ENGINE_S = 3; // a long step may take as long

const samples = new Samples();
const panels = allPanels();
let isPaused = false;
let needsHistory = true; // at first, and after a time in which nothing was asked for
let answeredAt = null; // on the page's clock
let announced = "";
let timer = null;

start();

function start() {
  closeOnBackdrop();
  byId("panels").append(...panels.map((panel) => panel.element));
  byId("pause").addEventListener("click", () => pause(!isPaused));
  document.addEventListener("visibilitychange", () => schedule(0));
  schedule(0);
}

/** The next question; none while nobody looks. */
function schedule(afterMs) {
  clearTimeout(timer);
  if (isPaused || document.hidden) needsHistory = true;
  else timer = setTimeout(ask, afterMs);
}

function pause(paused) {
  isPaused = paused;
  byId("pause").setAttribute("aria-pressed", String(paused));
  byId("pause").textContent = paused ? "Go on" : "Pause";
  document.body.classList.toggle("paused", paused);
  schedule(0);
}

async function ask() {
  try {
    const answer = await status({ history: needsHistory, signal: AbortSignal.timeout(ANSWER_LIMIT_MS) });
    if (isPaused) return;
    needsHistory = false;
    answeredAt = performance.now();
    show(answer);
    schedule(INTERVAL_MS);
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) await unlock();
    else fail(error);
  }
}

async function unlock() {
  tell("locked", "Locked", "This server shows its numbers to those who have an API key.");
  const reason = apiKey.get() ? "This server does not know that key." : "This server answers with an API key only.";
  if (await askForKey(reason)) schedule(0);
  else pause(true); // Go on asks again
}

function fail(error) {
  needsHistory = true;
  if (error instanceof ApiError && error.status) {
    tell("down", `Status ${error.status}`, error.message);
  } else {
    const age = answeredAt === null ? "" : ` What is shown is ${Math.round((performance.now() - answeredAt) / 1000)} s old.`;
    tell("down", "No answer", `The server does not answer.${age}`);
  }
  schedule(2 * INTERVAL_MS);
}

function show(answer) {
  samples.add([...answer.history, answer.sample], answer.started_at);
  const { engine, readiness, uptime_s: uptime } = answer;
  const isSilent = engine.state === "ready" && engine.silence_s > SILENT_ENGINE_S;
  if (engine.state !== "ready") {
    const why = engine.failure ? `: ${engine.failure}` : "";
    tell("down", `Engine ${engine.state}`, `The engine is ${engine.state}${why}. Requests are refused until it is ready.`);
  } else if (isSilent) {
    tell("busy", "Engine silent", `The engine has not answered for ${Math.round(engine.silence_s)} s: it is in a long step, or hangs.`);
  } else if (readiness.status !== "ready") {
    tell("busy", "Not ready", `${readiness.message}.`);
  } else {
    tell("ready", "Ready", "");
  }
  byId("facts").replaceChildren(...facts(about(answer)));
  for (const panel of panels) panel.draw(samples, answer, uptime);
}

function about({ model, version, uptime_s: uptime, engine, readiness }) {
  const { info } = engine;
  const rows = [["Model", model], ["Up for", span(uptime)], ["Version", version]];
  if (info) rows.push(["Runs on", `${info.device}, ${info.dtype}${info.tp > 1 ? `, ${info.tp} processes` : ""}`], ["Window", `${info.session_len} tokens`]);
  const stages = Object.entries(readiness.probe?.stages_ms ?? {}).filter(([name]) => name !== "pictures");
  const total = stages.reduce((sum, [, ms]) => sum + ms, 0);
  if (stages.length) rows.push(["Last self-test", `${duration(total / 1000)}, ${span(readiness.probe.age_s)} ago`]);
  return rows;
}

function span(seconds) {
  const minutes = Math.floor(seconds / 60);
  if (minutes < 1) return `${Math.floor(seconds)} s`;
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

/** `kind`: ready, busy, down or locked. A change is read out once; the text below the head may grow older by the second. */
function tell(kind, word, text) {
  byId("state").className = `state ${kind}`;
  byId("state").textContent = word;
  document.title = `${kind === "ready" ? "" : "⚠ "}${word} · vlm-server`;
  document.body.classList.toggle("stale", kind === "down" && word === "No answer");
  byId("alert").hidden = !text;
  if (byId("alert").textContent !== text) byId("alert").textContent = text;
  byId("alert").className = kind;
  if (announced !== word && (announced || kind !== "ready")) byId("announcement").textContent = `${word}. ${text}`;
  announced = word;
}
