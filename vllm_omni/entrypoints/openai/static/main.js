// The page: asks the server for its model, makes the form, and ties the parts together.

import { call, isKeyKept, readKey, saveKey } from "./api.js";
import { announce, byId, wireDialogs } from "./dom.js";
import * as compare from "./compare.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as queue from "./queue.js";
import * as runs from "./runs.js";
import * as viewer from "./viewer.js";

const ASK_AGAIN_MS = 3000;
const THEMES = ["auto", "light", "dark"];
let model = null;
let isGalleryOpen = false;
let refused = []; // runs that failed for want of a key

function generate({ fields, images }) {
  announce("Sent.");
  runs.start(model.output, fields, images, onChange);
}

function onChange(run) {
  if (run.state === "done") return gallery.keep(run, model.id);
  gallery.showRun(run);
  if (run.state !== "failed") return undefined;
  if (run.error.status === 401) {
    refused.push(run);
    return askForKey();
  }
  if (run.error.param && form.showError(run.error)) gallery.dismiss(run); // The field says it.
  return undefined;
}

const actions = {
  view: viewer.view,
  compare: compare.toggle,
  retry: runs.retry,
  again({ fields, images }) {
    form.fill(fields, images);
    byId("prompt").focus();
    announce("Its parameters are in the form.");
  },
  variation({ fields, images }) {
    const { seed, ...others } = fields;
    generate({ fields: others, images });
  },
  edit(record) {
    form.setImages([record.blob]);
    byId("prompt").focus();
    announce("The picture is in the form. Say what to change.");
  },
};

async function start() {
  const problem = byId("no-server");
  try {
    [model] = (await call("v1/models")).data;
  } catch (error) {
    problem.textContent = error.message;
    problem.hidden = false;
    if (error.status === 401) askForKey();
    else setTimeout(start, ASK_AGAIN_MS);
    return undefined;
  }
  problem.hidden = true;
  byId("model").textContent = model.id;
  document.title = `${model.id} · vllm-omni`;
  form.build(model);
  if (!model.takes_images) actions.edit = null;
  if (isGalleryOpen) return undefined;
  isGalleryOpen = true;
  await gallery.open(actions);
  return runs.resume(onChange);
}

function askForKey() {
  const dialog = byId("key");
  const why = readKey() ? "The server does not take this key." : "The server asks for a key.";
  byId("key-why").textContent = why;
  byId("key-text").value = readKey();
  byId("key-keep").checked = isKeyKept();
  if (!dialog.open) dialog.showModal();
}

function wireKey() {
  const dialog = byId("key");
  byId("open-key").addEventListener("click", () => {
    askForKey();
    byId("key-why").textContent = "A server asks for a key if it was started with --api-key.";
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "save") return;
    saveKey(byId("key-text").value.trim(), byId("key-keep").checked);
    start();
    const again = refused.filter((run) => run.card.isConnected);
    refused = [];
    for (const run of again) {
      gallery.dismiss(run);
      runs.retry(run);
    }
  });
}

function wireTheme() {
  const button = byId("theme");
  const show = (theme) => {
    button.textContent = { auto: "Auto", light: "Light", dark: "Dark" }[theme];
    button.setAttribute("aria-label", `Colours: ${theme}`);
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  };
  let theme = localStorage.getItem("theme") ?? "auto";
  show(theme);
  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem("theme", theme);
    show(theme);
  });
}

wireDialogs();
wireKey();
wireTheme();
form.wire(generate);
viewer.wire();
compare.wire();
queue.wire();
// The server ends the requests of a page that is closed, but for jobs.
addEventListener("beforeunload", (event) => runs.wouldLose() && event.preventDefault());
start();
