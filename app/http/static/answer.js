// The drawing of one answer: labels, the exit taken, where the time went.

import { BLANK, bar, isNumber, make, marked, milliseconds, percent, share } from "./elements.js";

/** The shape of the answer to come, so that nothing moves when it does. */
export function outline({ stages, topK }) {
  const predictions = Array.from({ length: topK }, () => ({ label: BLANK }));
  const parts = answerParts({ answer: { model: BLANK }, result: { predictions, exit: { stages } }, roundTrip: null });
  const drawing = make("div", { ariaHidden: "true" }, ...parts);
  drawing.inert = true;
  return drawing;
}

export function inWords({ result }) {
  const [best] = result.predictions ?? [];
  const exit = result.exit ?? {};
  return [
    best ? `${best.label}, ${percent(best.probability)}` : "no label",
    isNumber(exit.stage) && exit.stages > 1 ? `left at stage ${exit.stage + 1} of ${exit.stages}` : null,
    isNumber(result.timings_ms?.total) ? milliseconds(result.timings_ms.total) : null,
  ].filter(Boolean).join(", ");
}

export function answerParts({ answer, result, roundTrip }) {
  const timings = result.timings_ms ?? {};
  const labels = make("div", {}, make("h4", { textContent: "Labels" }), labelList(result.predictions ?? []));
  const way = make("div", {}, ...exitParts(result.exit ?? {}, timings.stages ?? []), ...timeParts(timings, roundTrip));
  return [
    make("div", { className: "answer" }, labels, way),
    footer({ model: answer.model, version: answer.version, variant: answer.variant, quality: answer.quality, requestId: answer.request_id }),
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
  if (known && isNumber(confidence)) title.append(", score ", make("b", { textContent: confidence.toFixed(3) }));
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

export function footer({ model, version, variant, quality, code, requestId }) {
  const said = [model && `${model}${isNumber(version) ? ` v${version}` : ""}`, variant, quality && `quality ${quality}`].filter(Boolean).join(", ");
  const foot = make("p", { className: "card-foot" });
  if (said) foot.append(said);
  for (const [name, value] of [["code", code], ["request", requestId]]) {
    if (!value) continue;
    if (foot.hasChildNodes()) foot.append(" · ");
    foot.append(`${name} `, make("code", { textContent: String(value) }));
  }
  return foot.hasChildNodes() ? foot : null;
}
