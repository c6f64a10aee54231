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

const dragged = (event) => Math.hypot(event.clientX - start.x, event.clientY - start.y) > 5;

// Shows what was just marked, until the answer comes and redraws all.
function showPending(event) {
  const pending = stage().querySelector(".pending"), shown = stage().getBoundingClientRect();
  const round = !dragged(event);
  const inside = (v, low, high) => Math.min(Math.max(v, low), high) - low;
  const x = inside(event.clientX, shown.left, shown.right);
  const y = inside(event.clientY, shown.top, shown.bottom);
  const x0 = start.x - shown.left, y0 = start.y - shown.top;
  pending.className = round ? "pending round" : "pending";
  pending.style = round ? `left: ${x}px; top: ${y}px`
    : `left: ${Math.min(x, x0)}px; top: ${Math.min(y, y0)}px;
       width: ${Math.abs(x - x0)}px; height: ${Math.abs(y - y0)}px`;
  pending.hidden = false;
}

function hidePending() {
  stage().querySelector(".pending").hidden = true;
}

element.addEventListener("pointerdown", (event) => {
  if (start || !event.isPrimary || ![0, 2].includes(event.button)) return;
  if (!props.picture || !event.target.closest(".stage")) return;
  event.preventDefault();
  stage().setPointerCapture(event.pointerId);
  start = {x: event.clientX, y: event.clientY, at: at(event)};
});
element.addEventListener("pointermove", (event) => {
  if (start && dragged(event)) showPending(event);
});
element.addEventListener("pointerup", (event) => {
  if (!start) return;
  showPending(event);
  setTimeout(hidePending, 10_000); // if no answer comes, but an error
  const [x, y] = at(event);
  if (dragged(event)) trigger("drag", {x0: start.at[0], y0: start.at[1], x1: x, y1: y});
  else trigger("press", {x, y, right: event.button === 2 || event.ctrlKey});
  start = null;
});
element.addEventListener("pointercancel", () => {
  start = null;
  hidePending();
});
element.addEventListener("contextmenu", (event) => props.picture && event.preventDefault());

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
