// Cards: requests on their way, and pictures that are kept.

import { announce, button, byId, el, seconds } from "./dom.js";
import * as store from "./store.js";
import { cancel } from "./runs.js";

const PAGE = 40;
const list = byId("gallery");
const running = new Set(); // runs whose cards count down
let actions = {};
let total = 0; // pictures that are kept, shown or not

/** `given` are what a card's buttons do: `again`, `variation`, `edit` (null without), `compare`, `view`, `retry`. */
export async function open(given) {
  actions = given;
  byId("older").addEventListener("click", () => showOlder());
  byId("clear").addEventListener("click", clear);
  setInterval(() => running.forEach((run) => (run.card.state.textContent = stateText(run))), 500);
  try {
    total = await store.count();
    await showOlder();
  } catch (error) {
    notice(`Pictures are not kept when the page is closed: the browser stores nothing (${error?.message ?? error}).`);
  }
}

/** All records that are shown, in their order on the page. */
export const shown = () => [...list.children].map((card) => card.record).filter(Boolean);

async function showOlder() {
  const oldest = shown().filter((record) => record.id !== undefined).at(-1);
  const records = await store.older(oldest?.id ?? null, PAGE);
  const cards = records.map(pictureCard);
  const hadFocus = document.activeElement === byId("older");
  list.append(...cards);
  update();
  if (hadFocus) cards[0]?.focus({ preventScroll: true });
}

/** Keep the pictures of a run, and show them where its card was. */
export async function keep(run, model) {
  const { data, receipt, timings } = run.result;
  const perSeed = Math.max(1, Math.round(data.length / (receipt.seeds?.length ?? 1)));
  const { n, seed, ...rest } = run.fields;
  const fresh = [];
  for (const [index, entry] of data.entries()) {
    const fields = { ...rest };
    const pictureSeed = receipt.seeds?.[Math.floor(index / perSeed)] ?? seed;
    if (pictureSeed !== undefined) fields.seed = pictureSeed;
    fresh.push({ created: Date.now(), blob: entry.blob, fields, images: run.images, model, seconds: timings.total_s, receipt });
  }
  try {
    await store.keep(fresh, run.id);
  } catch (error) {
    notice(`“${run.fields.prompt}” is not kept when the page is closed: the browser refused (${error?.message ?? error}).`);
  }
  total += fresh.length;
  running.delete(run);
  replace(run.card, ...fresh.reverse().map(pictureCard));
  announce(`Finished: ${run.fields.prompt}`);
  update();
}

export async function remove(record) {
  if (record.id !== undefined) await store.remove(record.id);
  drop(record);
  total -= 1;
  update();
}

function drop(record) {
  replace(record.card);
  URL.revokeObjectURL(record.url);
}

/** Put others in the place of a card, or none. Whoever was on it by keyboard goes on from there. */
function replace(card, ...others) {
  const next = others[0] ?? card.nextElementSibling ?? card.previousElementSibling ?? byId("gallery-title");
  const hadFocus = card.contains(document.activeElement);
  card.replaceWith(...others);
  if (hadFocus) next.focus({ preventScroll: true });
}

async function clear() {
  if (!confirm(`Delete all ${total} pictures of this browser's gallery?`)) return;
  await store.clear();
  shown().forEach(drop);
  total = 0;
  update();
  byId("gallery-title").focus();
  announce("The gallery is empty.");
}

function update() {
  byId("count").textContent = total > 0 ? `${total}` : "";
  byId("empty").hidden = list.children.length > 0;
  byId("clear").hidden = total === 0;
  byId("older").hidden = shown().length >= total;
}

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = false;
}

/** The address of a record's picture, while the page is open. */
export function urlOf(record) {
  record.url ??= URL.createObjectURL(record.blob);
  return record.url;
}

export const isVideo = (record) => record.blob.type.startsWith("video/");

/** An element that shows a record: a picture, or a video. */
export function mediaOf(record, properties = {}) {
  const src = urlOf(record);
  const text = record.fields.prompt;
  if (!isVideo(record)) return el("img", { src, alt: text, decoding: "async", ...properties });
  const autoplay = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  return el("video", { src, autoplay, loop: true, muted: true, playsInline: true, "aria-label": text, ...properties });
}

