// The page at `/`: sends photos to /v1/classify and shows labels, the exit taken, and where the time went.

import { Trouble, address, listModels } from "./api.js";
import { Card } from "./card.js";
import { bar, isNumber, make, median, milliseconds, ofNumber, share } from "./elements.js";

const MAX_CARDS = 20;
const TOP_K = 5;
const LABELS_NAMED = 10;
const MODELS_RETRY_MS = 5_000;

const byId = (id) => document.getElementById(id);

let cards = []; // newest first
let answers = []; // one record per image answered, for the tally
let models = [];
let modelsShown = null; // the text they came in
let chosen = null; // one of the models; null: the service's default
let quality = null; // name of an operating point; null: the model's default

/** For people who listen: one sentence per result, in the order they come. */
function speak(sentence) {
  const spoken = byId("spoken");
  spoken.append(make("p", { textContent: sentence }));
  while (spoken.children.length > MAX_CARDS) spoken.firstElementChild.remove();
}

const notice = (sentence) => { byId("notice").textContent = sentence; };

const topK = () => Math.min(TOP_K, currentModel()?.classes || TOP_K);

/** What the cards need of the page. */
const desk = {
  asked: () => ({
    model: chosen?.name, version: chosen?.version, quality: quality ?? undefined, topK: topK(), stages: currentModel()?.stages || 1,
  }),
  answered: count,
  speak,
};

// ---- cards ----------------------------------------------------------------------------------------------------------

function take(files) {
  const taken = [...files].slice(0, MAX_CARDS);
  notice(taken.length < files.length ? `The first ${MAX_CARDS} of ${files.length} were taken; for more, use the API itself.` : "");
  if (taken.length === 0) return;

  const added = taken.map((file) => new Card(file, desk));
  for (const card of added) byId("cards").prepend(card.element);
  cards = [...added.toReversed(), ...cards];
  for (const card of cards.splice(MAX_CARDS)) card.drop();
  byId("empty").hidden = true;
  byId("start-over").hidden = false;
  for (const card of added) card.send();
}

// ---- tally ----------------------------------------------------------------------------------------------------------

function count({ answer, result, roundTrip }) {
  const { exit = {}, timings_ms: timings = {} } = result;
  answers.push({ model: answer.model, version: answer.version, stage: exit.stage, stages: exit.stages, total: timings.total, roundTrip });
  showTally();
}

/** For one model only: stages of different models cannot be added up. */
function showTally() {
  const model = currentModel();
  const last = answers.at(-1);
  const [name, version] = model ? [model.name, model.version] : [last?.model, last?.version];
  const mine = answers.filter((answer) => answer.model === name && answer.version === version);
  const numStages = Math.max(1, model?.stages || 0, ...mine.map((answer) => answer.stages || 0));
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

// ---- models ---------------------------------------------------------------------------------------------------------

const currentModel = () => chosen ?? models.find((model) => model.default) ?? (models.length === 1 ? models[0] : null);
const nameOf = (model) => [model.name ?? "unnamed", isNumber(model.version) ? `v${model.version}` : ""].join(" ").trim();

async function askForModels() {
  let again = true;
  try {
    const { models: listed, text } = await listModels();
    again = listed.length === 0 || listed.some((model) => model.ready === false);
    if (text !== modelsShown) { // drawing the same again would close an open list of models
      modelsShown = text;
      models = listed;
      if (chosen) chosen = models.find((model) => nameOf(model) === nameOf(chosen)) ?? null;
      showModel();
      showTally();
    }
  } catch (error) {
    const said = error instanceof Trouble ? [error.title, error.detail].filter(Boolean).join(": ") : "The models could not be shown";
    if (!(error instanceof Trouble)) console.error(error);
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
    const facts = [
      [model.variant, model.target].filter(Boolean).join(" on "),
      isNumber(model.stages) ? ofNumber(model.stages, "stage") : "",
      isNumber(model.classes) ? ofNumber(model.classes, "class", "classes") : "",
    ].filter(Boolean).join(", ");
    if (models.length === 1) served.append(make("strong", { textContent: nameOf(model) }));
    if (model.ready !== undefined) {
      served.append(make("span", { className: model.ready ? "state" : "state waiting", textContent: model.ready ? "ready" : "not ready" }));
    }
    served.append(make("span", { textContent: facts }));

    const labels = Array.isArray(model.labels) ? model.labels.slice(0, LABELS_NAMED).map(String) : [];
    const more = model.classes > labels.length ? ", …" : "";
    if (labels.length) parts.push(make("p", { className: "quiet", textContent: `Knows ${labels.join(", ")}${more}` }));
    if (model.variant_reason) parts.push(make("p", { className: "quiet", textContent: model.variant_reason }));
    const qualities = model.stages > 1 && Array.isArray(model.qualities) ? model.qualities : [];
    if (!qualities.some((each) => each.name === quality)) quality = null;
    const used = qualities.find((each) => (quality ? each.name === quality : each.default));
    if (qualities.length > 1) parts.push(make("p", { className: "served" }, ...qualityChoice(qualities, used)));
  }
  byId("model").replaceChildren(...parts);
}

/** How careful to be with the next photos, and what that costs at most. */
function qualityChoice(qualities, used) {
  const choice = make("select", { id: "quality-choice" });
  for (const each of qualities) choice.append(make("option", { textContent: each.name, selected: each === used }));
  choice.addEventListener("change", () => {
    quality = choice.value;
    showModel();
    byId("quality-choice").focus();
  });
  const bound = used?.bound || "what leaving early costs is not proved";
  return [make("label", { htmlFor: "quality-choice", textContent: "Quality" }), choice, make("span", { className: "quiet", textContent: bound })];
}

function modelChoice(current) {
  const choice = make("select", { id: "model-choice", ariaLabel: "Model for the next photos" });
  for (const model of models) choice.append(make("option", { textContent: nameOf(model), selected: model === current }));
  if (!current) choice.prepend(make("option", { value: "", textContent: "Model…", selected: true }));
  choice.addEventListener("change", () => {
    chosen = models.find((model) => nameOf(model) === choice.value) ?? null;
    showModel();
    showTally();
    byId("model-choice").focus();
  });
  return choice;
}

// ---- ways in --------------------------------------------------------------------------------------------------------

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
