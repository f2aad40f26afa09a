// Pictures: every panel is a canvas of the image's own pixels, enlarged by the style sheet.

import { about, columns, rows, sheet, split } from "./model.js";

const p = about.patch, width = columns * p, height = rows * p;
const WORST = 0.5; // the error at the end of the color scale, which style.css shows
const SCALE = [[252, 253, 191], [254, 159, 109], [222, 73, 104], [140, 41, 129], [59, 15, 112]];

/** The empty context of a canvas of an image's size; without an element, of a new one. */
export function canvas(element = document.createElement("canvas")) {
  if (element.width !== width || element.height !== height) {
    Object.assign(element, { width, height });
  }
  const context = element.getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, width, height);
  return context;
}

/** The left and the top edge of patch number `n`, in pixels. */
function corner(n) {
  return [(n % columns) * p, Math.floor(n / columns) * p];
}

/** The left and the top edge of image number `i` in the sheet. */
function cornerInSheet(i) {
  return [(i % about.columns) * width, Math.floor(i / about.columns) * height];
}

/** Draw image number `i` of the sheet. */
export function drawFromSheet(context, i) {
  context.drawImage(sheet, ...cornerInSheet(i), width, height, 0, 0, width, height);
}

function fill(context, n, color) {
  context.fillStyle = `rgb(${color.map(Math.round).join(" ")})`;
  context.fillRect(...corner(n), p, p);
}

/** The color of an error, from light to dark. */
function heat(error) {
  const t = Math.min(error / WORST, 1) * (SCALE.length - 1);
  const i = Math.min(Math.floor(t), SCALE.length - 2);
  return SCALE[i].map((from, c) => from + (t - i) * (SCALE[i + 1][c] - from));
}

/** The image without its hidden patches. */
export function drawContext(element, image, block) {
  const context = canvas(element);
  context.drawImage(image, 0, 0);
  for (const n of split(block).hidden) context.clearRect(...corner(n), p, p);
  return context;
}

/** The context, and in each hidden place a patch of the gallery, by its number. */
export function drawPatches(element, image, block, patches) {
  const context = drawContext(element, image, block), N = rows * columns;
  split(block).hidden.forEach((place, i) => {
    const [x, y] = cornerInSheet(about.examples + Math.floor(patches[i] / N));
    const [left, top] = corner(patches[i] % N);
    context.drawImage(sheet, x + left, y + top, p, p, ...corner(place), p, p);
  });
}

/** The context, and in the hidden block the pixels of a sketch, [3 * H * W] from 0 to 1. */
export function drawSketch(element, image, block, pixels) {
  const context = drawContext(element, image, block), area = pixels.length / 3;
  const sketch = context.createImageData(block.width * p, block.height * p);
  for (let n = 0; n < area; n++) {
    for (let c = 0; c < 3; c++) sketch.data[4 * n + c] = 255 * pixels[c * area + n];
    sketch.data[4 * n + 3] = 255;
  }
  context.putImageData(sketch, block.column * p, block.row * p);
}

/** The error of each hidden patch, on a pale image. */
export function drawErrors(element, image, block, errors) {
  const context = canvas(element);
  context.globalAlpha = 0.3;
  context.drawImage(image, 0, 0);
  context.globalAlpha = 1;
  split(block).hidden.forEach((n, i) => fill(context, n, heat(errors[i])));
}

/** Colors of all tokens, [N * 3] from 0 to 1; those of the block replaced if others are given. */
export function drawColors(element, colors, block, inBlock) {
  const context = canvas(element);
  const color = (list, i) => list.slice(3 * i, 3 * i + 3).map((x) => 255 * x);
  for (let n = 0; n < rows * columns; n++) fill(context, n, color(colors, n));
  if (inBlock) split(block).hidden.forEach((n, i) => fill(context, n, color(inBlock, i)));
}
