// The answer's card: the text as it comes, how it ended, and what it came to.

import { byId, element, errorText } from "./elements.js";
import { grouped, seconds, sum, tokens, usd } from "./figures.js";

const STATES = {
  idle: "",
  waiting: "Waiting…",
  writing: "Writing…",
  stopping: "Stopping…",
  completed: "Complete",
  stopped: "Stopped",
  failed: "Failed",
  broken: "Broken off",
};
const RUNNING = new Set(["waiting", "writing", "stopping"]);

export class AnswerCard {
  #card = byId("answer");
  #state = byId("state");
  #text = byId("text");
  #note = byId("note");
  #figures = byId("figures");
  #copy = byId("copy");
  #words = document.createTextNode("");

  constructor() {
    this.clear();
    this.#copy.addEventListener("click", () => this.#copyText());
  }

  set state(state) {
    this.#card.dataset.state = state;
    this.#state.textContent = STATES[state];
    const running = RUNNING.has(state);
    this.#text.setAttribute("aria-busy", String(running)); // read aloud once, whole, not word by word
    // navigator.clipboard exists only on https and localhost.
    this.#copy.hidden = running || this.#words.length === 0 || !navigator.clipboard;
  }

  clear() {
    this.#words = document.createTextNode("");
    this.#text.replaceChildren(this.#words);
    this.#note.hidden = true;
    this.#figures.hidden = true;
    this.state = "idle";
  }

  begin() {
    this.clear();
    this.state = "waiting";
    this.#card.scrollIntoView({ block: "nearest" });
  }

  write(text) {
    if (this.#card.dataset.state === "waiting") this.state = "writing";
    const page = document.documentElement;
    const following = window.innerHeight + window.scrollY >= page.scrollHeight - 48;
    this.#words.appendData(text);
    if (following) window.scrollTo(0, page.scrollHeight);
  }

  /**
   * The settled end: `kind` is "completed" or "stopped", `response` genstack's response object. `asked` is the model
   * that was asked for, `total` and `first` (null: no token came) are milliseconds.
   */
  settle(kind, response, { asked, total, first, requestId, remark }) {
    this.state = kind;
    if (remark) this.#say([element("p", {}, remark)], "");
    const rows = charged(response);
    rows.push(["Time", seconds(total), first === null ? "no token came" : `first token after ${seconds(first)}`]);
    if (response.model !== asked) rows.push(["Model", response.model, `answered instead of ${asked}`]);
    if (requestId) rows.push(["Request", element("code", {}, requestId)]);
    this.#figures.replaceChildren(...rows.map(figure));
    this.#figures.hidden = false;
  }

  /** An end without figures: refused, failed or broken off. */
  fail(kind, error) {
    this.state = kind;
    this.#say(errorText(error), "bad");
  }

  /** A stop before there was anything to settle. */
  dismiss(remark) {
    this.state = "stopped";
    this.#say([element("p", {}, remark)], "");
  }

  #say(lines, kind) {
    this.#note.className = `notice ${kind}`;
    this.#note.replaceChildren(...lines);
    this.#note.hidden = false;
  }

  async #copyText() {
    try {
      await navigator.clipboard.writeText(this.#words.data);
      this.#copy.textContent = "Copied";
    } catch {
      this.#copy.textContent = "Not allowed";
    }
    setTimeout(() => (this.#copy.textContent = "Copy"), 1500);
  }
}

function charged({ usage, balanceBefore, balanceAfter }) {
  const { promptTokens, completionTokens, inputCost, outputCost, price, grossMarginPercent } = usage;
  return [
    [
      "Tokens",
      tokens(promptTokens + completionTokens),
      `${grouped(promptTokens)} prompt + ${grouped(completionTokens)} completion`,
    ],
    ["Price", usd(price), `what you paid, margin\u00a0${grossMarginPercent}%`],
    ["Cost", usd(sum(inputCost, outputCost)), `${usd(inputCost)} in + ${usd(outputCost)} out`],
    ["Balance", `${grouped(balanceBefore)} → ${grouped(balanceAfter)}`, "credits, before → after"],
  ];
}

function figure([name, value, remark]) {
  const row = element("div", { className: name.toLowerCase() }, element("dt", {}, name), element("dd", {}, value));
  if (remark) row.append(element("dd", { className: "remark" }, remark));
  return row;
}
