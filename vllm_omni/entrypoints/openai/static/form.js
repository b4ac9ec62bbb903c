// The form, made of what the server says that its model takes. An empty field is the model's default.

import { byId, button, el } from "./dom.js";

const DRAFT = "draft";
const RATIOS = [["Square", 1, 1], ["Landscape 4:3", 4, 3], ["Landscape 16:9", 16, 9], ["Portrait 3:4", 3, 4],
  ["Portrait 9:16", 9, 16]];
const WITH_OWN_FIELDS = ["width", "height", "num_inference_steps"];
const form = byId("form");
let model = null;
let images = [];
let urls = [];

/** Make the fields that the model has. */
export function build(served) {
  model = served;
  const { parameters, defaults } = model;
  byId("negative-field").hidden = !model.takes_negative_prompt;
  byId("negative_prompt").placeholder = (defaults.negative_prompt ?? "").trim() || "optional";
  byId("image-field").hidden = !model.takes_images;
  byId("size-fields").hidden = !("height" in parameters);
  byId("n-field").hidden = model.output === "video";
  byId("image").multiple = model.output !== "video";
  byId("steps-field").hidden = !("num_inference_steps" in parameters);
  for (const name of WITH_OWN_FIELDS) {
    byId(name).placeholder = parameters[name]?.default ?? "auto";
    byId(name).title = parameters[name]?.description ?? "";
  }
  for (const name of ["width", "height"]) byId(name).step = model.size_multiple;
  byId("shape").replaceChildren(...shapes().map(([text, value]) => el("option", { textContent: text, value })));
  const own = Object.keys(parameters).filter((name) => !WITH_OWN_FIELDS.includes(name));
  const options = own.map((name) => option(name, parameters[name].default, parameters[name].description));
  options.push(...Object.entries(model.extra_args).map(([name, value]) => option(`extra_args.${name}`, value, "")));
  byId("options").replaceChildren(...options);
  byId("more").hidden = options.length === 0;
  restoreDraft();
}

/** [text, "WIDTHxHEIGHT" or "" for the default or "custom"]: shapes of about as many pixels as the default. */
function shapes() {
  const { width, height } = model.parameters;
  if (!width?.default) return [["As the picture", ""], ["Custom", "custom"]];
  const multiple = model.size_multiple;
  const side = (ratio) => Math.max(multiple, Math.round(Math.sqrt(width.default * height.default * ratio) / multiple) * multiple);
  const sized = RATIOS.map(([text, a, b]) => [text, `${side(a / b)}x${side(b / a)}`]);
  const others = sized.filter(([, value]) => value !== `${width.default}x${height.default}`);
  return [["Default", ""], ...others, ["Custom", "custom"]];
}

/** A field of one of the model's own options; its default says what it takes. */
function option(name, value, description) {
  const id = `option-${name}`;
  const shown = value === null || value === undefined ? "auto" : String(value);
  let input;
  if (typeof value === "boolean") {
    const choices = [["", `default (${value ? "yes" : "no"})`], ["true", "yes"], ["false", "no"]];
    input = el("select", { id, name }, ...choices.map(([v, textContent]) => el("option", { value: v, textContent })));
  } else {
    const isText = typeof value === "string";
    input = el("input", { id, name, type: isText ? "text" : "number", placeholder: shown, autocomplete: "off" });
    if (!isText) input.step = "any";
  }
  const text = name.replace("extra_args.", "").replaceAll("_", " ");
  const hint = description ? el("p", { className: "hint", id: `${id}-hint`, textContent: description }) : null;
  if (hint) input.setAttribute("aria-describedby", hint.id);
  return el("div", { className: "field" }, el("label", { htmlFor: id, textContent: text }), input, hint);
}

const inputs = () => [...form.elements].filter((input) => input.name && input.type !== "file");

/** `{fields, images}` of a request. Throws an error with `param` for a number that JavaScript cannot hold. */
export function read() {
  const fields = {};
  for (const input of inputs()) {
    if (input.closest("[hidden]")) continue;
    const text = input.name === "prompt" ? input.value.trim() : input.value;
    if (input.validity.badInput) throw fieldError(input.name, `${labelOf(input)} must be a number.`);
    if (text === "") continue;
    const value = valueOf(input, text);
    if (input.name === "seed" && !Number.isSafeInteger(value)) {
      throw fieldError("seed", "The seed must be a whole number of at most 9007199254740991.");
    }
    const extra = input.name.match(/^extra_args\.(.+)$/);
    if (extra) fields.extra_args = { ...fields.extra_args, [extra[1]]: value };
    else fields[input.name] = value;
  }
  if (!fields.prompt) throw fieldError("prompt", "Say in the prompt what the picture should show.");
  if (model.needs_images && images.length === 0) throw fieldError("image", "This model starts from a picture; add one.");
  return { fields, images: model.takes_images ? [...images] : [] };
}

