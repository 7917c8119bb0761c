// The page at `/`: sends photos to /v1/classify and shows labels, the exit taken, and where the time went.
// What comes from outside is put in as text, never as markup. Addresses are relative: the page also works below a path prefix.

const MAX_CARDS = 20;
const MAX_SENT_AT_ONCE = 4; // below a browser's 6 connections per host, so that a round trip never includes the browser's own queue
const TOP_K = 5;
const ANSWER_TIMEOUT_MS = 60_000; // the service gives up earlier and says why
const MODELS_RETRY_MS = 5_000;

const BLANK = "\u00a0"; // keeps a line's height

const byId = (id) => document.getElementById(id);
const address = (path) => new URL(path, document.baseURI).href;

let cards = []; // newest first
let answers = []; // one record per image answered, for the tally
let models = [];
let modelsShown = null; // the text they came in
let chosenModel = null; // a name; null: the service's default

// ---- small helpers -------------------------------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const share = (part, whole) => (whole > 0 ? Math.min(100, Math.max(0, (100 * part) / whole)) : 0);
const ofNumber = (count, noun, nouns = `${noun}s`) => `${count} ${count === 1 ? noun : nouns}`;

function percent(probability) {
  if (!isNumber(probability)) return "–";
  if (probability > 0 && probability < 0.0005) return "<0.1%";
  if (probability < 1 && probability >= 0.9995) return ">99.9%";
  return `${(100 * probability).toFixed(1)}%`;
}

function milliseconds(value) {
  if (!isNumber(value)) return "–";
  if (value > 0 && value < 0.05) return "<0.1 ms";
  return `${value.toFixed(value < 100 ? 1 : 0)} ms`;
}

function bytes(count) {
  if (count < 1000) return `${count} B`;
  return count < 1e6 ? `${Math.round(count / 1000)} kB` : `${(count / 1e6).toFixed(1)} MB`;
}

