// Runs ONNX files in ONNX Runtime's WebAssembly under Node.js, interleaved, and tells answers and CPU time per run.
// Standard input: {runtime, output, batches: [feeds], models: {name: file}, rounds, milliseconds};
// standard output: {name: {answers: [[number]], cpu: [milliseconds of CPU time per run, round by round]} or {error}}.
import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const text = [];
for await (const chunk of process.stdin) text.push(chunk);
const { runtime, output, batches, models, rounds, milliseconds } = JSON.parse(Buffer.concat(text).toString());

const folder = pathToFileURL(`${runtime}/`).href;
const ort = await import(`${folder}ort.wasm.min.mjs`);
ort.env.logLevel = "error";
ort.env.wasm.numThreads = 1;
ort.env.wasm.wasmPaths = folder;

const tensors = (feeds) => Object.fromEntries(Object.entries(feeds).map(([name, { type, data, dims }]) => [
  name, new ort.Tensor(type, type.endsWith("int64") ? data.map(BigInt) : data, dims),
]));
const given = batches.map(tensors);
const sessions = {}, found = {};
for (const [name, file] of Object.entries(models)) {
  try {
    sessions[name] = await ort.InferenceSession.create(new Uint8Array(await readFile(file)), { executionProviders: ["wasm"] });
    const answers = [];
    for (const inputs of given) {
      const got = await sessions[name].run(inputs, [output]);
      answers.push(Array.from(got[output].data, Number));
    }
    found[name] = { answers, cpu: [] };
  } catch (error) {
    delete sessions[name];
    found[name] = { error: String(error?.message ?? error) };
  }
}
const spent = () => { const { user, system } = process.cpuUsage(); return (user + system) / 1000; };
for (let round = 0; round < rounds; round += 1) {
  for (const [name, session] of Object.entries(sessions)) {
    const started = spent();
    let runs = 0;
    while (runs < 3 || spent() - started < milliseconds) {
      await session.run(given[0], [output]);
      runs += 1;
    }
    found[name].cpu.push((spent() - started) / runs);
  }
}
process.stdout.write(JSON.stringify(found), () => process.exit(0));
