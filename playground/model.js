// The model: what `python -m extras.playground` exported, run by onnxruntime-web on the CPU.

import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";

ort.env.wasm.numThreads = 1; // more need headers that a plain web server does not send

export const about = await (await fetch("built/about.json")).json();
export const [rows, columns] = about.grid;

export const sheet = new Image(); // all images, row by row; the first ones are the examples
sheet.src = "built/sheet.png";
await sheet.decode();

const sessions = {};

/** The session of the "trained" or "untrained" weights, loaded when first asked for. */
function session(weights) {
  sessions[weights] ??= ort.InferenceSession.create(`built/${weights}.onnx`);
  return sessions[weights];
}

/** The raster indices of the patches in a block, and of all others. */
export function split({ row, column, height, width }) {
  const hidden = [], seen = [];
  for (let i = 0; i < rows * columns; i++) {
    const r = Math.floor(i / columns), c = i % columns;
    const inside = r >= row && r < row + height && c >= column && c < column + width;
    (inside ? hidden : seen).push(i);
  }
  return { hidden, seen };
}

function indices(list, shape) {
  return new ort.Tensor("int64", BigInt64Array.from(list, BigInt), shape);
}

function allReal(list, shape) { // nothing is padded: there is one image
  return new ort.Tensor("bool", new Uint8Array(list.length).fill(1), shape);
}

/** Ask the model: ImageData of an image and its hidden block -> what extras.playground.Answer
    returns, as arrays of numbers, and the milliseconds it took. */
export async function ask(image, block, weights) {
  const { hidden, seen } = split(block);
  const area = image.width * image.height, pixels = new Float32Array(3 * area);
  for (let i = 0; i < area; i++) { // RGBA, pixel by pixel -> channel by channel
    for (let c = 0; c < 3; c++) pixels[c * area + i] = image.data[4 * i + c] / 255;
  }
  const model = await session(weights);
  const start = performance.now();
  const outputs = await model.run({
    pixels: new ort.Tensor("float32", pixels, [1, 3, image.height, image.width]),
    context: indices(seen, [1, seen.length]),
    context_valid: allReal(seen, [1, seen.length]),
    targets: indices(hidden, [1, 1, hidden.length]),
    targets_valid: allReal(hidden, [1, 1, hidden.length]),
  });
  const answer = { milliseconds: performance.now() - start };
  for (const name in outputs) answer[name] = Array.from(outputs[name].data, Number);
  return answer;
}

/** A random number from a normal distribution (Box and Muller). */
function gaussian() {
  return Math.sqrt(-2 * Math.log(1 - Math.random())) * Math.cos(2 * Math.PI * Math.random());
}

/** Draw `count` sketches of a hidden block from an answer's condition: for each, its pixels,
    [3 * H * W] from 0 to 1. */
export async function sketch(block, condition, count, noise = gaussian) {
  const { hidden } = split(block), p = about.patch;
  const shape = [count, about.channels, block.height * p, block.width * p];
  const float = (list, shape) => new ort.Tensor("float32", Float32Array.from(list), shape);
  const targets = indices(hidden, [1, 1, hidden.length]);
  const given = float(condition, [1, condition.length]);
  let x = float(Array.from({ length: shape.reduce((a, b) => a * b) }, noise), shape);
  let pixels;
  for (let step = 0; step < about.steps; step++) {
    const model = await session("sketcher"), t = float([step / about.steps], [1, 1]);
    ({ next: x, pixels } = await model.run({ x, t, condition: given, targets }));
  }
  const each = pixels.data.length / count;
  return Array.from({ length: count }, (_, s) => pixels.data.slice(s * each, (s + 1) * each));
}
