// Runs models in ONNX Runtime's WebAssembly outside of a browser: what fails here would fail on the page.
// Standard input: {runtime, output, feeds, models: {name: file}}; standard output: {name: {data} or {error}}.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const text = [];
for await (const chunk of process.stdin) text.push(chunk);
const { runtime, output, feeds, models } = JSON.parse(Buffer.concat(text).toString());

const folder = pathToFileURL(`${runtime}/`).href;
const ort = await import(`${folder}ort.wasm.min.mjs`);
ort.env.logLevel = "error";
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = folder;

const inputs = Object.fromEntries(Object.entries(feeds).map(([name, { type, data, dims }]) => [
  name, new ort.Tensor(type, type === "float16" ? Uint16Array.from(data) : type.endsWith("int64") ? data.map(BigInt) : data, dims),
]));
const answers = {};
for (const [name, file] of Object.entries(models)) {
  try {
    const session = await ort.InferenceSession.create(new Uint8Array(await readFile(file)), { executionProviders: ["wasm"] });
    const given = await session.run(inputs, [output]);
    const { type, data } = given[output];
    const half = type === "float16"; // as bits, in both directions
    answers[name] = { half, data: Array.from(half ? new Uint16Array(data.buffer, data.byteOffset, data.length) : data, Number) };
    await session.release();
  } catch (error) {
    answers[name] = { error: String(error?.message ?? error) };
  }
}
process.stdout.write(JSON.stringify(answers), () => process.exit(0));
