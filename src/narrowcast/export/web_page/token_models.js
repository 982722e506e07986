// The models of a tokenizer.json: a piece of text -> numbers of the vocabulary. Sennrich et al. 2016 (BPE), Kudo 2018 (Unigram).

const utf8 = new TextEncoder();

// The bytes of a text as the pieces <0x00> to <0xFF>; null where the vocabulary lacks one.
function fallback(text, vocabulary) {
  const ids = Array.from(utf8.encode(text), (byte) => vocabulary.get(`<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`));
  return ids.includes(undefined) ? null : ids;
}

// The longest piece of the vocabulary at every position; a word that cannot be spelt so is unknown as a whole.
function wordPiece(model, vocabulary) {
  const unknown = vocabulary.get(model.unk_token);
  return (word) => {
    const letters = [...word];
    const ids = [];
    for (let start = 0; start < letters.length;) {
      let end = letters.length;
      const prefix = start ? model.continuing_subword_prefix : "";
      while (end > start && !vocabulary.has(prefix + letters.slice(start, end).join(""))) end--;
      if (end === start || letters.length > model.max_input_chars_per_word) return [unknown];
      ids.push(vocabulary.get(prefix + letters.slice(start, end).join("")));
      start = end;
    }
    return ids;
  };
}

function wordLevel(model, vocabulary) {
  const unknown = vocabulary.has(model.unk_token) ? [vocabulary.get(model.unk_token)] : [];
  return (word) => (vocabulary.has(word) ? [vocabulary.get(word)] : unknown);
}

// A binary heap: what `before` puts first comes out first.
class Heap {
  constructor(before) { this.items = []; this.before = before; }

  push(item) {
    const { items, before } = this;
    let at = items.push(item) - 1;
    for (let up = (at - 1) >> 1; at && before(item, items[up]); at = up, up = (at - 1) >> 1) items[at] = items[up];
    items[at] = item;
  }

  pop() {
    const { items, before } = this;
    const top = items[0];
    const item = items.pop();
    if (!items.length) return top;
    let at = 0;
    for (let down = 1; down < items.length; down = 2 * at + 1) {
      if (down + 1 < items.length && before(items[down + 1], items[down])) down++;
      if (!before(items[down], item)) break;
      items[at] = items[down];
      at = down;
    }
    items[at] = item;
    return top;
  }
}

const SHIFT = 2 ** 26; // two numbers of a vocabulary in one key
const pair = (left, right) => left * SHIFT + right;

function mergeTable({ merges, continuing_subword_prefix }, vocabulary) {
  const skip = (continuing_subword_prefix ?? "").length;
  return new Map(merges.map((merge, rank) => {
    const [left, right] = typeof merge === "string" ? merge.split(" ") : merge;
    return [pair(vocabulary.get(left), vocabulary.get(right)), { rank, id: vocabulary.get(left + right.slice(skip)) }];
  }));
}

// Neighbours become one, the earliest learned merge first and the leftmost of equals.
function mergeAll(ids, table) {
  const next = ids.map((_, i) => (i + 1 < ids.length ? i + 1 : -1));
  const last = ids.map((_, i) => i - 1);
  const heap = new Heap((a, b) => a.rank < b.rank || (a.rank === b.rank && a.at < b.at));
  const consider = (at) => {
    const found = at >= 0 && next[at] >= 0 && table.get(pair(ids[at], ids[next[at]]));
    if (found) heap.push({ ...found, at });
  };
  ids.forEach((_, at) => consider(at));
  while (heap.items.length) {
    const { at, id } = heap.pop();
    const gone = ids[at] === null ? -1 : next[at];
    if (gone < 0 || table.get(pair(ids[at], ids[gone]))?.id !== id) continue; // something else was merged before
    ids[at] = id;
    ids[gone] = null;
    next[at] = next[gone];
    if (next[at] >= 0) last[next[at]] = at;
    consider(last[at]);
    consider(at);
  }
  return ids.filter((id) => id !== null);
}

function bytePairs(model, vocabulary) {
  const table = mergeTable(model, vocabulary);
  const unknown = vocabulary.get(model.unk_token);
  const spelt = (word) => {
    const ids = [];
    const letters = [...word];
    let open = false; // the last number stands for letters that are unknown
    letters.forEach((letter, i) => {
      const whole = (i ? model.continuing_subword_prefix ?? "" : "") + letter
        + (i + 1 === letters.length ? model.end_of_word_suffix ?? "" : "");
      const known = vocabulary.has(whole) ? [vocabulary.get(whole)] : model.byte_fallback ? fallback(whole, vocabulary) : null;
      if (known) ids.push(...known);
      else if (unknown !== undefined && !(open && model.fuse_unk)) ids.push(unknown);
      open = !known;
    });
    return ids;
  };
  return (word) => (model.ignore_merges && vocabulary.has(word) ? [vocabulary.get(word)] : mergeAll(spelt(word), table));
}

const UNKNOWN = 10; // an unknown letter scores so much less than the worst piece, as SentencePiece has it

// The pieces whose scores sum to the most (Viterbi); unknown letters in a row become one.
function unigram(model, vocabulary) {
  const scores = model.vocab.map(([, score]) => score);
  const worst = scores.reduce((a, b) => Math.min(a, b), Infinity) - UNKNOWN;
  const longest = model.vocab.reduce((most, [piece]) => Math.max(most, [...piece].length), 0);
  const best = (letters) => {
    const found = Array.from({ length: letters.length + 1 }, () => ({ score: -Infinity }));
    found[0] = { score: 0 };
    for (let start = 0; start < letters.length; start++) {
      let piece = "";
      for (let end = start + 1; end <= Math.min(letters.length, start + longest); end++) {
        piece += letters[end - 1];
        const id = vocabulary.get(piece) ?? (end === start + 1 ? model.unk_id : undefined);
        if (id === undefined) continue;
        const score = found[start].score + (vocabulary.has(piece) ? scores[id] : worst);
        if (score > found[end].score) found[end] = { score, id, start, piece };
      }
    }
    return found;
  };
  const known = ({ id, piece }) => {
    if (id !== model.unk_id) return [id];
    return vocabulary.has(piece) ? [vocabulary.get(piece)] : (model.byte_fallback && fallback(piece, vocabulary)) || [id];
  };
  return (text) => {
    const letters = [...text];
    const found = best(letters);
    const path = [];
    for (let end = letters.length; end > 0; end = found[end].start) {
      const one = found[end];
      if (one.id === undefined) throw new Error(`the vocabulary has no piece for ${JSON.stringify(letters[end - 1])}`);
      const after = path.at(-1);
      if (one.id === model.unk_id && after?.id === model.unk_id) after.piece = one.piece + after.piece;
      else path.push({ ...one });
    }
    return path.reverse().flatMap(known);
  };
}

export function vocabularyOf({ vocab }) {
  return new Map(Array.isArray(vocab) ? vocab.map(([piece], id) => [piece, id]) : Object.entries(vocab));
}

const MODELS = { WordPiece: wordPiece, WordLevel: wordLevel, BPE: bytePairs, Unigram: unigram };

export function modelOf(model, vocabulary) {
  return MODELS[model.type](model, vocabulary);
}
