// Texts as the model's input: cut into tokens as the model's own tokenizer does it, or into characters.
import { tokenizer } from "./tokenizer.js";

// A vocabulary of single characters, with the same methods as a tokenizer; what it lacks is left out.
export function characters(vocabulary) {
  const names = new Map(Object.entries(vocabulary).map(([name, id]) => [id, name]));
  const start = "<s>" in vocabulary ? [vocabulary["<s>"]] : [];
  const seen = (id) => names.has(id) && !start.includes(id) && id !== 0; // 0 fills up
  return {
    before: start, after: [], special: new Set(start),
    ids: (text) => [...text].filter((c) => Object.hasOwn(vocabulary, c)).map((c) => vocabulary[c]),
    name: (id) => names.get(id),
    decode: (ids) => ids.filter(seen).map((id) => names.get(id)).join(""),
  };
}

// The file that page.json names, opened.
export async function vocabularyFor(ask) {
  const response = await fetch(ask.vocabulary);
  if (!response.ok) throw new Error(`${ask.vocabulary}: the server answered ${response.status}`);
  let table;
  try {
    table = await response.json();
  } catch {
    throw new Error(`${ask.vocabulary} is not JSON; copy the page again`);
  }
  return ask.tokens === "characters" ? characters(table) : tokenizer(table);
}

// The ids that the model gets, and how many the text has: beyond the limit its end is left out, or of characters its start.
export function encoded(text, vocabulary, { limit, tokens }) {
  const { before, after } = vocabulary;
  const ids = vocabulary.ids(text);
  const whole = before.length + ids.length + after.length;
  if (tokens === "characters") return { ids: [...before, ...ids].slice(-limit), whole };
  return { ids: [...before, ...ids.slice(0, Math.max(0, limit - before.length - after.length)), ...after], whole };
}

// Real tokens are numbered from 0 on; what fills up has the number 0, too.
function places(real) {
  let next = 0;
  return real.map((one) => (one ? next++ : 0));
}

// Ids -> the inputs of the model; a fixed length is filled up on the side that the page says.
export function feed(ids, ask) {
  const length = ask.length ?? Math.max(ids.length, 1);
  const fill = Array(Math.max(0, length - ids.length)).fill(ask.pad_id);
  const left = ask.pad === "left";
  const row = left ? [...fill, ...ids] : [...ids, ...fill];
  const real = left ? [...fill.map(() => 0), ...ids.map(() => 1)] : [...ids.map(() => 1), ...fill.map(() => 0)];
  const tensor = (values, { type }) => ({
    type, dims: [1, length], data: type === "int64" ? BigInt64Array.from(values, BigInt) : Int32Array.from(values),
  });
  const feeds = { [ask.input.name]: tensor(row, ask.input) };
  if (ask.mask) feeds[ask.mask.name] = tensor(real, ask.mask);
  if (ask.positions) feeds[ask.positions.name] = tensor(places(real), ask.positions);
  if (ask.kinds) feeds[ask.kinds.name] = tensor(row.map(() => 0), ask.kinds);
  return feeds;
}

function textBoxes(place, ask, changed) {
  return Array.from({ length: ask.texts }, (_, i) => {
    const label = document.createElement("label");
    label.textContent = ask.texts === 1 ? "Text" : `Text ${i + 1}`;
    const box = document.createElement("textarea");
    box.id = `text-${i + 1}`;
    box.value = ask.examples[i] ?? "";
    box.addEventListener("input", changed);
    label.append(box);
    place.append(label);
    return box;
  });
}

function told(rows, { limit, tokens }) {
  const counts = `${rows.map(({ whole }) => whole).join(" and ")} tokens, of at most ${limit}`;
  if (!rows.some(({ whole }) => whole > limit)) return counts;
  return `${counts}: the ${tokens === "characters" ? "start" : "end"} of a longer text is left out.`;
}

export async function make(place, ask, changed) {
  const vocabulary = await vocabularyFor(ask);
  let waiting;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(changed, 300); };
  const boxes = textBoxes(place, ask, soon);
  const said = document.createElement("p");
  said.setAttribute("role", "status");
  place.append(said);
  const say = (text, wrong = false) => { said.textContent = text; said.className = wrong ? "wrong" : "quiet"; };
  return {
    vocabulary,
    read() {
      const empty = boxes.filter((box) => !box.value.trim());
      if (empty.length) {
        say(ask.texts === 1 ? "Enter a text." : `Text ${boxes.indexOf(empty[0]) + 1} is empty; the model compares two.`, true);
        return null;
      }
      const rows = boxes.map((box) => encoded(box.value, vocabulary, ask));
      if (rows.some(({ ids }) => !ids.length)) { say("No character of this text is in the model's vocabulary.", true); return null; }
      say(told(rows, ask), rows.some(({ whole }) => whole > ask.limit));
      return rows.map(({ ids }) => feed(ids, ask));
    },
    begin: changed,
  };
}
