// The list of models: names, limits and prices as the server tells them. What cannot be called is shown, disabled,
// with its reason, and folded away so that the usable ones stay in sight.

import { element } from "./elements.js";
import { grouped, usd } from "./figures.js";

export class ModelList {
  #place;
  #models = new Map();

  /** `chosen` is called with the model whenever another one is picked. */
  constructor(place, chosen) {
    this.#place = place;
    place.addEventListener("change", () => chosen(this.current));
  }

  /** The picked model, or null when none can be called. */
  get current() {
    const radio = this.#place.querySelector("input:checked");
    return radio ? this.#models.get(radio.value) : null;
  }

  /** Shows these models and keeps the earlier pick if it is still there. */
  show(models) {
    const earlier = this.current?.id;
    this.#models = new Map(models.map((model) => [model.id, model]));
    const usable = models.filter((model) => model.available !== false);
    const others = models.filter((model) => model.available === false);
    this.#place.replaceChildren(...(usable.length ? [list(usable)] : [nothing()]));
    if (others.length) this.#place.append(folded(others));
    const radios = [...this.#place.querySelectorAll("input:enabled")];
    const pick = radios.find((radio) => radio.value === earlier) ?? radios[0];
    if (pick) pick.checked = true;
  }
}

function list(models) {
  return element("ul", { className: "model-list" }, ...models.map(row));
}

function folded(models) {
  const summary = element("summary", {}, `${models.length} not available`);
  const rows = list(models);
  rows.tabIndex = 0; // nothing in it can take the focus, and the keyboard must be able to scroll it
  return element("details", {}, summary, rows);
}

function nothing() {
  return element("p", { className: "hint" }, "No model can be called now.");
}

function row(model) {
  const usable = model.available !== false;
  const facts = element("span", { className: "facts", id: `facts-${model.id}` });
  if (!usable && model.reason) facts.append(element("span", { className: "reason" }, model.reason));
  facts.append(element("span", {}, limits(model)), element("span", {}, prices(model)));
  const radio = element("input", { type: "radio", name: "model", value: model.id, disabled: !usable });
  radio.setAttribute("aria-describedby", facts.id);
  radio.setAttribute("aria-label", model.id);
  const name = element("span", { className: "name" }, model.id);
  const label = element("label", { className: usable ? "model" : "model off" }, radio, name, facts);
  return element("li", {}, label);
}

function limits(model) {
  return `${grouped(model.context_window)} context · ${grouped(model.max_output_tokens)} output`;
}

function prices({ pricing }) {
  if (!pricing) return "";
  return `${usd(pricing.input)} in · ${usd(pricing.output)} out per 1M tokens`;
}
