// Two pictures on top of each other, with a slider between them, and what differs in how they were made.

import { byId, el } from "./dom.js";
import { shown, urlOf } from "./gallery.js";

let chosen = []; // [record, its button], at most two

/** Choose a picture, or choose it no more. A third one takes the place of the first. */
export function toggle(record, button) {
  const before = chosen.length;
  chosen = chosen.filter(([other]) => other !== record);
  if (chosen.length === before) {
    if (before === 2) press(chosen.shift()[1], false);
    chosen.push([record, button]);
    press(button, true);
  } else press(button, false);
  update();
}

const press = (button, isPressed) => button.setAttribute("aria-pressed", String(isPressed));

function update() {
  const present = shown();
  chosen = chosen.filter(([record]) => present.includes(record));
  byId("compare-bar").hidden = chosen.length === 0;
  byId("compare-text").textContent = chosen.length < 2 ? "Choose a second picture to compare." : "Two pictures chosen.";
  byId("compare-open").hidden = chosen.length < 2;
}

function flat({ fields, receipt, model, seconds }) {
  const { extra_args: extra, ...rest } = fields;
  const size = receipt.width && `${receipt.width} × ${receipt.height}`;
  const { num_inference_steps, guidance } = receipt;
  return { ...rest, ...extra, width: undefined, height: undefined, size, num_inference_steps, guidance, model,
    seconds: seconds.toFixed(2) };
}

function open() {
  update();
  if (chosen.length < 2) return;
  const [left, right] = chosen.map(([record]) => record);
  for (const [name, record] of [["left", left], ["right", right]]) {
    const image = byId(`compare-${name}`);
    image.src = urlOf(record);
    image.alt = record.fields.prompt;
  }
  const { width, height } = left.receipt;
  if (width) document.querySelector(".compare").style.setProperty("--ratio", width / height);
  const [a, b] = [flat(left), flat(right)];
  const differing = [...new Set([...Object.keys(a), ...Object.keys(b)])].filter((name) => a[name] !== b[name]);
  byId("differences").replaceChildren(
    ...differing.map((name) =>
      el("tr", {}, el("th", { scope: "row", textContent: name.replaceAll("_", " ") }),
        ...[a, b].map((facts) => el("td", {}, el("div", { className: "long", textContent: facts[name] ?? "default" }))))),
  );
  move(50);
  byId("compare").showModal();
  byId("split").focus();
}

function move(percent) {
  byId("split").value = percent;
  document.querySelector(".compare").style.setProperty("--split", `${percent}%`);
}

export function wire() {
  byId("compare-open").addEventListener("click", open);
  byId("compare-clear").addEventListener("click", () => {
    for (const [, button] of chosen) press(button, false);
    chosen.at(-1)[1].focus();
    chosen = [];
    update();
  });
  byId("split").addEventListener("input", (event) => move(event.target.value));
}
