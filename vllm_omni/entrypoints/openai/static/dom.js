// Elements and words that several parts of the page need.

export const byId = (id) => document.getElementById(id);

/** An element with properties (or attributes, if the name has a dash) and children, which may be texts. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function button(text, onclick, properties = {}) {
  return el("button", { type: "button", className: "quiet", textContent: text, onclick, ...properties });
}

/** Tell those who do not see the page. What lies outside an open dialog is not read out. */
export function announce(text) {
  (document.querySelector("dialog[open] [role=status]") ?? byId("status")).textContent = text;
}

export function seconds(value) {
  if (value < 10) return `${value.toFixed(1)} s`;
  if (value < 100) return `${Math.round(value)} s`;
  return value < 3600 ? `${Math.round(value / 60)} min` : `${(value / 3600).toFixed(1)} h`;
}

/** Close buttons of dialogs. */
export function wireDialogs() {
  for (const close of document.querySelectorAll("[data-close]")) {
    close.addEventListener("click", () => close.closest("dialog").close());
  }
}
