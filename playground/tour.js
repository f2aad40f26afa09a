// The tour: five questions, each for the reader to answer before the page does.

import { columns, rows, split } from "./model.js";
import { mean, setBlock, show, state, update } from "./app.js";

const $ = (id) => document.getElementById(id);
const ANSWERS = ["predicted", "true", "error", "colors", "predicted-colors", "neighbors",
  "summary"];
let smaller = null; // the mean error of the third question's block

/** A block in the middle of the grid, a fraction of its sides. */
function central(fraction) {
  const [height, width] = [rows, columns].map((side) => Math.max(1, Math.round(fraction * side)));
  return { row: Math.floor((rows - height) / 2), column: Math.floor((columns - width) / 2),
    height, width };
}

/** Mean errors of the block's patches on its rim and inside it. */
function rimAndInside() {
  const { row, column, height, width } = state.block, rim = [], inside = [];
  split(state.block).hidden.forEach((n, i) => {
    const r = Math.floor(n / columns) - row, c = n % columns - column;
    const onRim = r === 0 || c === 0 || r === height - 1 || c === width - 1;
    (onRim ? rim : inside).push(state.answer.error[i]);
  });
  return [mean(rim), mean(inside)];
}

const count = () => [split(state.block).hidden.length, split(state.block).seen.length];
const error = () => mean(state.answer.error), usual = () => mean(state.answer.usual_error);

// Each: the block's share of a side, the weights, what is covered until one looks, what is asked,
// and what there is to see, with the numbers of the answer.
const STEPS = [{
  title: "What is left?", block: 0.5, weights: "trained", cover: ["context", ...ANSWERS],
  ask: () => `The image is cut into ${rows} × ${columns} patches, and the marked block is hidden.
    How many patches does the encoder get, and what does it get in place of the others?`,
  look: () => `It gets ${count()[1]} patches, each with its position, and nothing in place of the
    others: they are removed before the first layer.`,
}, {
  title: "What is hidden?", block: 0.5, weights: "trained", cover: ANSWERS,
  ask: () => `Look at what the encoder sees. What belongs in the gap: which colors, which edges,
    which part of an object?`,
  look: () => `The predictor has given a feature for each hidden patch, never a pixel. To make it
    visible, each place shows the patch of other images whose feature is nearest. "True features"
    does the same with the features of the hidden patches themselves: what differs from the image
    there already is the gallery's doing, not the predictor's.`,
}, {
  title: "Where is it hard?", block: 0.5, weights: "trained", cover: ["error", "summary"],
  ask: () => `Where will the prediction be most wrong: at the rim of the block, next to what was
    seen, or inside it?`,
  look: () => {
    const [rim, inside] = rimAndInside();
    smaller = error();
    return `Here the mean error is ${show(rim)} at the rim and ${show(inside)} inside. One image
      says little: move the block, choose other images, and see whether that holds.`;
  },
}, {
  title: "How much can be hidden?", block: 0.75, weights: "trained", cover: ANSWERS,
  ask: () => `Now ${count()[0]} patches are hidden and ${count()[1]} are left. By how much will the
    error rise? And at what error would the context be of no use?`,
  look: () => `The mean error is ${show(error())}; it was ${show(smaller)} for the smaller block.
    The mean feature of each place, an answer without a look at the image, has an error of
    ${show(usual())}: there, the context is of no use.`,
}, {
  title: "What was learned?", block: 0.5, weights: "untrained", cover: ANSWERS,
  ask: () => `Now the same networks answer with the weights that they had before training. What
    will the predicted patches look like? And which panels need no training at all?`,
  look: () => `Untrained, the mean error is ${show(error())}; the mean feature of each place has
    ${show(usual())}. Look also at the true features and the nearest images: how much of that does
    an untrained encoder give? Switch between the two: only what is better with the trained
    weights was learned.`,
}];

function cover(ids) {
  for (const id of ["context", ...ANSWERS]) $(id).classList.toggle("covered", ids.includes(id));
}

/** Show a title and a text, the buttons Look and End or not, and what the next button does. */
function say(title, text, { asking = false, next, then }) {
  $("tour-title").textContent = title;
  $("tour-text").textContent = text;
  $("tour-look").hidden = !asking;
  $("tour-next").hidden = asking;
  $("tour-next").textContent = next;
  $("tour-next").onclick = then;
}

function go(number) {
  const step = STEPS[number];
  $("tour-end").hidden = !step;
  cover(step?.cover ?? []);
  state.weights = step?.weights ?? "trained";
  if (step) setBlock(central(step.block));
  update();
  if (!step) {
    return say("Five questions", "That was the tour. Ask your own: other images, other blocks.",
      { next: "Start again", then: () => go(0) });
  }
  const title = `${number + 1} of ${STEPS.length}: ${step.title}`;
  say(title, step.ask(), { asking: true });
  $("tour-look").onclick = async () => {
    await update();
    cover([]);
    const last = number + 1 === STEPS.length;
    say(title, step.look(), { next: last ? "Finish" : "Next question", then: () => go(number + 1) });
    $("tour-next").focus();
  };
  $("tour-look").focus();
}

$("tour-next").onclick = () => go(0);
$("tour-end").onclick = () => go(STEPS.length);
