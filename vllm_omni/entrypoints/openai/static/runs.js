// Requests of this page on their way: sent, watched, cancelled.

import { ApiError, arrival, call, events, send } from "./api.js";
import * as store from "./store.js";

// A browser opens at most six connections to a server of HTTP/1.1, all its tabs together. A run holds one.
const MAX_AT_ONCE = 3;
const ASK_FOR_JOB_EVERY_MS = 1000;
const FORGET_AFTER_MS = 24 * 3600 * 1000;
const TAB = "tab";

const waiting = [];
const inFlight = new Set();

/** Whether closing the page would end something: all but jobs that the server has. */
export const wouldLose = () => waiting.length > 0 || [...inFlight].some((run) => run.job === null);

/** Whether a request of the server is one of this page. */
export const isOurs = (id) => [...inFlight].some((run) => id === run.job || id === run.progress?.id);

/** What tells this tab from others of the browser. A reload does not change it. */
function thisTab() {
  const tab = sessionStorage.getItem(TAB) ?? newId();
  sessionStorage.setItem(TAB, tab);
  return tab;
}

const newId = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-");

/**
 * Start a request for an "image" or a "video". `onChange(run)` is called whenever something happened, until `run.state`
 * is "done", "failed" or "cancelled". Before that it is "waiting" (in this page), "queued" or "running" (in the server).
 */
export function start(kind, fields, images, onChange) {
  const kept = { id: newId(), created: Date.now(), tab: thisTab(), kind, job: null, fields, images };
  enqueue(kept, onChange, save(kept));
}

/** Once more what failed; a job that the server may still have is followed. */
export function retry(run) {
  if (run.job !== null && run.error.status === 0) enqueue(run, run.onChange);
  else start(run.kind, run.fields, run.images, run.onChange);
}

function enqueue({ id, created, tab, kind, job, fields, images }, onChange, saved = Promise.resolve()) {
  const run = { id, created, tab, kind, job, fields, images, onChange, saved, abort: new AbortController() };
  Object.assign(run, { state: "waiting", progress: null, result: null, error: null });
  waiting.push(run);
  onChange(run);
  next();
}

/** Keep what makes a run again. Without it the run is as good, until the page is closed. */
async function save({ id, created, tab, kind, job, fields, images }) {
  try {
    await store.putRun({ id, created, tab, kind, job, fields, images });
  } catch (error) {
    console.warn("a reload would lose this request:", error?.message);
  }
}

async function forget(run) {
  await run.saved;
  await store.removeRun(run.id).catch(() => {}); // What could not be kept need not be removed.
}

/**
 * Go on after a reload: follow the jobs that the server has, and send again what it ended as the page went. What belongs
 * to another tab is left to it.
 */
export async function resume(onChange) {
  const kept = await store.runs().catch(() => []);
  for (const run of kept.sort((a, b) => a.created - b.created)) {
    const isPast = !(Date.now() - run.created < FORGET_AFTER_MS);
    if (run.job || (run.tab === thisTab() && !isPast)) enqueue(run, onChange);
    else if (isPast) await store.removeRun(run.id);
  }
}

/** End a run: the server stops before its next step. */
export async function cancel(run) {
  const position = waiting.indexOf(run);
  if (position >= 0) {
    waiting.splice(position, 1);
    change(run, { state: "cancelled" });
    return forget(run);
  }
  if (run.job === null) return run.abort.abort(); // Hanging up ends a request that is no job.
  try {
    await send(`v1/requests/${run.job}`, { method: "DELETE" });
  } catch (error) {
    change(run, { state: "failed", error });
  }
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
  change(run, { state: "queued" });
  try {
    await run.saved;
    const result = run.kind === "video" ? await makeVideo(run) : await makePictures(run);
    change(run, { state: "done", result });
  } catch (error) {
    const isCancelled = error.name === "AbortError" || error.code === "cancelled";
    if (!isCancelled && !(error instanceof ApiError)) console.error(error);
    // A server that cannot be reached may be back with the job when the page is opened again.
    if (run.job === null || error.status !== 0) await forget(run);
    change(run, isCancelled ? { state: "cancelled" } : { state: "failed", error });
  }
}

function showProgress(run, told) {
  if (told.state !== "queued" && told.state !== "running") return;
  const preview = told.preview ?? run.progress?.preview ?? null;
  change(run, { state: told.state, progress: { ...told, preview, at: performance.now() } });
}

async function makePictures(run) {
  const fields = { ...run.fields, stream: true, stream_progress: true };
  const path = run.images.length === 0 ? "v1/images/generations" : "v1/images/edits";
  const options = { method: "POST", body: bodyOf(fields, run.images, "image"), signal: run.abort.signal };
  const result = { data: [] };
  for await (const { name, data } of events(path, options)) {
    if (name === "error") throw new ApiError(500, data.error);
    if (name === "progress") showProgress(run, data);
    else {
      result.data.push({ blob: blobOf(data.b64_json, `image/${data.output_format}`) });
      Object.assign(result, { receipt: data.receipt, timings: data.timings });
    }
  }
  if (result.data.length === 0) throw new ApiError(0, { message: "The server hung up before the picture was done." });
  return result;
}

function blobOf(base64, type) {
  return new Blob([Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0))], { type });
}

/** JSON, or a form if there are pictures, which go under the name `picture`. */
function bodyOf(fields, images, picture) {
  if (images.length === 0) return fields;
  const form = new FormData();
  for (const image of images) form.append(picture, image, "picture");
  for (const [name, value] of Object.entries(fields)) {
    form.append(name, typeof value === "string" ? value : JSON.stringify(value));
  }
  return form;
}

/** A video is a job: it goes on without this page, which finds it again by its id. */
async function makeVideo(run) {
  if (run.job === null) {
    const body = bodyOf(run.fields, run.images, "input_reference");
    const { id } = await call("v1/videos", { method: "POST", body, signal: run.abort.signal });
    run.job = id;
    await save(run);
  }
  const watching = new AbortController();
  watch(run, watching.signal);
  try {
    return await finishedJob(run);
  } finally {
    watching.abort();
  }
}

async function finishedJob(run) {
  const path = `v1/videos/${run.job}`;
  let job = await call(path);
  while (job.status !== "completed" && job.status !== "failed") {
    await new Promise((resolve) => setTimeout(resolve, ASK_FOR_JOB_EVERY_MS));
    job = await call(path);
  }
  if (job.status === "failed") throw new ApiError(500, job.error);
  const blob = await arrival((await send(`${path}/content`)).blob());
  return { data: [{ blob }], receipt: job.receipt, timings: job.timings };
}

/** Follow the progress of a job. Without it the job is as good: it is asked for its state all the same. */
async function watch(run, signal) {
  try {
    for await (const { data } of events(`v1/requests/${run.job}/events`, { signal })) {
      if (signal.aborted) return;
      showProgress(run, data);
    }
  } catch (error) {
    if (!signal.aborted && error.status !== 404) console.warn("no progress is shown:", error.message);
  }
}