export function describe(record) {
  const { receipt, fields } = record;
  const parts = [];
  if (receipt.width) parts.push(`${receipt.width} × ${receipt.height}`);
  if (receipt.num_frames) parts.push(`${receipt.num_frames} frames at ${receipt.fps}/s`);
  const steps = receipt.num_inference_steps;
  if (steps) parts.push(`${steps} ${steps === 1 ? "step" : "steps"}`);
  if (fields.seed !== undefined) parts.push(`seed ${fields.seed}`);
  parts.push(seconds(record.seconds));
  return parts.join(" · ");
}

function pictureCard(record) {
  const media = mediaOf(record);
  const view = el("button", { type: "button", className: "view", onclick: () => actions.view(record) }, media);
  const compare = button("Compare", () => actions.compare(record, compare), { "aria-pressed": "false" });
  record.card = el(
    "li",
    { className: "card", record, tabIndex: -1 },
    view,
    el("p", { className: "prompt", textContent: record.fields.prompt, title: record.fields.prompt }),
    el("p", { className: "muted facts", textContent: describe(record) }),
    el("div", { className: "card-actions" }, ...buttons(record), isVideo(record) ? null : compare),
  );
  return record.card;
}

/** What can be done with a picture, in its card and in the viewer. */
export function buttons(record) {
  return [
    button("Again", () => actions.again(record), { title: "Put all its parameters, the seed too, into the form" }),
    button("Variation", () => actions.variation(record), { title: "The same with another seed, at once" }),
    actions.edit && !isVideo(record) && button("Edit this", () => actions.edit(record), { title: "Start from this picture" }),
  ].filter(Boolean);
}

/** Show how a run stands. The first call makes its card. */
export function showRun(run) {
  run.card ??= runCard(run);
  const { card, progress, state } = run;
  if (!card.isConnected) {
    list.prepend(card);
    card.scrollIntoView({ block: "nearest" }); // On a phone the gallery lies below the form.
  }
  byId("empty").hidden = true;
  if (progress) {
    card.bar.value = progress.progress;
    if (progress.preview && card.preview.src !== progress.preview) {
      card.preview.src = progress.preview;
      card.preview.hidden = false;
    }
  }
  card.state.textContent = stateText(run);
  running.add(run);
  if (state === "cancelled" || state === "failed") running.delete(run);
  if (state === "cancelled") {
    announce("Cancelled.");
    dismiss(run);
  } else if (state === "failed") showFailure(run);
}

/** How a run stands, in words; the time that is left counts down between two steps. */
export function stateText({ state, progress }) {
  if (state === "waiting") return "Waits for the requests before it";
  if (!progress || progress.state === "queued") return "In the server's queue" + left(progress);
  if (progress.step >= progress.num_steps) return "Decoding";
  return `Step ${progress.step} of ${progress.num_steps}` + left(progress);
}

function left(progress) {
  if (progress?.eta_s == null) return "";
  return ` · ${seconds(Math.max(0, progress.eta_s - (performance.now() - progress.at) / 1000))} left`;
}

function runCard(run) {
  const card = el("li", { className: "card running", tabIndex: -1 });
  card.bar = el("progress", { max: 1, value: 0, "aria-label": `Progress of: ${run.fields.prompt}` });
  card.preview = el("img", { className: "preview", alt: "Preview", hidden: true });
  card.state = el("p", { className: "muted facts" });
  card.actions = el("div", { className: "card-actions" }, button("Cancel", () => cancel(run)));
  const prompt = el("p", { className: "prompt", textContent: run.fields.prompt, title: run.fields.prompt });
  card.append(el("div", { className: "view" }, card.preview), card.bar, prompt, card.state, card.actions);
  return card;
}

function showFailure(run) {
  const { card, error } = run;
  const hadFocus = card.contains(document.activeElement);
  const wait = error.retryAfter && `${error.retryAfter} s`;
  card.classList.replace("running", "failed");
  card.bar.remove();
  card.state.className = "error";
  const isTold = !wait || error.message.includes(wait);
  card.state.textContent = error.message + (isTold ? "" : ` (the server asks to wait ${wait})`);
  card.actions.replaceChildren(
    button("Try again", () => {
      dismiss(run);
      actions.retry(run);
    }),
    button("Dismiss", () => dismiss(run)),
  );
  if (hadFocus) card.focus({ preventScroll: true });
  announce(`Failed: ${error.message}`);
}

/** Take the card of a run away. */
export function dismiss(run) {
  replace(run.card);
  update();
}
