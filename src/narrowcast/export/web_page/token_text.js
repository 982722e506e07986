// What a tokenizer.json does to a text before pieces are looked up: normalizers, and pre-tokenizers, which cut it.
// A part is {text, first}: first where it stands at the very start of what was typed, which Metaspace asks for.

const SPACE = "\\p{White_Space}"; // JavaScript's \s lacks U+0085 and has U+FEFF
const WORD = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}";
const utf8 = new TextEncoder();
const PUNCTUATION = /[!-/:-@[-`{-~]|\p{P}/gu;
const CHINESE = /[\u4E00-\u9FFF\u3400-\u4DBF\u{20000}-\u{2A6DF}\u{2A700}-\u{2B73F}\u{2B740}-\u{2B81F}\u{2B920}-\u{2CEAF}\uF900-\uFAFF\u{2F800}-\u{2FA1F}]/gu;
const GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

// Bytes as the visible characters that byte-level vocabularies are written in.
export const BYTES = (() => {
  let unseen = 0;
  return Array.from({ length: 256 }, (_, byte) => {
    const seen = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCharCode(seen ? byte : 256 + unseen++);
  });
})();

// The regular expressions of these files are Oniguruma's; what differs is rewritten, and export refuses the rest.
const CLASSES = { s: SPACE, S: "\\P{White_Space}", d: "\\p{Nd}" };
const literal = (text) => text.replace(/[^\p{L}\p{N}]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
const eitherCase = (body) => body.replace(/\p{L}/gu, (c) => `[${c.toLowerCase()}${c.toUpperCase()}]`);

export function expression(pattern) {
  if (pattern.String !== undefined) return new RegExp(literal(pattern.String), "gu");
  const source = pattern.Regex
    .replace(/\(\?i:([^()]*)\)/g, (_, body) => `(?:${eitherCase(body)})`)
    .replace(/\\p\{Han\}/g, "\\p{Script=Han}")
    .replace(/\\([^pPnrtux])/gu, (_, c) => CLASSES[c] ?? literal(c));
  return new RegExp(source, "gu");
}

const isControl = (c) => /[\p{Cc}\p{Cf}\p{Co}]/u.test(c) && !/[\t\n\r]/.test(c);

function bert(text, rules) {
  if (rules.clean_text) {
    text = [...text].filter((c) => c !== "\0" && c !== "\uFFFD" && !isControl(c)).join("").replace(/\p{White_Space}/gu, " ");
  }
  if (rules.handle_chinese_chars) text = text.replace(CHINESE, " $& ");
  if (rules.strip_accents ?? rules.lowercase) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
  return rules.lowercase ? lower(text) : text;
}

// Letter by letter: a sigma at the end of a word stays what it is elsewhere.
const lower = (text) => [...text].map((c) => c.toLowerCase()).join("");

const NORMALIZERS = {
  BertNormalizer: bert,
  Sequence: (text, { normalizers }) => normalizers.reduce(normalize, text),
  Lowercase: lower,
  NFC: (text) => text.normalize("NFC"),
  NFD: (text) => text.normalize("NFD"),
  NFKC: (text) => text.normalize("NFKC"),
  NFKD: (text) => text.normalize("NFKD"),
  StripAccents: (text) => text.replace(/\p{M}/gu, ""),
  Strip(text, { strip_left, strip_right }) {
    if (strip_left) text = text.replace(/^\p{White_Space}+/u, "");
    return strip_right ? text.replace(/\p{White_Space}+$/u, "") : text;
  },
  Prepend: (text, { prepend }) => (text ? prepend + text : text),
  Replace: (text, { pattern, content }) => text.replace(expression(pattern), () => content),
};

// SentencePiece's table of replacements: a double-array trie (Aoe 1989) over UTF-8, then the replacements themselves.
// As the tokenizers library walks it: by grapheme where that is short, else by letter; the shortest prefix decides.
function precompiled({ precompiled_charsmap }) {
  const bytes = Uint8Array.from(atob(precompiled_charsmap), (c) => c.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  const size = view.getUint32(0, true);
  const unit = (at) => view.getUint32(4 + 4 * at, true);
  const offset = (value) => (value >>> 10) << ((value & 512) >> 6);
  const start = (letters) => {
    let at = offset(unit(0));
    for (const byte of letters) {
      at ^= byte;
      const value = 4 * at < size ? unit(at) : 0;
      if ((value & 0x800000ff) !== byte) return -1;
      at ^= offset(value);
      if (value & 256) return unit(at) & 0x7fffffff;
    }
    return -1;
  };
  const replaced = (text) => {
    const found = start(utf8.encode(text));
    if (found < 0) return null;
    const from = 4 + size + found;
    return new TextDecoder("utf-8", { ignoreBOM: true }).decode(bytes.subarray(from, bytes.indexOf(0, from)));
  };
  const graphemes = new Intl.Segmenter("en", { granularity: "grapheme" });
  return (text) => Array.from(graphemes.segment(text), ({ segment }) => {
    const whole = utf8.encode(segment).length < 6 ? replaced(segment) : null;
    return whole ?? [...segment].map((letter) => replaced(letter) ?? letter).join("");
  }).join("");
}

const tables = new Map(); // opened tables of replacements by their text

NORMALIZERS.Precompiled = (text, rules) => {
  const key = rules.precompiled_charsmap ?? "";
  if (!key) return text;
  if (!tables.has(key)) tables.set(key, precompiled(rules));
  return tables.get(key)(text);
};

export function normalize(text, rules) {
  return rules ? NORMALIZERS[rules.type](text, rules) : text;
}

// A text cut at what the expression finds; the behaviours are those of the tokenizers library.
export function cut(text, wanted, behavior, invert = false) {
  let found = [];
  let end = 0;
  for (const match of text.matchAll(wanted)) {
    if (!match[0]) continue;
    if (match.index > end) found.push({ text: text.slice(end, match.index), hit: invert });
    found.push({ text: match[0], hit: !invert });
    end = match.index + match[0].length;
  }
  if (end < text.length) found.push({ text: text.slice(end), hit: invert });
  if (behavior === "Removed") found = found.filter(({ hit }) => !hit);
  if (behavior === "Contiguous") found = joined(found, (last, one) => last.hit === one.hit);
  if (behavior === "MergedWithPrevious") found = joined(found, (last, one) => one.hit && !last.end);
  if (behavior === "MergedWithNext") found = joined(found.reverse(), (last, one) => one.hit && !last.end, true).reverse();
  return found.map((one) => one.text);
}

// Neighbours put together where `fits(last, one)`; `end` marks a run whose last part was found.
function joined(parts, fits, backwards = false) {
  const out = [];
  for (const { text, hit } of parts) {
    const last = out.at(-1);
    if (last && fits(last, { text, hit })) {
      last.text = backwards ? text + last.text : last.text + text;
      last.end = hit;
    } else out.push({ text, hit, end: hit });
  }
  return out;
}

const word = new RegExp(`[${WORD}]+|[^${WORD}${SPACE}]+`, "gu");
const space = /\p{White_Space}/gu;
const gpt2 = expression({ Regex: GPT2 });
function metaspace({ text, first }, { replacement, prepend_scheme, add_prefix_space, split = true }) {
  const scheme = prepend_scheme ?? (add_prefix_space === false ? "never" : "always");
  let given = text.replaceAll(" ", replacement);
  if ((scheme === "always" || (scheme === "first" && first)) && !given.startsWith(replacement)) given = replacement + given;
  return split ? cut(given, expression({ String: replacement }), "MergedWithNext") : [given];
}

function byteLevel({ text }, { add_prefix_space, use_regex = true }) {
  const given = add_prefix_space && !text.startsWith(" ") ? ` ${text}` : text;
  const cuts = use_regex ? cut(given, gpt2, "Isolated") : [given];
  return cuts.map((one) => Array.from(utf8.encode(one), (byte) => BYTES[byte]).join(""));
}

const PRE_TOKENIZERS = {
  BertPreTokenizer: ({ text }) => cut(text, space, "Removed").flatMap((one) => cut(one, PUNCTUATION, "Isolated")),
  Whitespace: ({ text }) => text.match(word) ?? [],
  WhitespaceSplit: ({ text }) => cut(text, space, "Removed"),
  Punctuation: ({ text }, { behavior }) => cut(text, PUNCTUATION, behavior ?? "Isolated"),
  Digits: ({ text }, { individual_digits }) => cut(text, /\p{N}/gu, individual_digits ? "Isolated" : "Contiguous"),
  Split: ({ text }, { pattern, behavior, invert }) => cut(text, expression(pattern), behavior, invert),
  Metaspace: metaspace,
  ByteLevel: byteLevel,
};

export function preTokenize(parts, rules) {
  if (!rules) return parts;
  if (rules.type === "Sequence") return rules.pretokenizers.reduce(preTokenize, parts);
  return parts.flatMap((part) =>
    PRE_TOKENIZERS[rules.type](part, rules).filter(Boolean).map((text, i) => ({ text, first: part.first && i === 0 })));
}
