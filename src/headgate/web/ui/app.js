// The page: signing in, the form, the keys, and which part is shown when.

import { AnswerCard } from "./answer.js";
import { byId, errorText } from "./elements.js";
import { tokens, usd } from "./figures.js";
import { Gateway } from "./gateway.js";
import { ModelList } from "./models.js";
import { Run } from "./run.js";
import { Session } from "./session.js";

const PARTS = ["opening", "unreachable", "sign-in", "bench"];

class Page {
  #session = new Session();
  #gateway = null;
  #run = null;
  #card = new AnswerCard();
  #models = new ModelList(byId("models"), (model) => this.#bound(model));

  constructor() {
    const mac = /Mac|iPhone|iPad/.test(navigator.userAgent);
    byId("keys").textContent = mac ? "⌘ Enter" : "Ctrl Enter";
    byId("sign-in-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#signIn(byId("token").value.trim());
    });
    byId("sign-out").addEventListener("click", () => this.#signOut());
    byId("retry").addEventListener("click", () => this.open());
    byId("bench").addEventListener("submit", (event) => {
      event.preventDefault();
      if (!this.#run) this.#submit();
    });
    // The second click of a double click on Submit lands on Stop; it does not mean it.
    byId("stop").addEventListener("click", (event) => event.detail < 2 && this.#run?.stop());
    document.addEventListener("keydown", (event) => this.#key(event));
    // A link with a token opened in this very tab only changes the fragment.
    window.addEventListener("hashchange", () => this.#session.takeFromAddress() && this.open());
    this.#session.takeFromAddress();
  }

  /** Shows the form for the session's token, or asks for one. */
  async open() {
    this.#leave();
    if (this.#session.token === null) return this.#askForToken();
    this.#show("opening");
    const gateway = new Gateway(this.#session.token);
    this.#gateway = gateway;
    try {
      const [models, balance] = await Promise.all([gateway.models(), gateway.balance()]);
      if (gateway !== this.#gateway) return; // another token came meanwhile
      this.#models.show(models);
      this.#purse(balance);
    } catch (error) {
      if (gateway === this.#gateway) this.#refused(error);
      return;
    }
    this.#bound(this.#models.current);
    this.#show("bench");
    byId("prompt").focus();
  }

  async #submit() {
    const system = byId("system").value;
    const prompt = { role: "user", content: byId("prompt").value };
    const model = this.#models.current;
    const request = {
      model: model.id,
      messages: system.trim() ? [{ role: "system", content: system }, prompt] : [prompt],
      temperature: numberIn("temperature"),
      maxOutputTokens: numberIn("max-output"),
    };
    const run = new Run(this.#gateway, this.#card);
    this.#running(run);
    try {
      await run.go(request, request.maxOutputTokens ?? model.max_output_tokens);
    } catch (error) {
      if (this.#run === run) return this.#refused(error);
    } finally {
      if (this.#run === run) this.#running(null);
    }
    if (this.#gateway) await this.#refreshPurse();
  }

  #running(run) {
    this.#run = run;
    const submit = byId("submit");
    const stop = byId("stop");
    const focused = document.activeElement === submit || document.activeElement === stop;
    submit.hidden = run !== null;
    stop.hidden = run === null;
    byId("keys").hidden = run !== null;
    if (focused) (run ? stop : submit).focus(); // hiding the focused button would lose the keyboard's place
  }

  #key(event) {
    if (byId("bench").hidden || event.isComposing) return;
    if (event.key === "Escape") this.#run?.stop();
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      if (!this.#run && !byId("submit").disabled) byId("bench").requestSubmit();
    }
  }

  /** Binds the form to a model's limits; null when no model can be called. */
  #bound(model) {
    byId("submit").disabled = model === null;
    if (model === null) return;
    const [low, high] = model.temperature ?? [0, 2];
    const most = model.max_output_tokens;
    Object.assign(byId("temperature"), { min: low, max: high });
    Object.assign(byId("max-output"), { max: most });
    byId("temperature-hint").textContent = `${low} to ${high}`;
    byId("max-output-hint").textContent = `1 to ${tokens(most)}`;
    const input = model.max_input_tokens ?? model.context_window;
    byId("prompt-hint").textContent = `System and prompt: up to ${tokens(input)} together`;
  }

  #purse({ account, balance, held, available }) {
    byId("account-name").textContent = account;
    byId("balance").textContent = usd(available);
    byId("purse-line").title = `Balance ${usd(balance)}, of which ${usd(held)} is held for running requests`;
  }

  async #refreshPurse() {
    const gateway = this.#gateway;
    try {
      const balance = await gateway.balance();
      if (gateway === this.#gateway) this.#purse(balance);
    } catch (error) {
      // The answer stands; an old balance in the corner is not worth a message over it.
      if (error.status === 401 && gateway === this.#gateway) this.#refused(error);
    }
  }

  #signIn(token) {
    if (token.startsWith("hg-")) {
      const message = "That is an API key. This page needs a token, made by the command above.";
      return this.#askForToken({ message });
    }
    this.#session.token = token;
    return this.open();
  }

  #signOut() {
    this.#leave();
    this.#session.token = null;
    byId("bench").reset(); // the next person at this tab does not read the last one's prompt
    this.#askForToken();
  }

  /** Drops whatever runs or was shown for the account until now. */
  #leave() {
    this.#run?.leave();
    this.#running(null);
    this.#gateway = null;
    this.#card.clear();
  }

  #refused(error) {
    if (error.status === 401 || error.status === 403) {
      this.#session.token = null;
      return this.#askForToken(error);
    }
    byId("unreachable-reason").replaceChildren(...errorText(error));
    return this.#show("unreachable");
  }

  #askForToken(error = null) {
    const place = byId("sign-in-error");
    place.hidden = error === null;
    place.replaceChildren(...(error ? errorText(error) : []));
    this.#show("sign-in");
    byId("token").value = "";
    byId("token").focus();
  }

  #show(part) {
    for (const name of PARTS) byId(name).hidden = name !== part;
    byId("account").hidden = part !== "bench";
  }
}

function numberIn(id) {
  const text = byId(id).value;
  return text === "" ? undefined : Number(text); // undefined: not given, and left out of the JSON
}

new Page().open();
