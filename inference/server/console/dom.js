// Building elements; texts go in as texts, never as markup.

/** An element with properties and children; children that are nothing are left out. */
export function el(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export const byId = (id) => document.getElementById(id);

/** The value of the radio button that is on. */
export const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;

/** Call with the value whenever another radio button is switched on. */
export function onChoice(name, take) {
  for (const input of document.querySelectorAll(`input[name="${name}"]`)) {
    input.addEventListener("change", () => take(input.value));
  }
}

export function choose(name, value) {
  const input = document.querySelector(`input[name="${name}"][value="${value}"]`);
  if (input.disabled || input.checked) return;
  input.checked = true;
  input.dispatchEvent(new Event("change"));
}
