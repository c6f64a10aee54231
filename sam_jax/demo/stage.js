// A click is a point, a drag is a box. Where they are in the picture follows from where the picture
// is on the screen at that moment.
const stage = () => element.querySelector(".stage");
let start = null;

function at(event) {
  const shown = stage().getBoundingClientRect();
  const along = (position, from, length, size) =>
    Math.min(Math.max(Math.floor((position - from) / length * size), 0), size - 1);
  return [
    along(event.clientX, shown.left, shown.width, props.width),
    along(event.clientY, shown.top, shown.height, props.height),
  ];
}

const dragged = (event) =>
  Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY) > 5;

// Shows what was just marked, until the answer comes and redraws all: a point, or a box between two
// places on the screen.
function showPending(to, from = null) {
  const pending = stage().querySelector(".pending"), shown = stage().getBoundingClientRect();
  const inside = (v, low, high) => Math.min(Math.max(v, low), high) - low;
  const x = inside(to.clientX, shown.left, shown.right);
  const y = inside(to.clientY, shown.top, shown.bottom);
  pending.className = from ? "pending" : "pending round";
  if (from) {
    const x0 = from.clientX - shown.left, y0 = from.clientY - shown.top;
    pending.style = `left: ${Math.min(x, x0)}px; top: ${Math.min(y, y0)}px;
      width: ${Math.abs(x - x0)}px; height: ${Math.abs(y - y0)}px`;
  } else pending.style = `left: ${x}px; top: ${y}px`;
  pending.hidden = false;
}

function hidePending() {
  stage().querySelector(".pending").hidden = true;
}

let fading;
function mark(name, data) {
  clearTimeout(fading);
  fading = setTimeout(hidePending, 10_000); // if no answer comes, but an error
  trigger(name, data);
}

element.addEventListener("pointerdown", (event) => {
  if (start || !event.isPrimary || ![0, 2].includes(event.button)) return;
  if (!props.picture || !event.target.closest(".stage")) return;
  event.preventDefault();
  stage().setPointerCapture(event.pointerId);
  start = {clientX: event.clientX, clientY: event.clientY, at: at(event)};
});
element.addEventListener("pointermove", (event) => {
  if (start && dragged(event)) showPending(event, start);
});
element.addEventListener("pointerup", (event) => {
  if (!start) return;
  showPending(event, dragged(event) ? start : null);
  const [x, y] = at(event);
  if (dragged(event)) mark("drag", {x0: start.at[0], y0: start.at[1], x1: x, y1: y});
  else mark("press", {x, y, right: event.button === 2 || event.ctrlKey});
  start = null;
});
element.addEventListener("pointercancel", () => {
  start = null;
  hidePending();
});
element.addEventListener("contextmenu", (event) => props.picture && event.preventDefault());

// By keyboard, a cross moves over the picture, in its pixels.
const MOVES = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
let cross = [0, 0], corner = null;

function moveCross(x, y) {
  cross = [Math.min(Math.max(x, 0), props.width - 1), Math.min(Math.max(y, 0), props.height - 1)];
  element.style.setProperty("--x", `${100 * (cross[0] + 0.5) / props.width}%`);
  element.style.setProperty("--y", `${100 * (cross[1] + 0.5) / props.height}%`);
}

function onScreen([x, y]) {
  const shown = stage().getBoundingClientRect();
  return {
    clientX: shown.left + (x + 0.5) / props.width * shown.width,
    clientY: shown.top + (y + 0.5) / props.height * shown.height,
  };
}

watch("picture", () => {
  moveCross(props.width >> 1, props.height >> 1);
  corner = null;
});
element.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const [x, y] = cross, letter = event.key.length === 1;
  const key = event.key === " " ? "Enter" : letter ? event.key.toLowerCase() : event.key;
  const step = Math.ceil(Math.max(props.width, props.height) / 200) * (event.shiftKey ? 10 : 1);
  if (!props.picture) {
    if (key !== "Enter") return;
    input().click();
  } else if (key in MOVES) moveCross(x + step * MOVES[key][0], y + step * MOVES[key][1]);
  else if (key === "Enter" || key === "b") mark("press", {x, y, right: key === "b"});
  else if (key === "x" && corner) {
    mark("drag", {x0: corner[0], y0: corner[1], x1: x, y1: y});
    corner = null;
  } else if (key === "x") corner = cross;
  else if (key === "Escape" && corner) {
    corner = null;
    hidePending();
  } else if (key === "Backspace") document.getElementById("undo").click();
  else return;
  event.preventDefault();
  if (corner) showPending(onScreen(cross), onScreen(corner));
});

// A file may be dropped anywhere; it goes the way of the button that opens one.
const input = () => document.querySelector("input[type=file]");
element.addEventListener("click", () => props.picture || input().click());
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  stage().classList.add("over");
});
document.addEventListener("dragleave", () => stage().classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  stage().classList.remove("over");
  if (!event.dataTransfer.files.length) return;
  input().files = event.dataTransfer.files;
  input().dispatchEvent(new Event("change", {bubbles: true}));
});
