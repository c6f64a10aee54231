// An image with a mask, points and a box. A click adds a point, a drag a box, and keys do both.
// Three callbacks handle them:
//   onPoint({x, y, background}), with background true for the right button and the key B,
//   onBox({x0, y0, x1, y1}), between any two opposite corners, and onUndo().
// Coordinates are whole pixels of the image, whatever size it is shown at.
export function makeStage(element, {onPoint, onBox, onUndo}) {
  const add = (tag, name) => {
    const made = document.createElement(tag);
    made.className = name;
    return element.appendChild(made);
  };
  element.classList.add("stage");
  element.tabIndex = 0;
  element.setAttribute("role", "application");
  element.setAttribute("aria-label", "Your image. Arrow keys move a crosshair, faster with Shift; " +
    "Enter adds a foreground point, B a background point, X marks a box corner; Backspace undoes.");
  const image = add("img", "image"), mask = add("img", "mask"), box = add("div", "box");
  const points = add("div", "points"), pending = add("div", "pending"), cross = add("div", "cross");
  image.alt = "Your image";
  mask.alt = "The mask";
  image.draggable = mask.draggable = false;
  box.hidden = pending.hidden = mask.hidden = true;
  let width = 1, height = 1;

  const percent = (target, places) => {
    for (const [side, [value, size]] of Object.entries(places))
      target.style[side] = `${100 * value / size}%`;
  };
  const atPixel = (target, x, y) =>
    percent(target, {left: [x + 0.5, width], top: [y + 0.5, height]});

  // Shows a state: image and mask (URLs or null), width, height, points ([x, y, label], label 1
  // foreground, 0 background), box ([x0, y0, x1, y1] or null).
  function show(state) {
    if (state.image) {
      ({width, height} = state);
      image.src = state.image;
      element.style.setProperty("--width", width);
      element.style.setProperty("--height", height);
      moveCross(width >> 1, height >> 1);
      corner = null;
    }
    if (state.mask) mask.src = state.mask;
    else mask.removeAttribute("src");
    mask.hidden = !state.mask;
    points.replaceChildren(...state.points.map(([x, y, label]) => {
      const point = document.createElement("i");
      point.className = `label${label}`;
      atPixel(point, x, y);
      return point;
    }));
    box.hidden = !state.box;
    if (state.box) {
      const [x0, y0, x1, y1] = state.box;
      percent(box, {left: [x0, width], top: [y0, height]});
      percent(box, {width: [x1 + 1 - x0, width], height: [y1 + 1 - y0, height]});
    }
    if (!corner) pending.hidden = true;
  }

  // By mouse, pen or finger; `start` is where it went down.
  let start = null;

  function at(event) {
    const shown = element.getBoundingClientRect();
    const along = (position, from, length, size) =>
      Math.min(Math.max(Math.floor((position - from) / length * size), 0), size - 1);
    return [
      along(event.clientX, shown.left, shown.width, width),
      along(event.clientY, shown.top, shown.height, height),
    ];
  }

  const dragged = (event) => Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY)
    > (event.pointerType === "touch" ? 12 : 5);

  // Shows a new point, or a box between two points, until the answer arrives and redraws all.
  function showPending([x, y], [x0, y0] = [x, y]) {
    const round = x === x0 && y === y0;
    pending.className = round ? "pending round" : "pending";
    pending.style.width = pending.style.height = "";
    if (round) atPixel(pending, x, y);
    else {
      percent(pending, {left: [Math.min(x, x0), width], top: [Math.min(y, y0), height]});
      percent(pending, {width: [Math.abs(x - x0), width], height: [Math.abs(y - y0), height]});
    }
    pending.hidden = false;
  }

  function hidePending() {
    pending.hidden = true;
  }

  element.addEventListener("pointerdown", (event) => {
    if (start || !event.isPrimary || ![0, 2].includes(event.button)) return;
    if (event.pointerType === "mouse") event.preventDefault(); // selects nothing
    element.focus({preventScroll: true, focusVisible: false});
    element.setPointerCapture(event.pointerId);
    start = {clientX: event.clientX, clientY: event.clientY, at: at(event)};
  });
  element.addEventListener("pointermove", (event) => {
    if (start && dragged(event)) showPending(at(event), start.at);
  });
  element.addEventListener("pointerup", (event) => {
    if (!start) return;
    const [x, y] = at(event), [x0, y0] = start.at, isBox = dragged(event);
    start = null;
    showPending([x, y], isBox ? [x0, y0] : undefined);
    if (isBox) onBox({x0, y0, x1: x, y1: y});
    else onPoint({x, y, background: event.button === 2 || event.ctrlKey});
  });
  element.addEventListener("pointercancel", () => { // the browser scrolls instead
    start = null;
    hidePending();
  });
  element.addEventListener("contextmenu", (event) => event.preventDefault());

  // Arrow keys move a crosshair over the image; `corner` is the first corner of a box.
  const MOVES = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]};
  let place = [0, 0], corner = null;

  function moveCross(x, y) {
    place = [Math.min(Math.max(x, 0), width - 1), Math.min(Math.max(y, 0), height - 1)];
    atPixel(cross, ...place);
  }

  element.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const [x, y] = place, letter = event.key.length === 1;
    const key = event.key === " " ? "Enter" : letter ? event.key.toLowerCase() : event.key;
    const step = Math.ceil(Math.max(width, height) / 200) * (event.shiftKey ? 10 : 1);
    if (key in MOVES) moveCross(x + step * MOVES[key][0], y + step * MOVES[key][1]);
    else if (key === "Enter" || key === "b") {
      showPending(place);
      onPoint({x, y, background: key === "b"});
    } else if (key === "x" && corner) {
      onBox({x0: corner[0], y0: corner[1], x1: x, y1: y});
      corner = null;
    } else if (key === "x") corner = place;
    else if (key === "Escape" && corner) {
      corner = null;
      hidePending();
    } else if (key === "Backspace") onUndo();
    else return;
    event.preventDefault();
    if (corner) showPending(place, corner);
  });

  return {show, hidePending};
}
