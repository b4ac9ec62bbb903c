// What the server has in hand, for all its users.

import { call, send } from "./api.js";
import { announce, button, byId, el, seconds } from "./dom.js";
import { isOurs } from "./runs.js";

const EVERY_MS = 1000;
const NUM_FINISHED = 10;
const WORDS = { aborted: "cancelled" };
const dialog = byId("queue");
let timer = null;
let isPressed = false;

export async function open() {
  byId("queue-empty").textContent = "Asking the server …";
  byId("queue-empty").hidden = false;
  byId("queue-list").replaceChildren();
  dialog.showModal();
  await refresh();
}

async function refresh() {
  clearTimeout(timer);
  try {
    show((await call("v1/requests")).data);
    byId("queue-error").hidden = true;
  } catch (error) {
    byId("queue-error").textContent = error.message;
    byId("queue-error").hidden = false;
    byId("queue-empty").hidden = true;
  }
  if (dialog.open) timer = setTimeout(refresh, EVERY_MS);
}

function show(requests) {
  // New rows under a pressed button would lose its click. The next answer is a second away.
  if (isPressed) return;
  const live = requests.filter((request) => request.finished_at === null);
  const finished = requests.filter((request) => request.finished_at !== null);
  finished.sort((a, b) => b.finished_at - a.finished_at);
  byId("queue-empty").textContent = "Nothing waits and nothing runs.";
  byId("queue-empty").hidden = live.length > 0;
  const focused = document.activeElement?.dataset.request;
  byId("queue-list").replaceChildren(...[...live, ...finished.slice(0, NUM_FINISHED)].map(row));
  // The rows are new; whoever was on a button stays there, or goes to another if its request has ended.
  const stays = focused && byId("queue-list").querySelector(`[data-request="${CSS.escape(focused)}"]`);
  if (focused) (stays ?? byId("queue-list").querySelector("button") ?? dialog.querySelector("[data-close]")).focus();
}

function row(request) {
  const isLive = request.finished_at === null;
  const facts = [isOurs(request.id) ? "yours" : null, request.kind, request.size, isLive ? `step ${request.step} of ${request.num_steps}` : null];
  if (isLive && request.eta_s !== null) facts.push(`${seconds(request.eta_s)} left`);
  if (!isLive) facts.push(`after ${seconds(request.finished_at - request.created_at)}`);
  if (request.error) facts.push(request.error.message);
  const cancel = button("Cancel", () => end(request.id), { "aria-label": `Cancel ${request.prompt}` });
  cancel.dataset.request = request.id;
  return el(
    "li",
    {},
    el("span", { className: `state ${request.state}`, textContent: WORDS[request.state] ?? request.state }),
    el("span", { className: "prompt", textContent: request.prompt ?? "(no text)" }),
    isLive ? cancel : null,
    el("span", { className: "muted facts", textContent: facts.filter(Boolean).join(" · ") }),
    isLive ? el("progress", { max: 1, value: request.progress, "aria-label": `Progress of ${request.prompt}` }) : null,
  );
}

async function end(id) {
  try {
    await send(`v1/requests/${encodeURIComponent(id)}`, { method: "DELETE" });
    announce("Cancelled.");
  } catch (error) {
    announce(error.message); // Whoever sees the list sees how the request stands.
  }
  await refresh();
}

export function wire() {
  byId("open-queue").addEventListener("click", open);
  dialog.addEventListener("close", () => clearTimeout(timer));
  byId("queue-list").addEventListener("pointerdown", () => (isPressed = true));
  for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => setTimeout(() => (isPressed = false)));
}
