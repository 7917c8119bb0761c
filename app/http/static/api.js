// Asking the service: answers come back read, refusals and failures as Trouble.
// Addresses are relative: the page also works below a path prefix.

import { isNumber } from "./elements.js";

const ANSWER_TIMEOUT_MS = 60_000; // the service gives up earlier and says why

export const address = (path) => new URL(path, document.baseURI).href;

/** A refusal or failure, in words. `retryAfterS` is null where trying again cannot help. */
export class Trouble extends Error {
  constructor({ title, detail = "", code = "", requestId = "", retryAfterS = null }) {
    super(title);
    Object.assign(this, { title, detail, code, requestId, retryAfterS });
  }
}

/** Seconds to wait, from a Retry-After header: a number or a date. */
function retryAfter(header) {
  if (!header) return 0;
  const seconds = /^\s*\d+(\.\d+)?\s*$/.test(header) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return isNumber(seconds) ? Math.max(0, Math.ceil(seconds)) : 0;
}

function asObject(text) {
  try {
    const value = JSON.parse(text);
    return value !== null && typeof value === "object" ? value : null;
  } catch {
    return null;
  }
}

function troubleOf(response, text) {
  const problem = asObject(text) ?? {};
  const overloaded = problem.code === "overloaded";
  return new Trouble({
    title: overloaded ? "The service is busy" : String(problem.title ?? `The service answered with status ${response.status}`),
    detail: String(problem.detail ?? (overloaded ? "It has no room for one more image right now." : "")),
    code: String(problem.code ?? ""),
    requestId: String(problem.request_id ?? response.headers.get("x-request-id") ?? ""),
    // A fault of the photo stays one; a fault of the moment may pass.
    retryAfterS: response.status >= 500 || response.status === 429 ? retryAfter(response.headers.get("retry-after")) : null,
  });
}

/** The answer for one file and the round trip in ms. Throws Trouble; an AbortError after `givenUp`. */
export async function classify(file, { model, version, topK, quality }, givenUp) {
  const late = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
  const either = new AbortController();
  for (const source of [givenUp, late]) source.addEventListener("abort", () => either.abort(source.reason), { once: true });
  let body;
  try {
    body = await file.arrayBuffer();
  } catch {
    throw new Trouble({ title: "This could not be read", detail: "Is it a folder, or was the file moved meanwhile?" });
  }
  givenUp.throwIfAborted();

  const query = new URLSearchParams({ top_k: String(topK) });
  if (model !== undefined) query.set("model", model);
  if (version !== undefined) query.set("version", String(version));
  if (quality !== undefined) query.set("quality", quality);

  const startedAt = performance.now();
  let response, text;
  try {
    response = await fetch(address(`v1/classify?${query}`), {
      method: "POST",
      headers: { "Content-Type": file.type || "application/octet-stream" },
      body,
      signal: either.signal,
    });
    text = await response.text();
  } catch (error) {
    if (givenUp.aborted) throw error;
    throw new Trouble({
      title: late.aborted ? "No answer in time" : "The service could not be reached",
      detail: late.aborted ? `Nothing came back within ${ANSWER_TIMEOUT_MS / 1000} s.` : "The connection failed before an answer came.",
      retryAfterS: 0,
    });
  }
  const roundTrip = performance.now() - startedAt;

  if (!response.ok) throw troubleOf(response, text);
  const answer = asObject(text);
  const result = answer?.results?.[0];
  if (!result) throw new Trouble({ title: "The answer could not be understood", detail: text.slice(0, 200) });
  if (result.error) {
    throw new Trouble({
      title: "This photo could not be classified",
      detail: String(result.error.detail ?? ""),
      code: String(result.error.code ?? ""),
      requestId: String(answer.request_id ?? ""),
    });
  }
  return { answer, result, roundTrip };
}

/** The loaded models, and the text they came in. Throws Trouble. */
export async function listModels() {
  let response, text;
  try {
    response = await fetch(address("v1/models"), { headers: { Accept: "application/json" } });
    text = await response.text();
  } catch {
    throw new Trouble({ title: "The service could not be reached" });
  }
  if (!response.ok) throw troubleOf(response, text);
  const models = asObject(text)?.models;
  if (!Array.isArray(models)) throw new Trouble({ title: "The list of models could not be understood" });
  return { models, text };
}
