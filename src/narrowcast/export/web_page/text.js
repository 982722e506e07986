// A text as token ids: WordPiece as tokenizer.json of BERT's family has it, or single characters of a vocabulary.

const isControl = (c) => /\p{C}/u.test(c) && !/[\t\n\r]/.test(c);
const isPunctuation = (c) => /[!-/:-@[-`{-~]|\p{P}/u.test(c);
const CHINESE = /[\u4E00-\u9FFF\u3400-\u4DBF\u{20000}-\u{2A6DF}\u{2A700}-\u{2B73F}\u{2B740}-\u{2B81F}\u{2B820}-\u{2CEAF}\uF900-\uFAFF\u{2F800}-\u{2FA1F}]/gu;

function normalize(text, rules) {
  if (!rules) return text;
  if (rules.clean_text) {
    text = [...text].filter((c) => c !== "\0" && c !== "\uFFFD" && !isControl(c)).join("").replace(/\s/gu, " ");
  }
  if (rules.handle_chinese_chars) text = text.replace(CHINESE, " $& ");
  if (rules.strip_accents ?? rules.lowercase) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
  return rules.lowercase ? text.toLowerCase() : text;
}

function words(text) {
  const found = [];
  for (const part of text.split(/\s+/u).filter(Boolean)) {
    let word = "";
    for (const c of part) {
      if (!isPunctuation(c)) { word += c; continue; }
      if (word) found.push(word);
      found.push(c);
      word = "";
    }
    if (word) found.push(word);
  }
  return found;
}

// The longest piece of the vocabulary at every position; a word that cannot be spelt so is unknown as a whole.
function pieces(word, model) {
  const letters = [...word];
  const ids = [];
  for (let start = 0; start < letters.length;) {
    let end = letters.length;
    const prefix = start ? model.continuing_subword_prefix : "";
    while (end > start && !Object.hasOwn(model.vocab, prefix + letters.slice(start, end).join(""))) end--;
    if (end === start || letters.length > model.max_input_chars_per_word) return [model.vocab[model.unk_token]];
    ids.push(model.vocab[prefix + letters.slice(start, end).join("")]);
    start = end;
  }
  return ids;
}

export function wordPiece(tokenizer, limit) {
  const { before, after } = frame(tokenizer.post_processor);
  return (text) => {
    const ids = words(normalize(text, tokenizer.normalizer)).flatMap((word) => pieces(word, tokenizer.model));
    return [...before, ...ids.slice(0, limit - before.length - after.length), ...after];
  };
}

// The ids that every text stands between.
function frame(processor) {
  if (!processor) return { before: [], after: [] };
  if (processor.type === "BertProcessing") return { before: [processor.cls[1]], after: [processor.sep[1]] };
  const ids = processor.single.map((part) => part.SpecialToken && processor.special_tokens[part.SpecialToken.id].ids);
  const at = ids.indexOf(undefined);
  return { before: ids.slice(0, at).flat(), after: ids.slice(at + 1).flat() };
}

export function characters(vocabulary, limit) {
  const start = "<s>" in vocabulary ? [vocabulary["<s>"]] : [];
  return (text) => {
    const ids = [...text].filter((c) => Object.hasOwn(vocabulary, c)).map((c) => vocabulary[c]);
    return [...start, ...ids].slice(-limit);
  };
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
  if (ask.kinds) feeds[ask.kinds.name] = tensor(row.map(() => 0), ask.kinds);
  return feeds;
}

export async function make(place, ask, changed, failed) {
  const table = await (await fetch(ask.vocabulary)).json();
  const encode = (ask.tokens === "characters" ? characters : wordPiece)(table, ask.limit);
  const boxes = Array.from({ length: ask.texts }, (_, i) => {
    const label = document.createElement("label");
    label.textContent = ask.texts === 1 ? "Text" : `Text ${i + 1}`;
    const box = document.createElement("textarea");
    box.id = `text-${i + 1}`;
    box.value = ask.examples[i] ?? "";
    label.append(box);
    place.append(label);
    return box;
  });
  const said = document.createElement("p");
  said.className = "quiet";
  place.append(said);
  let waiting;
  const soon = () => { clearTimeout(waiting); waiting = setTimeout(changed, 300); };
  for (const box of boxes) box.addEventListener("input", soon);
  return {
    read() {
      if (boxes.some((box) => !box.value.trim())) return null;
      const ids = boxes.map((box) => encode(box.value));
      if (ids.some((row) => !row.length)) { failed("No character of this text is in the model's vocabulary."); return null; }
      said.textContent = `${ids.map((row) => row.length).join(" and ")} tokens, of at most ${ask.limit}`;
      return ids.map((row) => feed(row, ask));
    },
    begin: changed,
  };
}
