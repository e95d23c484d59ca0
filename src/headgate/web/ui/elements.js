// Building and finding elements. Whatever comes from a server or a person becomes text, never markup.

import { grouped } from "./figures.js";

export function byId(id) {
  return document.getElementById(id);
}

/** An element with properties; children are elements or strings, and strings become text nodes. */
export function element(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

/** An error as elements: what went wrong in the server's words, what it adds, and where to find it in the logs. */
export function errorText(error) {
  const lines = [element("p", { className: "what" }, error.message)];
  // What was not given, or says the message again, adds nothing.
  const details = Object.entries(error.details ?? {}).filter(
    ([, value]) => value !== null && value !== "" && value !== error.message,
  );
  if (details.length) {
    const funds = error.type === "InsufficientFunds";
    const list = element("dl", { className: "details" });
    for (const [name, value] of details) {
      const text = typeof value === "object" ? JSON.stringify(value) : String(value);
      list.append(element("dt", {}, name), element("dd", {}, funds ? `${grouped(text)} credits` : text));
    }
    lines.push(list);
  }
  const marks = [error.type, error.status ? `HTTP ${error.status}` : ""].filter(Boolean).join(" · ");
  const trace = element("p", { className: "trace" }, marks);
  if (error.requestId) trace.append(marks ? " · " : "", "request ", element("code", {}, error.requestId));
  if (trace.textContent) lines.push(trace);
  return lines;
}