function valueOf(input, text) {
  if (input.type === "number") return Number(text);
  return input.tagName === "SELECT" ? text === "true" : text;
}

const fieldError = (param, message) => Object.assign(new Error(message), { param });
const labelOf = (input) => input.labels[0]?.textContent ?? input.name;

/** Fill the form with the fields of a request, and its pictures if they are given. */
export function fill(fields, pictures = null) {
  const flat = { ...fields };
  for (const [name, value] of Object.entries(fields.extra_args ?? {})) flat[`extra_args.${name}`] = value;
  for (const input of inputs()) input.value = flat[input.name] ?? "";
  if (pictures !== null) setImages(pictures);
  const inOptions = inputs().some((input) => input.closest("#options") && input.value !== "");
  if (inOptions) byId("more").open = true;
  showShape();
  clearErrors();
  saveDraft();
}

/** Mark the field that an error names. Returns whether there is one. */
export function showError(error) {
  clearErrors();
  const name = { size: "width", input_reference: "image" }[error.param] ?? error.param;
  const input = [...form.elements].find((element) => element.name === name);
  if (!input || input.closest(".field").hidden) return false;
  if (input.closest("details")) input.closest("details").open = true;
  const text = el("p", { className: "error", id: "field-error", role: "alert", textContent: error.message });
  (input.closest(".row") ?? input.closest(".field").lastElementChild).after(text);
  input.setAttribute("aria-invalid", "true");
  input.setAttribute("aria-errormessage", text.id);
  input.focus();
  return true;
}

export function clearErrors() {
  byId("field-error")?.remove();
  for (const input of form.querySelectorAll("[aria-invalid]")) {
    input.removeAttribute("aria-invalid");
    input.removeAttribute("aria-errormessage");
  }
}

export function setImages(pictures) {
  for (const url of urls) URL.revokeObjectURL(url);
  images = [...pictures];
  urls = images.map((picture) => URL.createObjectURL(picture));
  byId("image-list").replaceChildren(
    ...urls.map((src, index) => {
      const remove = button("✕", () => removeImage(index), { "aria-label": `Remove picture ${index + 1}` });
      return el("li", {}, el("img", { src, alt: `Picture ${index + 1} to work on` }), remove);
    }),
  );
}

function removeImage(index) {
  setImages(images.filter((_, i) => i !== index));
  (byId("image-list").querySelectorAll("button")[Math.min(index, images.length - 1)] ?? byId("image")).focus();
}

function addImages(files) {
  const added = [...files].filter((file) => file.type.startsWith("image/"));
  if (added.length > 0) setImages(byId("image").multiple ? [...images, ...added] : added.slice(-1));
}

function showShape() {
  const { width, height } = form.elements;
  const value = width.value === "" && height.value === "" ? "" : `${width.value}x${height.value}`;
  const shape = byId("shape");
  shape.value = [...shape.options].some((o) => o.value === value) ? value : "custom";
}

function saveDraft() {
  const draft = Object.fromEntries(inputs().map((input) => [input.name, input.value]).filter(([, value]) => value));
  localStorage.setItem(DRAFT, JSON.stringify(draft));
}

function restoreDraft() {
  const draft = JSON.parse(localStorage.getItem(DRAFT) ?? "{}");
  for (const input of inputs()) input.value = draft[input.name] ?? "";
  showShape();
}

/** Wire the fields; `onSubmit` gets what `read` returns. */
export function wire(onSubmit) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (model === null) return; // Why, stands above the form.
    try {
      const request = read();
      clearErrors();
      onSubmit(request);
    } catch (error) {
      if (!error.param || !showError(error)) throw error;
    }
  });
  form.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
  });
  form.addEventListener("input", (event) => {
    clearErrors();
    if (event.target.id !== "shape") showShape();
    saveDraft();
  });
  byId("shape").addEventListener("change", (event) => {
    const { width, height } = form.elements;
    if (event.target.value === "custom") return width.focus();
    [width.value, height.value] = event.target.value ? event.target.value.split("x") : ["", ""];
    saveDraft();
  });
  byId("reset").addEventListener("click", () => fill({ prompt: form.elements.prompt.value }, []));
  byId("image").addEventListener("change", (event) => {
    addImages(event.target.files);
    event.target.value = ""; // The list below shows them; the same file may be chosen again.
  });
  document.addEventListener("paste", (event) => model?.takes_images && addImages(event.clipboardData.files));
  form.addEventListener("dragover", (event) => model?.takes_images && event.preventDefault());
  form.addEventListener("drop", (event) => {
    if (!model?.takes_images) return;
    event.preventDefault();
    addImages(event.dataTransfer.files);
  });
}
