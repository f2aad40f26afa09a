// The page: an image, a hidden block, and what the model answers.

import { about, ask, columns, rows, sketch, split } from "./model.js";
import {
  canvas, drawColors, drawContext, drawErrors, drawFromSheet, drawPatches, drawSketch,
} from "./draw.js";

const $ = (id) => document.getElementById(id);
const SIDES = ["row", "column", "height", "width"];
const SKETCHES = 8;
const FIRST = { row: 1, column: 1, height: 0, width: 0 }; // people count rows from 1
const picture = canvas(); // the image that is asked about
const [row, column, height, width] = about.block;
export const state = { block: { row, column, height, width }, weights: "trained", answer: null };

// --- the answer ----------------------------------------------------------------------------------

export const mean = (list) => list.reduce((sum, x) => sum + x, 0) / list.length;
export const show = (x) => x.toFixed(3);

/** The answer in words, which screen readers say. */
function describe() {
  const { block, answer } = state, { hidden, seen } = split(block);
  const span = (from, length) => (length > 1 ? `${from + 1} to ${from + length}` : `${from + 1}`);
  return `${hidden.length} patches hidden (row ${span(block.row, block.height)}, ` +
    `column ${span(block.column, block.width)}), ${seen.length} seen. ` +
    `Mean error of the prediction ${show(mean(answer.error))}; of the mean feature of each ` +
    `place, which does not look at the image, ${show(mean(answer.usual_error))}. ` +
    `Answered in ${Math.round(answer.milliseconds)} ms.`;
}

/** The canvas of a panel, with what it shows in words. */
function panel(id, words) {
  const element = $(id).querySelector("canvas");
  element.ariaLabel = words;
  return element;
}

function drawAnswer() {
  const { block, answer } = state, image = picture.canvas;
  drawPatches(panel("predicted", "The image; hidden patches filled by what was predicted"),
    image, block, answer.predicted_patches);
  drawPatches(panel("true", "The image; hidden patches filled by their true features"),
    image, block, answer.true_patches);
  const [least, most] = [Math.min, Math.max].map((pick) => show(pick(...answer.error)));
  drawErrors(panel("error", `Errors of the hidden patches, from ${least} to ${most}`),
    image, block, answer.error);
  drawColors(panel("colors", "A color for the feature of each patch"), answer.colors, block);
  drawColors(panel("predicted-colors", "The same; in the block, the predicted features"),
    answer.colors, block, answer.predicted_colors);
  $("neighbors").querySelector("div").replaceChildren(...answer.images.map((i) => {
    const context = canvas(), number = about.examples + i;
    drawFromSheet(context, number);
    context.canvas.role = "img";
    context.canvas.title = about.labels[number] ?? `gallery image ${i + 1}`;
    return context.canvas;
  }));
  $("numbers").tBodies[0].replaceChildren(...split(block).hidden.map((n, i) => tableRow(
    Math.floor(n / columns) + 1,
    [n % columns + 1, show(answer.error[i]), show(answer.usual_error[i])])));
  $("sketches").querySelector("div").replaceChildren(); // those of another question
  $("summary").textContent = describe();
}

/** Sketch the hidden block anew, from the prediction alone. */
async function drawSketches() {
  await waiting; // the answer to what is asked now
  const { answer, block } = state;
  const drawn = await sketch(block, answer.condition, SKETCHES);
  if (answer !== state.answer) return; // the question has changed meanwhile
  $("sketches").querySelector("div").replaceChildren(...drawn.map((pixels, s) => {
    const context = canvas();
    drawSketch(context.canvas, picture.canvas, block, pixels);
    Object.assign(context.canvas, { role: "img", ariaLabel: `Sketch ${s + 1}` });
    return context.canvas;
  }));
}

function tableRow(name, cells) {
  const line = document.createElement("tr"), head = document.createElement("th");
  head.textContent = name;
  line.append(head);
  for (const text of cells) line.insertCell().textContent = text;
  return line;
}

let waiting = null; // the update that is running: it repeats until nothing has changed meanwhile
let changed = false;

/** Show the question at once, and its answer as soon as it is there. */
export function update() {
  const { block } = state, style = document.documentElement.style;
  const most = { row: rows - block.height, column: columns - block.width,
    height: rows - 1, width: columns - 1 };
  for (const name of SIDES) {
    const whole = name === "row" || name === "height" ? rows : columns;
    style.setProperty(`--${name}`, `${(100 * block[name]) / whole}%`);
    $(name).max = most[name] + FIRST[name];
    $(name).value = block[name] + FIRST[name];
    $(name).nextElementSibling.textContent = $(name).value;
  }
  drawContext($("context").querySelector("canvas"), picture.canvas, block);
  document.querySelector(`[name=weights][value=${state.weights}]`).checked = true;
  changed = true;
  waiting ??= answerAll().catch((error) => {
    $("summary").textContent = `The model could not answer: ${error.message}`;
    throw error;
  }).finally(() => { waiting = null; });
  return waiting;
}

