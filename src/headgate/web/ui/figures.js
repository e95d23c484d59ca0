// Numbers as people read them. Money arrives as exact decimal strings and never passes through a float.

/** "1234567.891" -> "1,234,567.891" */
export function grouped(decimal) {
  const [whole, fraction] = String(decimal).split(".");
  const head = whole.replace(/\B(?=(\d{3})+$)/g, ",");
  return fraction ? `${head}.${fraction}` : head;
}

/** "-0.5" -> "-$0.50"; all decimals are shown, and at least two. */
export function usd(decimal) {
  const [whole, fraction = ""] = String(decimal).replace("-", "").split(".");
  const sign = String(decimal).startsWith("-") ? "-" : "";
  return `${sign}$${grouped(whole)}.${fraction.padEnd(2, "0")}`;
}

/** The exact sum of two amounts that are not negative. */
export function sum(a, b) {
  const places = Math.max(fraction(a).length, fraction(b).length);
  const total = (scaled(a, places) + scaled(b, places)).toString().padStart(places + 1, "0");
  const rest = total.slice(total.length - places).replace(/0+$/, "");
  const whole = total.slice(0, total.length - places);
  return places && rest ? `${whole}.${rest}` : whole;
}

function fraction(decimal) {
  return decimal.split(".")[1] ?? "";
}

function scaled(decimal, places) {
  return BigInt(decimal.split(".")[0] + fraction(decimal).padEnd(places, "0"));
}

/** Milliseconds -> "0.84 s" */
export function seconds(ms) {
  const s = ms / 1000;
  return `${s.toFixed(s < 10 ? 2 : 1)} s`;
}

/** 1 -> "1 token", 12000 -> "12,000 tokens" */
export function tokens(count) {
  return `${grouped(count)} token${count === 1 ? "" : "s"}`;
}
