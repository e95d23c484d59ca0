// One prompt on its way: from Submit to a settled, stopped, failed or broken end.

import { BrokenStream } from "./events.js";
import { GatewayError } from "./gateway.js";

// How long after a stop the gateway may take to send the stream's last event before we hang up.
const STOP_PATIENCE_MS = 8000;

export class Run {
  #gateway;
  #card;
  #hangUp = new AbortController();
  #streamId = null;
  #requestId = null;
  #stopping = false;
  #left = false;
  #stopError = null;
  #patience = 0;

  constructor(gateway, card) {
    this.#gateway = gateway;
    this.#card = card;
  }

  /** Sends the request and shows what comes; `limit` is the most it may write. Throws only a 401 at its start. */
  async go(request, limit) {
    const started = performance.now();
    let first = null;
    this.#card.begin();
    try {
      const reply = await this.#gateway.stream(request, this.#hangUp.signal);
      this.#streamId = reply.streamId;
      this.#requestId = reply.requestId;
      for await (const event of reply.events) {
        if (this.#left) return; // what had arrived already is nobody's any more
        if (typeof event.token === "string") {
          first ??= performance.now() - started;
          this.#card.write(event.token);
        } else if (event.error) {
          throw GatewayError.of(event.error, 0, this.#requestId);
        } else if (event.completed || event.aborted) {
          const total = performance.now() - started;
          this.#settle(event, limit, { asked: request.model, total, first, requestId: this.#requestId });
          return;
        }
      }
      throw new BrokenStream("The stream ended before the gateway said that the answer was complete.");
    } catch (error) {
      this.#fail(error);
    } finally {
      clearTimeout(this.#patience);
    }
  }

  /** Asks the gateway to stop the stream. What was produced stays, and is charged. */
  async stop() {
    if (this.#stopping) return;
    this.#stopping = true;
    if (this.#streamId === null) {
      this.#hangUp.abort(); // no stream to name yet; the gateway sees us go
      return;
    }
    this.#card.state = "stopping";
    this.#patience = setTimeout(() => this.#hangUp.abort(), STOP_PATIENCE_MS);
    try {
      await this.#gateway.stop(this.#streamId);
    } catch (error) {
      this.#stopError = error;
      this.#hangUp.abort();
    }
  }

  /** Closes the connection and shows nothing more (signing out). */
  leave() {
    this.#left = true;
    this.#hangUp.abort();
  }

  #settle({ aborted, response }, limit, facts) {
    let remark = "";
    if (aborted && !this.#stopping) {
      remark = "The gateway stopped this answer, not you. What you see is what was produced.";
    } else if (!aborted && response.usage.completionTokens >= limit) {
      remark = "The answer reached its limit of output tokens; it may be cut short.";
    }
    this.#card.settle(aborted ? "stopped" : "completed", response, { ...facts, remark });
  }

  #fail(error) {
    if (this.#left) return;
    if (error.status === 401 && this.#streamId === null) {
      this.#card.clear();
      throw error;
    }
    if (this.#stopError) {
      const { message, status, type, details, requestId } = this.#stopError;
      const what = `The gateway could not stop the stream, so the connection was closed instead. ${message}`;
      this.#card.fail("broken", new GatewayError({ message: what, status, type, details, requestId }));
    } else if (error.name === "AbortError" && this.#streamId === null) {
      this.#card.dismiss("Stopped before the answer began.");
    } else if (error instanceof GatewayError) {
      this.#card.fail("failed", error);
    } else {
      this.#card.fail("broken", new GatewayError({ message: brokenMessage(error), requestId: this.#requestId }));
    }
  }
}

function brokenMessage(error) {
  if (error.name === "AbortError") return "The gateway did not confirm the stop, so the connection was closed.";
  const why = error instanceof BrokenStream ? error.message : "The connection broke while the answer was coming.";
  return `${why} What you see may be cut off; you pay only for what was produced.`;
}
