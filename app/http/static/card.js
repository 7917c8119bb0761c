// A card per photo: sends it, shows what came of it, and tries again where that can help.

import { answerParts, footer, inWords, outline } from "./answer.js";
import { Trouble, classify } from "./api.js";
import { bytes, make } from "./elements.js";

const MAX_SENT_AT_ONCE = 4; // below a browser's 6 connections per host, so that a round trip never includes the browser's own queue

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

export class Card {
  #file;
  #desk;
  #controller = new AbortController();
  #countdown = null;
  #progress = make("span", { className: "state waiting" });
  #body = make("div", { className: "card-body" });

  /** `desk` is the page around it: `asked()` gives { model, version, topK, stages }, `answered` and `speak` take what comes. */
  constructor(file, desk) {
    this.#file = file;
    this.#desk = desk;
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
    this.#become("pending", outline(this.#desk.asked()));
    this.#progress.textContent = "waits for its turn";
    await takeTurn();
    try {
      const { signal } = this.#controller;
      if (signal.aborted) return;
      this.#progress.textContent = "sent, waiting for the answer";
      const given = await classify(this.#file, this.#desk.asked(), signal);
      this.#become("done", ...answerParts(given));
      this.#desk.answered(given);
      this.#desk.speak(`${this.name}: ${inWords(given)}`);
    } catch (error) {
      if (this.#controller.signal.aborted) return;
      const trouble = error instanceof Trouble ? error : new Trouble({ title: "The answer could not be shown", detail: String(error) });
      if (trouble !== error) console.error(error);
      this.#become("failed", this.#troublePart(trouble), footer({ code: trouble.code, requestId: trouble.requestId }));
      this.#desk.speak(`${this.name}: ${trouble.title}. ${trouble.detail}`);
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
