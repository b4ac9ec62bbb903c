// One picture, large, with everything that is known of it.

import { button, byId, el } from "./dom.js";
import * as gallery from "./gallery.js";

const dialog = byId("viewer");
let current = null;
let opener = null; // the record from whose card the dialog was opened

export function view(record) {
  if (!dialog.open) opener = record;
  current = record;
  const records = gallery.shown();
  const position = records.indexOf(record);
  for (const go of dialog.querySelectorAll("[data-go]")) {
    go.disabled = records[position + Number(go.dataset.go)] === undefined;
  }
  byId("viewer-title").textContent = gallery.isVideo(record) ? "Video" : "Picture";
  const { receipt, fields } = record;
  const url = gallery.urlOf(record);
  const facts = {
    ...fields,
    ...{ extra_args: undefined, width: undefined, height: undefined },
    ...fields.extra_args,
    size: receipt.width && `${receipt.width} × ${receipt.height}`,
    num_inference_steps: undefined,
    steps: receipt.num_inference_steps,
    guidance: receipt.guidance,
    model: record.model,
    ran: [receipt.dtype, receipt.device, ...receipt.attention_backends, ...receipt.accelerations].join(", "),
    seconds: record.seconds.toFixed(2),
    made: new Date(record.created).toLocaleString(),
  };
  const rows = Object.entries(facts)
    .filter(([, value]) => value !== undefined && value !== null && value !== "")
    .flatMap(([name, value]) => [
      el("dt", { textContent: name.replaceAll("_", " ") }),
      el("dd", { className: "long", textContent: String(value).trim() || "(a space)" }),
    ]);
  const name = `${fields.prompt.slice(0, 60).replace(/[^\w-]+/g, "-")}-${fields.seed ?? ""}.${record.blob.type.split("/")[1]}`;
  const close = (act) => () => {
    dialog.close();
    act();
  };
  const actions = gallery.buttons(record);
  for (const action of actions) action.onclick = close(action.onclick);
  byId("viewer-body").replaceChildren(
    gallery.mediaOf(record, { controls: true }),
    el(
      "div",
      {},
      el("dl", {}, ...rows),
      el(
        "div",
        { className: "card-actions" },
        ...actions,
        el("a", { className: "quiet", href: url, download: name, textContent: "Download" }),
        button("Delete", close(() => gallery.remove(record))),
      ),
    ),
  );
  if (!dialog.open) dialog.showModal();
}

function go(by) {
  const records = gallery.shown();
  const next = records[records.indexOf(current) + by];
  if (next) view(next);
}

export function wire() {
  for (const one of dialog.querySelectorAll("[data-go]")) one.addEventListener("click", () => go(Number(one.dataset.go)));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") go(-1);
    if (event.key === "ArrowRight") go(1);
  });
  dialog.addEventListener("close", () => {
    // The browser goes back to where the dialog was opened; whoever moved on by the arrows goes on from there.
    if (opener.card.contains(document.activeElement)) current.card.querySelector(".view")?.focus();
  });
}
