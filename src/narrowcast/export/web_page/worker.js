// Holds the sessions of ONNX Runtime, away from the page, which stays free to answer the user.
import { fromHalf, toHalf } from "./half.js";
import * as ort from "./runtime/ort.wasm.min.mjs";

ort.env.logLevel = "error";
ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
// Threads share memory, which browsers allow only to pages that the server isolates from other origins.
ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;

const LONGEST = 6000; // milliseconds of one measurement
const FEWEST = 3; // runs per model, however slow it is
const sessions = {};

async function download(file, bytes, progress) {
  const response = await fetch(file);
  if (!response.ok) throw new Error(`${file}: the server answered ${response.status}`);
  const whole = new Uint8Array(bytes);
  let at = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    if (at + value.length > bytes) throw new Error(`${file} is longer than the ${bytes} bytes that page.json states`);
    whole.set(value, at);
    at += value.length;
    progress(at / bytes);
  }
  if (at !== bytes) throw new Error(`${file} has ${at} bytes, and page.json states ${bytes}; copy the page again`);
  return whole;
}

async function open({ name, file, bytes }, progress) {
  const model = await download(file, bytes, progress);
  sessions[name] = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  return { version: ort.env.versions.web, threads: ort.env.wasm.numThreads };
}

function tensors(feeds) {
  return Object.fromEntries(
    Object.entries(feeds).map(([name, { type, data, dims }]) => [name, new ort.Tensor(type, type === "float16" ? toHalf(data) : data, dims)]),
  );
}

function numbers({ type, data }) {
  return type === "float16" ? fromHalf(new Uint16Array(data.buffer, data.byteOffset, data.length)) : data;
}

// The output, or of it one row along the last axis but one; and how long the model took, without what is done around it.
async function run({ name, feeds, output, row }) {
  const inputs = tensors(feeds);
  const before = performance.now();
  const given = (await sessions[name].run(inputs, [output]))[output];
  const ms = performance.now() - before;
  const data = numbers(given);
  const width = given.dims[given.dims.length - 1];
  if (row === undefined) return { data: Array.from(data, Number), dims: [...given.dims], ms };
  return { data: Float32Array.from(data.subarray(row * width, (row + 1) * width), Number), dims: [1, width], ms };
}

const median = (values) => {
  const sorted = [...values].sort((a, b) => a - b);
  const half = sorted.length >> 1;
  return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
};

// The models in turns, so that whatever else the device does meets all of them alike.
async function time({ names, feeds, output, runs, warmup }) {
  const inputs = tensors(feeds);
  const spent = Object.fromEntries(names.map((name) => [name, []]));
  for (let i = 0; i < warmup; i++) for (const name of names) await sessions[name].run(inputs, [output]);
  const start = performance.now();
  for (let i = 0; i < runs && (i < FEWEST || performance.now() - start < LONGEST); i++) {
    for (const name of names) {
      const before = performance.now();
      await sessions[name].run(inputs, [output]);
      spent[name].push(performance.now() - before);
    }
  }
  return Object.fromEntries(names.map((name) => [name, { median: median(spent[name]), runs: spent[name].length }]));
}

const TASKS = { open, run, time };
let last = Promise.resolve(); // one task after another: a session runs one thing at a time

self.onmessage = ({ data: { id, task, argument } }) => {
  last = last.then(async () => {
    try {
      const progress = (share) => self.postMessage({ id, share });
      self.postMessage({ id, result: await TASKS[task](argument, progress) });
    } catch (error) {
      self.postMessage({ id, error: String(error?.message ?? error) });
    }
  });
};
