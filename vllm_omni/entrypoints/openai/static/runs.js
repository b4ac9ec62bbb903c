// Requests of this page on their way: sent, watched, cancelled.

import { ApiError, call, events, send } from "./api.js";

// A browser opens at most six connections to a server of HTTP/1.1. A run holds two, for its answer and for its
// progress; what remains is for the queue, a cancellation and another tab.
const MAX_AT_ONCE = 2;
const ASK_EVERY_MS = 100;

const waiting = [];
let inFlight = 0;

export const isBusy = () => inFlight > 0 || waiting.length > 0;

/**
 * Start a request. `onChange(run)` is called whenever something happened, until `run.state` is "done", "failed" or
 * "cancelled". Before that it is "waiting" (in this page), "queued" or "running" (in the server).
 */
export function start(fields, images, onChange) {
  const run = { id: newId(), fields, images, onChange, state: "waiting", progress: null, result: null, error: null };
  run.abort = new AbortController();
  waiting.push(run);
  onChange(run);
  next();
  return run;
}

/** End a run. The server stops before its next step; a run that it does not know yet is not sent any further. */
export async function cancel(run) {
  const position = waiting.indexOf(run);
  if (position >= 0) {
    waiting.splice(position, 1);
    return change(run, { state: "cancelled" });
  }
  try {
    await send(`v1/requests/${run.id}`, { method: "DELETE" });
  } catch {
    run.abort.abort(); // Hanging up ends a request too.
  }
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return `page-${[...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("")}`;
}

function change(run, values) {
  Object.assign(run, values);
  run.onChange(run);
}

function next() {
  while (inFlight < MAX_AT_ONCE && waiting.length > 0) {
    inFlight += 1;
    carryOut(waiting.shift()).finally(() => {
      inFlight -= 1;
      next();
    });
  }
}

async function carryOut(run) {
  const watching = new AbortController();
  change(run, { state: "queued" });
  watch(run, watching.signal);
  try {
    const result = await post(run);
    change(run, { state: "done", result });
  } catch (error) {
    const isCancelled = error.name === "AbortError" || error.code === "cancelled";
    if (!isCancelled && !(error instanceof ApiError)) console.error(error);
    change(run, isCancelled ? { state: "cancelled" } : { state: "failed", error });
  } finally {
    watching.abort();
  }
}

function post(run) {
  const options = { method: "POST", headers: { "X-Request-Id": run.id }, signal: run.abort.signal };
  if (run.images.length === 0) return call("v1/images/generations", { ...options, body: run.fields });
  const form = new FormData();
  for (const image of run.images) form.append("image", image, "picture");
  for (const [name, value] of Object.entries(run.fields)) {
    form.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  return call("v1/images/edits", { ...options, body: form });
}

/** Follow a run's progress. The server knows a request once its pictures are read, so it is asked until it does. */
async function watch(run, signal) {
  for (;;) {
    await new Promise((resolve) => setTimeout(resolve, ASK_EVERY_MS));
    if (signal.aborted) return;
    try {
      for await (const { data } of events(`v1/requests/${run.id}/events`, signal)) {
        if (signal.aborted) return;
        if (data.state === "queued" || data.state === "running") {
          const preview = data.preview ?? run.progress?.preview ?? null;
          change(run, { state: data.state, progress: { ...data, preview, at: performance.now() } });
        }
      }
      return;
    } catch (error) {
      if (signal.aborted) return;
      if (error.status !== 404) return console.warn("no progress is shown:", error.message);
    }
  }
}
