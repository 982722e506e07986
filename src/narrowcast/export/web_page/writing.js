// A model that writes on: token after token, each model its own text, in turns, so that their times can be compared.
import { element } from "./answer.js";
import { feed, vocabularyFor } from "./text.js";

const AT_FIRST = 48; // tokens that are written unless the user says otherwise

// Numbers in 0..1 that look random and are the same for the same seed (mulberry32), so that both models draw alike.
export function drawer(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

// The likeliest token at temperature 0; otherwise one drawn from softmax(scores / temperature) by a number in 0..1.
export function choose(scores, temperature, drawn) {
  let best = 0;
  for (let i = 1; i < scores.length; i++) if (scores[i] > scores[best]) best = i;
  if (!temperature) return best;
  const powers = Float64Array.from(scores, (score) => Math.exp((score - scores[best]) / temperature));
  let left = drawn * powers.reduce((a, b) => a + b, 0);
  for (let i = 0; i < powers.length; i++) {
    left -= powers[i];
    if (left < 0) return i;
  }
  return best;
}

// The ids that the model reads next, and where their last one stands; null where no more fit into its positions.
export function window(ids, ask) {
  const slides = ask.tokens === "characters";
  if (ids.length > ask.limit && !slides) return null;
  const seen = slides ? ids.slice(-ask.limit) : ids;
  const length = ask.length ?? seen.length;
  return { feeds: feed(seen, ask), row: ask.pad === "left" ? length - 1 : seen.length - 1 };
}

// How many tokens two texts have in common from their start on.
export function together(first, second) {
  let same = 0;
  while (same < Math.min(first.length, second.length) && first[same] === second[same]) same++;
  return same;
}

// One text after another model's turn; `run` answers with scores and the milliseconds that they took.
export async function write({ models, ids, vocabulary, ask, count, temperature, seed, run, grown, stopped }) {
  const texts = models.map((name) => ({ name, ids: [...ids], new: [], ms: [], why: "" }));
  const draw = drawer(seed);
  for (let step = 0; step < count && !stopped(); step++) {
    const drawn = draw();
    for (const text of texts.filter((one) => !one.why)) {
      const next = window(text.ids, ask);
      if (!next) { text.why = `stops at the model's ${ask.limit} tokens`; continue; }
      const { data, ms } = await run(text.name, next.feeds, next.row);
      text.ms.push(ms);
      const id = choose(data, temperature, drawn);
      text.ids.push(id);
      text.new.push(id);
      if (ask.stop.includes(id)) text.why = "ends here";
      grown(text, vocabulary);
    }
    if (texts.every((text) => text.why)) break;
  }
  return texts;
}

// What was written behind a start; a letter whose bytes are not all there yet is left out.
export function written(text, vocabulary) {
  const start = vocabulary.decode(text.ids.slice(0, text.ids.length - text.new.length));
  const whole = vocabulary.decode(text.ids);
  const behind = whole.startsWith(start) ? whole.slice(start.length) : vocabulary.decode(text.new);
  return behind.replace(/\uFFFD+$/u, "");
}

// Tokens per second of each text, over the steps that all of them took; the first one, which warms up, is not counted.
export function rates(texts) {
  const steps = Math.min(...texts.map(({ ms }) => ms.length));
  const from = steps > 1 ? 1 : 0;
  return Object.fromEntries(texts.map(({ name, ms }) => {
    const spent = ms.slice(from, steps).reduce((a, b) => a + b, 0);
    return [name, { rate: spent ? (1000 * (steps - from)) / spent : 0, tokens: ms.length }];
  }));
}

// A block per model, which shows what its text begins with and what it writes.
export function blocks(place, models, start) {
  place.replaceChildren();
  return new Map(models.map(({ name, label }) => {
    const block = element("div", name === "float32" ? "float" : "quantized");
    block.id = `answer-${name}`;
    const shown = element("p", "written");
    const behind = element("span", "new");
    const why = element("span", "quiet");
    shown.append(element("span", "start", start), behind, why);
    block.append(element("h3", "", label), shown);
    place.append(block);
    return [name, { behind, why }];
  }));
}

function controls(place) {
  place.innerHTML = `
    <label>Text to continue<textarea id="text-1"></textarea></label>
    <div class="settings">
      <label>Tokens<input id="count" type="number" min="1" max="2000" step="1"></label>
      <label>Temperature<input id="temperature" type="number" min="0" max="2" step="0.1" value="0"></label>
    </div>
    <p class="quiet">Temperature 0 takes the likeliest token every time; higher ones draw at random.</p>
    <div class="buttons"><button id="write" type="button">Continue</button>
      <button id="stop" class="plain" type="button" hidden>Stop</button></div>
    <p id="said" role="status"></p>`;
  return Object.fromEntries(["text-1", "count", "temperature", "write", "stop", "said"].map((id) => [id, place.querySelector(`#${id}`)]));
}

export async function make(place, ask, changed) {
  const vocabulary = await vocabularyFor(ask);
  const parts = controls(place);
  parts["text-1"].value = ask.examples[0];
  parts.count.value = Math.min(AT_FIRST, ask.tokens === "characters" ? AT_FIRST : ask.limit);
  parts.write.addEventListener("click", changed);
  parts["text-1"].addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) changed();
  });
  const say = (text) => { parts.said.textContent = text; parts.said.className = "wrong"; return null; };
  const number = (input) => (input.value !== "" && input.checkValidity() ? Number(input.value) : null);
  return {
    vocabulary,
    stop: parts.stop,
    busy(on) { parts.write.disabled = on; parts.stop.hidden = !on; },
    read() {
      say("");
      const count = number(parts.count);
      const temperature = number(parts.temperature);
      if (count === null) return say("Tokens is a whole number from 1 to 2000.");
      if (temperature === null) return say("Temperature is a number from 0 to 2, in steps of 0.1.");
      const ids = [...vocabulary.before, ...vocabulary.ids(parts["text-1"].value)];
      if (!ids.length) return say("Enter a text; the model has no sign for the start of one.");
      if (ids.length > ask.limit && ask.tokens !== "characters") return say(`This text has ${ids.length} tokens, and the model takes at most ${ask.limit}.`);
      return { ids, count, temperature };
    },
    begin: changed,
  };
}
