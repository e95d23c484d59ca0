// The gateway as this page calls it: genstack's stream and shutdown, the model list and the balance.

import { events } from "./events.js";

// Relative to this file, so that the page also works behind a proxy that puts a path in front.
const BASE = new URL("../", import.meta.url);

/** A refusal or failure in the gateway's own words. `status` is 0 when there was no HTTP answer of its own. */
export class GatewayError extends Error {
  constructor({ status = 0, type = "", message, details = {}, requestId = null }) {
    super(message);
    Object.assign(this, { status, type, details, requestId });
  }

  /** From an `error` object of either form: genstack's, or the OpenAI one of the model and balance routes. */
  static of(error, status, requestId) {
    const { type, message, details } = error ?? {};
    return new GatewayError({
      status,
      type,
      message: message || `The gateway answered ${status} and did not say why.`,
      details: details ?? {},
      requestId,
    });
  }
}

export class Gateway {
  #token;

  constructor(token) {
    this.#token = token;
  }

  /** All models of the catalogue, those not callable now included. */
  async models() {
    return (await this.#get("v1/models?all=true")).data;
  }

  /** `{account, balance, held, available}`, amounts in USD as exact decimal strings. */
  balance() {
    return this.#get("v1/balance");
  }

  /** Starts a stream: `{streamId, requestId, events}`. */
  async stream(request, signal) {
    const response = await this.#post("stream", request, signal);
    return {
      streamId: response.headers.get("X-Stream-Id"),
      requestId: response.headers.get("X-Request-Id"),
      events: events(response.body),
    };
  }

  /** Asks for a stream's end. False when there is no such stream any more. */
  async stop(streamId) {
    try {
      await this.#post("stream/shutdown", { streamId });
      return true;
    } catch (error) {
      if (error.status === 404) return false;
      throw error;
    }
  }

  async #get(path) {
    const response = await this.#send(path, { headers: { Authorization: `Bearer ${this.#token}` } });
    return response.json();
  }

  #post(path, body, signal) {
    return this.#send(path, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ ...body, genstackToken: this.#token }),
      signal,
    });
  }

  async #send(path, options) {
    let response;
    try {
      response = await fetch(new URL(path, BASE), { ...options, cache: "no-store", credentials: "omit" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new GatewayError({ type: "Unreachable", message: "The gateway cannot be reached. Is it running?" });
    }
    if (response.ok) return response;
    const body = await response.json().catch(() => null);
    throw GatewayError.of(body?.error, response.status, response.headers.get("X-Request-Id"));
  }
}
