// A tokenizer.json: text -> ids, and ids -> text. What the page knows of these files is listed in web_tokenizer.py.
import { modelOf, vocabularyOf } from "./token_models.js";
import { BYTES, expression, normalize, preTokenize } from "./token_text.js";

// Added tokens are found before anything else is done, the longest first; the rest goes on as text.
function finder(tokens, contentOf) {
  if (!tokens.length) return (part) => (part.text ? [part] : []);
  const byContent = new Map(tokens.map((token) => [contentOf(token), token]));
  const ordered = [...byContent.keys()].filter(Boolean).sort((a, b) => b.length - a.length);
  const wanted = new RegExp(ordered.map((text) => expression({ String: text }).source).join("|"), "gu");
  return ({ text, first }) => {
    const parts = [];
    let end = 0;
    for (const match of ordered.length ? text.matchAll(wanted) : []) {
      const token = byContent.get(match[0]);
      const stop = match.index + match[0].length;
      if (token.single_word && (/[\p{L}\p{N}\p{M}\p{Pc}]$/u.test(text.slice(0, match.index)) || /^[\p{L}\p{N}\p{M}\p{Pc}]/u.test(text.slice(stop)))) continue;
      const before = text.slice(end, match.index);
      const kept = token.lstrip ? before.replace(/\p{White_Space}+$/u, "") : before;
      if (kept) parts.push({ text: kept, first: first && end === 0 });
      parts.push({ id: token.id });
      end = stop + (token.rstrip ? text.slice(stop).match(/^\p{White_Space}*/u)[0].length : 0);
    }
    if (end < text.length) parts.push({ text: text.slice(end), first: first && end === 0 });
    return parts;
  };
}

// The ids that every text stands between.
function frame(processor) {
  const none = { before: [], after: [] };
  if (!processor || processor.type === "ByteLevel") return none;
  if (processor.type === "Sequence") {
    return processor.processors.map(frame).reduce((inner, outer) => ({
      before: [...outer.before, ...inner.before], after: [...inner.after, ...outer.after],
    }), none);
  }
  if (processor.type !== "TemplateProcessing") return { before: [processor.cls[1]], after: [processor.sep[1]] };
  const ids = processor.single.map((part) => part.SpecialToken && processor.special_tokens[part.SpecialToken.id].ids);
  const at = ids.indexOf(undefined);
  return { before: ids.slice(0, at).flat(), after: ids.slice(at + 1).flat() };
}

const lenient = new TextDecoder("utf-8", { ignoreBOM: true }); // a byte order mark is a letter like any other
const strict = new TextDecoder("utf-8", { ignoreBOM: true, fatal: true });
const BYTE_OF = new Map(BYTES.map((character, byte) => [character, byte]));

function ofBytes(bytes) {
  try {
    return strict.decode(Uint8Array.from(bytes));
  } catch {
    return "\uFFFD".repeat(bytes.length);
  }
}

function byteFallback(tokens) {
  const out = [];
  let bytes = [];
  const flush = () => { if (bytes.length) out.push(ofBytes(bytes)); bytes = []; };
  for (const token of tokens) {
    const found = /^<0x([0-9A-Fa-f]{2})>$/.exec(token);
    if (found) bytes.push(parseInt(found[1], 16));
    else { flush(); out.push(token); }
  }
  flush();
  return out;
}

function stripped(token, { content, start, stop }) {
  let from = 0;
  let to = token.length;
  while (from < start && token.startsWith(content, from)) from += content.length;
  for (let i = 0; i < stop && to > from && token.slice(0, to).endsWith(content); i++) to -= content.length;
  return token.slice(from, to);
}

// English as it is written, where every sign is a word of its own.
const tidied = (text) => text.replaceAll(/ ([.?!,])/g, "$1").replaceAll(" ' ", "'").replaceAll(/ (n't|'m|'s|'ve|'re)/g, "$1")
  .replaceAll(" do not", " don't");

const DECODERS = {
  Sequence: (tokens, { decoders }) => decoders.reduce(decoded, tokens),
  ByteLevel(tokens) {
    const bytes = tokens.flatMap((token) => {
      const found = [...token].map((c) => BYTE_OF.get(c));
      return found.includes(undefined) ? [...new TextEncoder().encode(token)] : found;
    });
    return [lenient.decode(Uint8Array.from(bytes))];
  },
  ByteFallback: byteFallback,
  Fuse: (tokens) => [tokens.join("")],
  Replace: (tokens, { pattern, content }) => tokens.map((token) => token.replace(expression(pattern), () => content)),
  Strip: (tokens, rules) => tokens.map((token) => stripped(token, rules)),
  Metaspace: (tokens, { replacement, prepend_scheme, add_prefix_space }) => tokens.map((token, i) => {
    const drop = i === 0 && prepend_scheme !== "never" && add_prefix_space !== false;
    return token.replaceAll(replacement, drop ? "" : " ");
  }),
  WordPiece: (tokens, { prefix, cleanup }) => tokens.map((token, i) => {
    const whole = i && token.startsWith(prefix) ? token.slice(prefix.length) : (i ? " " : "") + token;
    return cleanup ? tidied(whole) : whole;
  }),
  BPEDecoder: (tokens, { suffix }) => tokens.map((token, i) => token.replaceAll(suffix, i + 1 < tokens.length ? " " : "")),
};

function decoded(tokens, rules) {
  return DECODERS[rules.type](tokens, rules);
}

export function tokenizer(table) {
  const vocabulary = vocabularyOf(table.model);
  const added = table.added_tokens ?? [];
  const raw = finder(added.filter((token) => !token.normalized), (token) => token.content);
  const clean = finder(added.filter((token) => token.normalized), (token) => normalize(token.content, table.normalizer));
  const pieces = modelOf(table.model, vocabulary);
  const names = new Map([...vocabulary].map(([piece, id]) => [id, piece]));
  for (const token of added) names.set(token.id, token.normalized ? normalize(token.content, table.normalizer) : token.content);
  const special = new Set(added.filter((token) => token.special).map((token) => token.id));
  const words = (part) => preTokenize([part], table.pre_tokenizer).flatMap(({ text }) => pieces(text));
  const { before, after } = frame(table.post_processor);
  return {
    before, after, special,
    // The ids of the text alone.
    ids(text) {
      return (text ? raw({ text, first: true }) : [])
        .flatMap((part) => (part.id === undefined ? clean({ ...part, text: normalize(part.text, table.normalizer) }) : [part]))
        .flatMap((part) => (part.id === undefined ? words(part) : [part.id]));
    },
    name: (id) => names.get(id),
    decode(ids) {
      const tokens = ids.filter((id) => names.has(id) && !special.has(id)).map((id) => names.get(id));
      return table.decoder ? decoded(tokens, table.decoder).join("") : tokens.join(" ");
    },
  };
}
