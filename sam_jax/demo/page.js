// The page's buttons and its requests to the server. stage.js handles the image.
import {makeStage} from "./stage.js";

const $ = (id) => document.getElementById(id);
const candidates = [...document.querySelectorAll("#candidates input")];
let session = null; // this tab's token, which the server sends with the first image
let name = "image"; // of the image file, without its extension
let shown = null; // the server's last answer
let finding = null; // aborts everything mode

const stage = makeStage($("stage"), {
  onPoint: ({x, y, background}) => {
    const label = document.querySelector("#label input:checked").value;
    change("point", {x, y, label: background ? 0 : +label});
  },
  onBox: (box) => change("box", box),
  onUndo: () => $("undo").click(),
});

let fading;
function tell(error) {
  if (error.name === "AbortError") return;
  stage.hidePending();
  $("alert").textContent = error.name === "TypeError" ? "The server cannot be reached." : error.message;
  $("alert").hidden = false;
  clearTimeout(fading);
  fading = setTimeout(() => { $("alert").hidden = true; }, 12_000);
}
$("alert").onclick = () => { $("alert").hidden = true; };

async function ask(path, body = {}, signal = undefined) {
  const isFile = body instanceof Blob;
  const headers = {"Content-Type": isFile ? "application/octet-stream" : "application/json"};
  if (session) headers["X-Session"] = session;
  const request = {method: "POST", headers, body: isFile ? body : JSON.stringify(body), signal};
  const response = await fetch(path, request);
  if (response.ok) return response;
  const {error} = await response.json().catch(() => ({error: `Server error ${response.status}.`}));
  if (response.status === 410) update(null);
  throw new Error(error);
}

function update(state) {
  shown = state;
  $("stage").hidden = !state;
  $("drop").hidden = Boolean(state);
  if (state) stage.show(state);
  else session = null;
  const scores = state?.scores ?? [], marked = Boolean(state && (state.points.length || state.box));
  // A predicted IoU may be slightly above 1.
  const texts = scores.map((score) => Math.min(score, 1).toFixed(2));
  candidates.forEach((candidate, i) => {
    candidate.disabled = i >= scores.length;
    candidate.checked = i < scores.length && i === state.chosen;
    candidate.nextElementSibling.textContent = texts[i] ?? "–";
  });
  $("next").disabled = scores.length < 2;
  $("undo").disabled = !marked;
  $("clear").disabled = !marked && !state?.found;
  $("png").disabled = $("json").disabled = !state?.mask;
  $("all").disabled = !state;
}

// Requests run one after the other, so that each click sees the result of the one before.
let last = Promise.resolve();
function inTurn(work) {
  last = last.then(work).catch(tell);
  return last;
}

function change(path, body = {}) {
  finding?.abort();
  return inTurn(async () => update(await (await ask(path, body)).json()));
}

function open(file) {
  if (!file) return;
  const most = +document.body.dataset.maxBytes;
  if (file.size > most) {
    tell(new Error(`The file has ${(file.size / 1e6).toFixed(1)} MB; the limit is ${most / 1e6} MB.`));
    return;
  }
  inTurn(async () => {
    $("status").textContent = "Opening …";
    try {
      const state = await (await ask("open", file)).json();
      finding?.abort();
      session = state.session;
      name = file.name.replace(/\.[^.]*$/, "") || "image";
      update(state);
    } finally {
      $("status").textContent = "";
    }
  });
}

async function findEverything() {
  const mine = finding = new AbortController();
  $("all").disabled = true;
  $("status").textContent = "Waiting for other visitors …";
  const poll = setInterval(async () => {
    const answer = await ask("progress", {}, mine.signal).catch(() => null);
    const [done, total] = answer ? await answer.json() : [0, 0];
    if (finding === mine && total) $("status").textContent = `Everything: ${done} of ${total} steps`;
  }, 500);
  try {
    const answer = await ask("everything", {points_per_side: +$("side").value}, mine.signal);
    update(await answer.json());
  } catch (error) {
    tell(error);
  } finally {
    clearInterval(poll);
    finding = null;
    $("all").disabled = !shown;
    $("status").textContent = "";
  }
}

function save(kind) {
  return inTurn(async () => {
    const link = document.createElement("a");
    link.download = `${name}_${shown.found ? "everything" : "mask"}.${kind}`;
    link.href = URL.createObjectURL(await (await ask(`save.${kind}`)).blob());
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
  });
}

$("undo").onclick = () => change("undo");
$("clear").onclick = () => change("clear");
$("next").onclick = () => change("choose", {candidate: (shown.chosen + 1) % shown.scores.length});
candidates.forEach((candidate, i) => { candidate.onchange = () => change("choose", {candidate: i}); });
$("all").onclick = findEverything;
$("png").onclick = () => save("png");
$("json").onclick = () => save("json");
$("side").oninput = () => { $("points").textContent = $("side").value; };
document.addEventListener("keydown", (event) => {
  if (!(event.ctrlKey || event.metaKey) || event.shiftKey || event.key.toLowerCase() !== "z") return;
  event.preventDefault();
  $("undo").click();
});

$("opener").onclick = $("drop").onclick = () => $("file").click();
$("file").onchange = () => {
  open($("file").files[0]);
  $("file").value = ""; // the same file may be opened again
};
const canvas = document.querySelector(".canvas");
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  canvas.classList.add("over");
});
document.addEventListener("dragleave", () => canvas.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  canvas.classList.remove("over");
  open(event.dataTransfer.files[0]);
});
