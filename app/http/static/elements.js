// Elements, and numbers in words. What comes from outside is put in as text, never as markup.

export const BLANK = "\u00a0"; // keeps a line's height

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
export const share = (part, whole) => (whole > 0 ? Math.min(100, Math.max(0, (100 * part) / whole)) : 0);
export const ofNumber = (count, noun, nouns = `${noun}s`) => `${count} ${count === 1 ? noun : nouns}`;

export function percent(probability) {
  if (!isNumber(probability)) return "–";
  if (probability > 0 && probability < 0.0005) return "<0.1%";
  if (probability < 1 && probability >= 0.9995) return ">99.9%";
  return `${(100 * probability).toFixed(1)}%`;
}

export function milliseconds(value) {
  if (!isNumber(value)) return "–";
  if (value > 0 && value < 0.05) return "<0.1 ms";
  return `${value.toFixed(value < 100 ? 1 : 0)} ms`;
}

export function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${Math.round(count / 1000)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

export function median(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  if (sorted.length === 0) return null;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export function bar(percentage) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${percentage}%`;
  return make("span", { className: "track", ariaHidden: "true" }, fill);
}

/** Text behind the colour that stands for `kind` in the time bar. */
export const marked = (tag, kind, ...children) => make(tag, { className: `mark ${kind}` }, ...children);
