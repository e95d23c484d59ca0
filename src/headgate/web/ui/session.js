// The signed-in caller's token: out of the address bar at once, then kept for this tab only.
//
// sessionStorage and not memory alone, so that a reload does not sign you out; and neither localStorage nor a
// cookie, because a token must not outlive its tab or be sent by the browser on its own.

const KEY = "headgate.token";

export class Session {
  #token = null;

  constructor() {
    try {
      this.#token = sessionStorage.getItem(KEY);
    } catch {
      // Storage may be forbidden by the browser's settings; then the token lives in memory and a reload asks again.
    }
  }

  get token() {
    return this.#token;
  }

  set token(token) {
    this.#token = token;
    try {
      if (token === null) sessionStorage.removeItem(KEY);
      else sessionStorage.setItem(KEY, token);
    } catch {
      // See above.
    }
  }

  /** Takes `#token=…` out of the address bar and its history entry. True when there was one. */
  takeFromAddress() {
    const token = new URLSearchParams(location.hash.slice(1)).get("token");
    if (token === null) return false;
    history.replaceState(null, "", location.pathname + location.search);
    this.token = token.trim() || null;
    return true;
  }
}