function median(values) {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  if (sorted.length === 0) return null;
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

function bar(percentage) {
  const fill = make("span", { className: "fill" });
  fill.style.width = `${percentage}%`;
  return make("span", { className: "track", ariaHidden: "true" }, fill);
}

/** For people who listen: one sentence per result, in the order they come. */
function speak(sentence) {
  const spoken = byId("spoken");
  spoken.append(make("p", { textContent: sentence }));
  while (spoken.children.length > MAX_CARDS) spoken.firstElementChild.remove();
}

const notice = (sentence) => { byId("notice").textContent = sentence; };

// ---- asking the service --------------------------------------------------------------------------------------------

/** A refusal or failure, in words. `retryAfterS` is null where trying again cannot help. */
class Trouble extends Error {
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

/** The answer for one file and the round trip in ms. Throws Trouble; an AbortError where the card was given up. */
async function classify(file, signal) {
  let body;
  try {
    body = await file.arrayBuffer();
  } catch {
    throw new Trouble({ title: "This could not be read", detail: "Is it a folder, or was the file moved meanwhile?" });
  }
  signal.throwIfAborted();

  const query = new URLSearchParams({ top_k: String(topK()) });
  if (chosenModel !== null) query.set("model", chosenModel);

  const startedAt = performance.now();
  let response, text;
  try {
    response = await fetch(address(`v1/classify?${query}`), {
      method: "POST",
      headers: { "Content-Type": file.type || "application/octet-stream" },
      body,
      signal,
    });
    text = await response.text();
  } catch (error) {
    if (signal.aborted && signal.reason?.name !== "TimeoutError") throw error;
    const late = signal.reason?.name === "TimeoutError";
    throw new Trouble({
      title: late ? "No answer in time" : "The service could not be reached",
      detail: late ? `Nothing came back within ${ANSWER_TIMEOUT_MS / 1000} s.` : "The connection failed before an answer came.",
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

const currentModel = () =>
  models.find((model) => model.name === chosenModel) ?? models.find((model) => model.default) ?? (models.length === 1 ? models[0] : null);

const topK = () => Math.min(TOP_K, currentModel()?.classes || TOP_K);

// ---- a card per photo ----------------------------------------------------------------------------------------------

let sending = 0;
const waiting = [];

async function takeTurn() {
  if (sending < MAX_SENT_AT_ONCE) sending += 1;
  else await new Promise((resolve) => waiting.push(resolve)); // its turn is handed over by giveTurn
}

function giveTurn() {
  const next = waiting.shift();
  if (next) next();
  else sending -= 1;
}

class Card {
  #file;
  #controller = new AbortController();
  #countdown = null;
  #progress = make("span", { className: "state waiting" });
  #body = make("div", { className: "card-body" });

  constructor(file) {
    this.#file = file;
    const title = make("h3", { textContent: file.name || "pasted image" });
    title.id = `photo-${crypto.getRandomValues(new Uint32Array(1))[0]}`;
    const head = make("div", { className: "card-head" }, title, make("span", { className: "quiet", textContent: bytes(file.size) }), this.#progress);
    this.article = make("article", { className: "card", tabIndex: -1 }, thumbnail(file), head, this.#body);
    this.article.setAttribute("aria-labelledby", title.id);
    this.element = make("li", {}, this.article);
  }

  get name() {
    return this.#file.name || "Pasted image";
  }

  async send() {
    this.#become("pending", outline());
    this.#progress.textContent = "waits for its turn";
    await takeTurn();
    try {
      const { signal } = this.#controller;
      if (signal.aborted) return;
      this.#progress.textContent = "sent, waiting for the answer";
      const late = AbortSignal.timeout(ANSWER_TIMEOUT_MS);
      const either = new AbortController();
      for (const source of [signal, late]) source.addEventListener("abort", () => either.abort(source.reason), { once: true });
      const given = await classify(this.#file, either.signal);
      this.#become("done", ...answerParts(given));
      count(given);
      speak(`${this.name}: ${inWords(given)}`);
    } catch (error) {
      if (this.#controller.signal.aborted) return;
      const trouble = error instanceof Trouble ? error : new Trouble({ title: "The answer could not be shown", detail: String(error) });
      if (trouble !== error) console.error(error);
      this.#become("failed", this.#troublePart(trouble), footer({ code: trouble.code, requestId: trouble.requestId }));
      speak(`${this.name}: ${trouble.title}. ${trouble.detail}`);
    } finally {
      giveTurn();
    }
  }

  /** No longer wanted: stop what is under way. */
  drop() {
    this.#controller.abort();
    clearInterval(this.#countdown);
    this.element.remove();
  }

  #become(state, ...parts) {
    this.article.className = `card ${state}`;
    this.article.ariaBusy = String(state === "pending");
    this.#progress.hidden = state !== "pending";
    this.#body.replaceChildren(...parts.filter((part) => part !== null));
  }

  #troublePart(trouble) {
    const part = make("div", { className: "trouble" }, make("strong", { textContent: trouble.title }));
    if (trouble.detail) part.append(make("p", { textContent: trouble.detail }));
    if (trouble.retryAfterS === null) return part;

    const again = make("button", { className: "button", type: "button" });
    again.addEventListener("click", () => {
      this.article.focus({ preventScroll: true }); // the button goes; the focus must not go with it
      this.send();
    });
    const readyAt = Date.now() + 1000 * trouble.retryAfterS;
    const tick = () => {
      const left = Math.ceil((readyAt - Date.now()) / 1000);
      again.disabled = left > 0;
      again.textContent = left > 0 ? `Try again in ${left} s` : "Try again";
      if (left <= 0) clearInterval(this.#countdown);
    };
    this.#countdown = setInterval(tick, 250);
    tick();
    part.append(again);
    return part;
  }
}

function thumbnail(file) {
  const frame = make("div", { className: "thumb" });
  const url = URL.createObjectURL(file);
  const image = make("img", { alt: "", decoding: "async", src: url });
  image.addEventListener("load", () => URL.revokeObjectURL(url), { once: true });
  image.addEventListener("error", () => {
    URL.revokeObjectURL(url);
    frame.replaceChildren(make("span", { textContent: "no preview" }));
  }, { once: true });
  frame.append(image);
  return frame;
}

/** The shape of the answer to come, so that nothing moves when it does. */
function outline() {
  const stages = currentModel()?.stages || 1;
  const predictions = Array.from({ length: topK() }, () => ({ label: BLANK }));
  const parts = answerParts({ answer: { model: BLANK }, result: { predictions, exit: { stages } }, roundTrip: null });
  const drawing = make("div", { ariaHidden: "true" }, ...parts);
  drawing.inert = true;
  return drawing;
}

function inWords({ result }) {
  const [best] = result.predictions ?? [];
  const exit = result.exit ?? {};
  return [
    best ? `${best.label}, ${percent(best.probability)}` : "no label",
    isNumber(exit.stage) && exit.stages > 1 ? `left at stage ${exit.stage + 1} of ${exit.stages}` : null,
    isNumber(result.timings_ms?.total) ? milliseconds(result.timings_ms.total) : null,
  ].filter(Boolean).join(", ");
}

function answerParts({ answer, result, roundTrip }) {
  const timings = result.timings_ms ?? {};
  const labels = make("div", {}, make("h4", { textContent: "Labels" }), labelList(result.predictions ?? []));
  const way = make("div", {}, ...exitParts(result.exit ?? {}, timings.stages ?? []), ...timeParts(timings, roundTrip));
  return [
    make("div", { className: "answer" }, labels, way),
    footer({ model: answer.model, version: answer.version, variant: answer.variant, requestId: answer.request_id }),
  ];
}

function labelList(predictions) {
  const list = make("ol", { className: "labels" });
  for (const { label, index, probability } of predictions) {
    list.append(make("li", {},
      make("span", { className: "name", textContent: label ?? `class ${index}` }),
      make("span", { textContent: percent(probability) }),
      bar(share(isNumber(probability) ? probability : 0, 1))));
  }
  return list;
}

/** The stages as a row: those it passed, the one it left at, those it did not need. */
function exitParts({ stage: exitStage, stages, confidence }, stageTimings) {
  const known = isNumber(exitStage);
  const numStages = Math.max(stages ?? 0, known ? exitStage + 1 : 0);
  const row = make("ol", { className: "path" });
  for (let stage = 0; stage < numStages; stage += 1) {
    const [kind, said] = !known ? ["ahead", BLANK]
      : stage < exitStage ? ["passed", "went on"]
      : stage > exitStage ? ["unneeded", "not needed"]
      : ["left", stage < numStages - 1 ? "left here" : numStages > 1 ? "last stage" : "only stage"];
    const box = make("li", { className: `stage ${kind}` }, make("strong", { textContent: `Stage ${stage + 1}` }), make("span", { textContent: said }));
    for (const what of ["queue", "compute"]) {
      const value = stageTimings[stage]?.[what];
      if (isNumber(value)) box.append(marked("span", what, make("span", { className: "unseen", textContent: `${what} ` }), milliseconds(value)));
    }
    row.append(box);
  }
  const title = make("h4", { textContent: "Exit" });
  if (known) title.append(" at ", make("b", { textContent: `stage ${exitStage + 1} of ${numStages}` }));
  if (known && isNumber(confidence)) title.append(", ", make("b", { textContent: percent(confidence) }), " sure");
  return [title, row];
}

/** The whole as the service and the browser saw it, a bar in the order things happened, and its legend with the sums. */
function timeParts(timings, roundTrip) {
  const { decode, queue, compute, total } = timings;
  const stages = timings.stages?.length ? timings.stages : [{ queue, compute }];
  const segments = [["decode", "decode", decode]];
  stages.forEach((stage, index) => {
    const where = stages.length > 1 ? `, stage ${index + 1}` : "";
    segments.push(["queue", `queue${where}`, stage.queue], ["compute", `compute${where}`, stage.compute]);
  });
  const known = segments.reduce((sum, [, , value]) => sum + (isNumber(value) ? value : 0), 0);
  const whole = Math.max(isNumber(total) ? total : known, known);
  const other = whole - known;
  segments.push(["other", "other", other]);

  const drawn = make("div", { className: "time", ariaHidden: "true" });
  for (const [kind, name, value] of segments) {
    if (!isNumber(value) || value < 0.002 * whole || value <= 0) continue;
    const segment = make("span", { className: kind, title: `${name}: ${milliseconds(value)}` });
    segment.style.width = `${share(value, whole)}%`;
    drawn.append(segment);
  }

  const legend = make("ul", { className: "legend" });
  for (const [kind, value] of [["decode", decode], ["queue", queue], ["compute", compute], ["other", whole > 0 ? other : null]]) {
    legend.append(marked("li", kind, `${kind} ${milliseconds(value)}`));
  }

  const title = make("h4", { textContent: "Time" });
  if (isNumber(roundTrip)) {
    title.append(": ");
    if (whole > 0) title.append(make("b", { textContent: milliseconds(whole) }), " in the service, ");
    title.append(make("b", { textContent: milliseconds(roundTrip) }), " round trip");
  }
  return [title, drawn, legend];
}

/** Text behind the colour that stands for `kind` in the time bar. */
const marked = (tag, kind, ...children) => make(tag, { className: `mark ${kind}` }, ...children);

function footer({ model, version, variant, code, requestId }) {
  const said = [model && `${model}${isNumber(version) ? ` v${version}` : ""}`, variant].filter(Boolean).join(", ");
  const foot = make("p", { className: "card-foot" });
  if (said) foot.append(said);
  for (const [name, value] of [["code", code], ["request", requestId]]) {
    if (!value) continue;
    if (foot.hasChildNodes()) foot.append(" · ");
    foot.append(`${name} `, make("code", { textContent: String(value) }));
  }
  return foot.hasChildNodes() ? foot : null;
}

function take(files) {
  const taken = [...files].slice(0, MAX_CARDS);
  notice(taken.length < files.length ? `The first ${MAX_CARDS} of ${files.length} were taken; for more, use the API itself.` : "");
  if (taken.length === 0) return;

  const added = taken.map((file) => new Card(file));
  for (const card of added) byId("cards").prepend(card.element);
  cards = [...added.toReversed(), ...cards];
  for (const card of cards.splice(MAX_CARDS)) card.drop();
  byId("empty").hidden = true;
  byId("start-over").hidden = false;
  for (const card of added) card.send();
}

// ---- tally ---------------------------------------------------------------------------------------------------------

function count({ answer, result, roundTrip }) {
  const { exit = {}, timings_ms: timings = {} } = result;
  answers.push({ model: answer.model, stage: exit.stage, stages: exit.stages, total: timings.total, roundTrip });
  showTally();
}

/** For one model only: stages of different models cannot be added up. */
function showTally() {
  const model = currentModel()?.name ?? answers.at(-1)?.model;
  const mine = answers.filter((answer) => answer.model === model);
  const numStages = Math.max(1, currentModel()?.stages || 0, ...mine.map((answer) => answer.stages || 0));
  const rows = Array.from({ length: numStages }, (_, stage) => {
    const here = mine.filter((answer) => answer.stage === stage).length;
    return make("li", {},
      make("span", { textContent: `Stage ${stage + 1}` }),
      bar(share(here, mine.length)),
      make("span", { className: "count", textContent: mine.length ? `${here} (${Math.round(share(here, mine.length))}%)` : "0" }));
  });
  const figures = [
    ["Photos", String(mine.length)],
    ["Median in service", milliseconds(median(mine.map((answer) => answer.total)))],
    ["Median round trip", milliseconds(median(mine.map((answer) => answer.roundTrip)))],
  ];
  byId("tally").replaceChildren(
    make("ul", { ariaLabel: "Photos by the stage they left at" }, ...rows),
    make("dl", { className: "figures" }, ...figures.map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })))));
}

// ---- model ---------------------------------------------------------------------------------------------------------

async function askForModels() {
  let again = true;
  try {
    const response = await fetch(address("v1/models"), { headers: { Accept: "application/json" } });
    const text = await response.text();
    if (!response.ok) throw troubleOf(response, text);
    const listed = asObject(text)?.models;
    if (!Array.isArray(listed)) throw new Trouble({ title: "The list of models could not be understood" });
    again = listed.length === 0 || listed.some((model) => model.ready === false);
    if (text !== modelsShown) { // drawing the same again would close an open list of models
      modelsShown = text;
      models = listed;
      showModel();
      showTally();
    }
  } catch (error) {
    const said = error instanceof Trouble ? [error.title, error.detail].filter(Boolean).join(": ") : "The service could not be reached";
    modelsShown = null;
    byId("model").replaceChildren(make("p", { className: "quiet", textContent: `${said}. Asking again soon.` }));
  }
  if (again) setTimeout(askForModels, MODELS_RETRY_MS);
}

function showModel() {
  const model = currentModel();
  const served = make("p", { className: "served" });
  const parts = [served];
  if (models.length > 1) served.append(modelChoice(model));
  if (!model) {
    served.append(make("span", { className: "quiet", textContent: models.length ? "Choose a model." : "No model is loaded." }));
  } else {
    const version = isNumber(model.version) ? `v${model.version}` : "";
    const name = models.length > 1 ? version : `${model.name ?? "unnamed"} ${version}`.trim();
    const facts = [
      [model.variant, model.target].filter(Boolean).join(" on "),
      isNumber(model.stages) ? ofNumber(model.stages, "stage") : "",
      isNumber(model.classes) ? ofNumber(model.classes, "class", "classes") : "",
    ].filter(Boolean).join(", ");
    if (name) served.append(make("strong", { textContent: name }));
    if (model.ready !== undefined) {
      served.append(make("span", { className: model.ready ? "state" : "state waiting", textContent: model.ready ? "ready" : "not ready yet" }));
    }
    served.append(make("span", { textContent: facts }));

    const labels = Array.isArray(model.labels_preview) ? model.labels_preview.map(String) : [];
    const more = model.classes > labels.length ? ", …" : "";
    if (labels.length) parts.push(make("p", { className: "quiet", textContent: `Knows ${labels.join(", ")}${more}` }));
    if (model.variant_reason) parts.push(make("p", { className: "quiet", textContent: model.variant_reason }));
  }
  byId("model").replaceChildren(...parts);
}

function modelChoice(current) {
  const choice = make("select", { id: "model-choice", ariaLabel: "Model for the next photos" });
  for (const { name } of models) choice.append(make("option", { value: name, textContent: name, selected: name === current?.name }));
  if (!current) choice.prepend(make("option", { value: "", textContent: "Model…", selected: true }));
  choice.addEventListener("change", () => {
    chosenModel = choice.value || null;
    showModel();
    showTally();
    byId("model-choice").focus();
  });
  return choice;
}

// ---- ways in -------------------------------------------------------------------------------------------------------

byId("files").addEventListener("change", (event) => {
  take(event.target.files);
  event.target.value = ""; // so that the same photo can be chosen again
});

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

// The whole page takes drops: beside the zone, a browser would leave the page and open the photo.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  if (carriesFiles(event)) document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (event.relatedTarget === null) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  if (event.dataTransfer.files.length) take(event.dataTransfer.files);
  else notice("That was not a file. Save the picture first, then drop it here.");
});

document.addEventListener("paste", (event) => {
  const files = [...(event.clipboardData?.files ?? [])];
  if (files.length) take(files);
  else notice("There is no image in the clipboard.");
});

byId("start-over").addEventListener("click", () => {
  for (const card of cards) card.drop();
  cards = [];
  answers = [];
  byId("empty").hidden = false;
  byId("start-over").hidden = true;
  notice("");
  showTally();
  byId("files").focus();
});

byId("curl").value = `curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg' ${address("v1/classify")}`;

byId("copy").addEventListener("click", async (event) => {
  const button = event.currentTarget;
  const line = byId("curl");
  let done = true;
  try {
    await navigator.clipboard.writeText(line.value);
  } catch {
    line.select(); // clipboard access needs https or localhost
    done = document.execCommand("copy");
  }
  button.textContent = done ? "Copied" : "Selected: press Ctrl+C";
  speak(button.textContent);
  setTimeout(() => { button.textContent = "Copy"; }, 2000);
});

showTally();
askForModels();