async function answerAll() {
  while (changed) {
    changed = false;
    const image = picture.getImageData(0, 0, picture.canvas.width, picture.canvas.height);
    state.answer = await ask(image, state.block, state.weights);
    if (!changed) drawAnswer();
  }
}

// --- the hidden block ----------------------------------------------------------------------------

/** Change some of the block's row, column, height and width; it stays on the grid. */
export function setBlock(changes) {
  const block = { ...state.block, ...changes };
  const clamp = (x, least, most) => Math.max(least, Math.min(x, most));
  block.height = clamp(block.height, 1, rows - 1);
  block.width = clamp(block.width, 1, columns - 1);
  block.row = clamp(block.row, 0, rows - block.height);
  block.column = clamp(block.column, 0, columns - block.width);
  if (SIDES.some((name) => block[name] !== state.block[name])) {
    state.block = block;
    update();
  }
}

/** Where a pointer is, in patches: row, column. */
function toPatches(event) {
  const box = $("image").getBoundingClientRect();
  return [((event.clientY - box.top) / box.height) * rows,
    ((event.clientX - box.left) / box.width) * columns];
}

$("block").addEventListener("pointerdown", (down) => {
  down.preventDefault();
  const resize = down.target === $("handle"), from = toPatches(down), start = state.block;
  const move = (event) => {
    const [y, x] = toPatches(event).map((place, axis) => Math.round(place - from[axis]));
    if (!resize) return setBlock({ row: start.row + y, column: start.column + x });
    setBlock({ height: Math.min(start.height + y, rows - start.row),
      width: Math.min(start.width + x, columns - start.column) });
  };
  $("block").setPointerCapture(down.pointerId);
  $("block").addEventListener("pointermove", move);
  $("block").addEventListener("lostpointercapture",
    () => $("block").removeEventListener("pointermove", move), { once: true });
});

for (const name of SIDES) {
  $(name).addEventListener("input", () => setBlock({ [name]: $(name).value - FIRST[name] }));
}

// --- weights and images --------------------------------------------------------------------------

for (const radio of document.getElementsByName("weights")) {
  radio.addEventListener("change", () => {
    state.weights = radio.value;
    $("summary").textContent = "Loading the model …";
    update();
  });
}

/** Ask about what was drawn into `picture`: an example, by its button, or an image of one's own. */
function usePicture(words, button) {
  for (const other of $("examples").children) other.ariaPressed = String(other === button);
  canvas($("image")).drawImage(picture.canvas, 0, 0);
  $("image").ariaLabel = words;
  update();
}

function useExample(i) {
  const button = $("examples").children[i];
  drawFromSheet(picture, i);
  usePicture(button.ariaLabel, button);
}

$("upload").addEventListener("change", async () => {
  const [file] = $("upload").files, { width, height } = picture.canvas;
  if (!file) return;
  try {
    const whole = await createImageBitmap(file), side = Math.min(whole.width, whole.height);
    const square = await createImageBitmap(whole, (whole.width - side) / 2,
      (whole.height - side) / 2, side, side,
      { resizeWidth: width, resizeHeight: height, resizeQuality: "high" });
    canvas(picture.canvas).drawImage(square, 0, 0);
    usePicture("Your image", null);
  } catch {
    $("summary").textContent = `${file.name} cannot be read as an image; try a PNG or JPEG file.`;
  }
});

// --- the page ------------------------------------------------------------------------------------

for (const figure of $("panels").children) {
  const frame = document.createElement("div"), outline = document.createElement("div");
  frame.className = "frame";
  outline.className = "outline";
  frame.append(canvas().canvas, outline);
  frame.firstChild.role = "img";
  figure.append(frame);
}
panel("context", "The image without its hidden patches");
$("sketches").hidden = !about.steps;
$("sketch").addEventListener("click", drawSketches);
$("gallery").textContent = about.images - about.examples;
for (const [name, text] of Object.entries(about.facts)) {
  const term = document.createElement("dt"), value = document.createElement("dd");
  term.textContent = name;
  value.textContent = text;
  $("facts").append(term, value);
}
for (const [name, ...cells] of about.errors) {
  $("errors").tBodies[0].append(tableRow(name, cells.map(show)));
}
for (let i = 0; i < about.examples; i++) {
  const button = document.createElement("button"), context = canvas();
  drawFromSheet(context, i);
  button.append(context.canvas);
  button.ariaLabel = `Example ${i + 1}${about.labels[i] ? `: ${about.labels[i]}` : ""}`;
  button.addEventListener("click", () => useExample(i));
  $("examples").append(button);
}
useExample(0);
