// Requests of this page on their way: sent, watched, cancelled.

import { ApiError, call, events, send } from "./api.js";
import * as store from "./store.js";

// A browser opens at most six connections to a server of HTTP/1.1. A run holds two, for its answer and for its
// progress; what remains is for the queue, a cancellation and another tab.
const MAX_AT_ONCE = 2;
const ASK_EVERY_MS = 100;
const ASK_FOR_JOB_EVERY_MS = 1000;

const waiting = [];
const inFlight = new Set();

/** Whether closing the page would end something: all but jobs that the server has. */
export const wouldLose = () => waiting.length > 0 || [...inFlight].some((run) => run.kind === "image");

/**
 * Start a request for an "image" or a "video". `onChange(run)` is called whenever something happened, until `run.state`
 * is "done", "failed" or "cancelled". Before that it is "waiting" (in this page), "queued" or "running" (in the server).
 */
export function start(kind, fields, images, onChange, id = null) {
  const run = { kind, fields, images, onChange, state: "waiting", progress: null, result: null, error: null };
  Object.assign(run, { id: id ?? newId(), isKnown: id !== null, abort: new AbortController() });
  waiting.push(run);
  onChange(run);
  next();
  return run;
}

/** Follow the jobs that this page left to the server when it was closed. */
export async function resume(onChange) {
  for (const { id, fields, images } of await store.jobs()) start("video", fields, images, onChange, id);
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
  while (inFlight.size < MAX_AT_ONCE && waiting.length > 0) {
    const run = waiting.shift();
    inFlight.add(run);
    carryOut(run).finally(() => {
      inFlight.delete(run);
      next();
    });
  }
}

async function carryOut(run) {
  const watching = new AbortController();
  change(run, { state: "queued" });
  try {
    if (run.kind === "video" && !run.isKnown) await createJob(run);
    watch(run, watching.signal);
    const result = run.kind === "video" ? await finishedJob(run) : await post(run);
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
  const path = run.images.length === 0 ? "v1/images/generations" : "v1/images/edits";
  return call(path, { ...options, body: bodyOf(run, "image") });
}

/** JSON, or a form if there are pictures, which go under the name `picture`. */
function bodyOf({ fields, images }, picture) {
  if (images.length === 0) return fields;
  const form = new FormData();
  for (const image of images) form.append(picture, image, "picture");
  for (const [name, value] of Object.entries(fields)) {
    form.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  return form;
}

/** A video is a job: it goes on without this page, which finds it again by its id. */
async function createJob(run) {
  const options = { method: "POST", body: bodyOf(run, "input_reference"), signal: run.abort.signal };
  run.id = (await call("v1/videos", options)).id;
  await store.addJob({ id: run.id, fields: run.fields, images: run.images });
}

async function finishedJob(run) {
  const path = `v1/videos/${run.id}`;
  let job;
  try {
    for (;;) {
      job = await call(path, { signal: run.abort.signal });
      if (job.status === "completed" || job.status === "failed") break;
      await new Promise((resolve) => setTimeout(resolve, ASK_FOR_JOB_EVERY_MS));
    }
  } catch (error) {
    // A server that cannot be reached may be back with the job when the page is opened again.
    if (error.status !== 0) await store.removeJob(run.id);
    throw error;
  }
  await store.removeJob(run.id);
  if (job.status === "failed") throw new ApiError(500, job.error);
  const blob = await (await send(`${path}/content`)).blob();
  return { data: [{ blob }], receipt: job.receipt, timings: job.timings };
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
