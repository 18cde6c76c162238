// Turns the head in the browser: its views from many sides are parts of a few pictures ("sheets"), which are here
// before anyone drags. The server is asked for the exact view only once the head rests, and after edits.
//
// props.value: {version, view, yaw, pitch, sheets: [{picture, yaws, pitches, size}]}; see session.py.
// The stage's class `live` says that a sheet's view is shown, `exact` that it is the exact one of the angles and edits
// at hand; data-views counts the views that are here.
const DEGREES_PER_WIDTH = 90, KEY_STEP = 3, REST = 250, REST_EDITS = 500, REST_TILT = 600;
const stage = element.querySelector(".stage"), picture = stage.querySelector("img"), canvas = stage.querySelector("canvas");
const tiltButton = stage.querySelector(".tilt"), fullButton = stage.querySelector(".full");
const context = canvas.getContext("2d");
const panel = element.closest("#turn") ?? element.parentElement;
const input = (axis) => panel.querySelector(`#${axis} input[type=range]`);

let version = 0, viewUrl = null, exact = null, pose = { yaw: 0, pitch: 0 };
let sheets = [], wanted = [], drag = null, writing = false, asking = false, frame = 0, timer = 0;

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const canTurn = () => input("yaw") !== null && viewUrl !== null;
const same = (a, b) => a !== null && Math.abs(a.yaw - b.yaw) < 0.3 && Math.abs(a.pitch - b.pitch) < 0.3;
const mark = () => stage.classList.toggle("exact", drag === null && timer === 0 && !asking && same(exact, pose));

// The nearest view of all sheets that are here.
function nearest() {
  let best = null;
  for (const { bitmap, yaws, pitches, size } of sheets)
    for (const [row, pitch] of pitches.entries())
      for (const [column, yaw] of yaws.entries()) {
        const distance = Math.hypot(yaw - pose.yaw, pitch - pose.pitch);
        if (best === null || distance < best.distance) best = { distance, bitmap, size, row, column };
      }
  return best;
}

function draw() {
  frame = 0;
  const best = same(exact, pose) ? null : nearest();
  stage.classList.toggle("live", best !== null);
  if (best === null) return;
  const { bitmap, size, row, column } = best;
  if (canvas.width !== size) canvas.width = canvas.height = size;
  context.drawImage(bitmap, column * size, row * size, size, size, 0, 0, size, size);
}

function describe() {
  // Heads of a 2D model have one side: then this is a picture and nothing to take hold of.
  const turns = canTurn();
  stage.classList.toggle("still", !turns);
  stage.tabIndex = turns ? 0 : -1;
  if (turns) stage.setAttribute("role", "slider");
  else stage.removeAttribute("role");
  const side = (value, positive, negative) => `${Math.abs(value)}° ${value >= 0 ? positive : negative}`;
  stage.setAttribute("aria-valuenow", pose.yaw);
  stage.setAttribute("aria-valuetext", `turned ${side(pose.yaw, "right", "left")}, tilted ${side(pose.pitch, "down", "up")}`);
}

// Gradio learns of a slider's value by the event that a visitor's hand would send.
function writeSlider(axis) {
  const slider = input(axis);
  if (slider === null || Number(slider.value) === pose[axis]) return;
  writing = true;
  slider.value = pose[axis];
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  writing = false;
}

function turnTo(yaw, pitch, rest) {
  const limit = (axis, value) => {
    const slider = input(axis);
    return clamp(Math.round(2 * value) / 2, Number(slider.min), Number(slider.max));
  };
  const next = { yaw: limit("yaw", yaw), pitch: limit("pitch", pitch) };
  if (next.yaw === pose.yaw && next.pitch === pose.pitch) return;
  pose = next;
  writeSlider("yaw");
  writeSlider("pitch");
  describe();
  mark();
  frame ||= requestAnimationFrame(draw);
  if (rest !== null) settle(rest);
  // Before the first sheet is here, views are asked for while the head is being turned, one after the other.
  else if (sheets.length === 0) settle(100, false);
}

function settle(delay, restart = true) {
  if (timer && !restart) return;
  clearTimeout(timer);
  timer = setTimeout(() => {
    timer = 0;
    asking = true;
    trigger("release");
  }, delay);
  mark();
}

async function load(sheet) {
  const image = new Image();
  image.src = sheet.picture.url;
  await image.decode();
  return { ...sheet, bitmap: await createImageBitmap(image) };
}

// Loads sheets that are not here yet. During a drag nothing is fetched.
async function loadSheets() {
  if (drag !== null) return;
  const urls = new Set(wanted.map((sheet) => sheet.picture.url));
  for (const sheet of sheets) if (!urls.has(sheet.picture.url)) sheet.bitmap.close();
  sheets = sheets.filter((sheet) => urls.has(sheet.picture.url));
  for (const sheet of wanted) {
    if (sheet.loading || sheets.some((loaded) => loaded.picture.url === sheet.picture.url)) continue;
    sheet.loading = true;
    try {
      const loaded = await load(sheet);
      if (wanted.some((other) => other.picture.url === sheet.picture.url)) sheets.push(loaded);
    } catch {
      sheet.loading = false; // The next message tries again.
    }
  }
  stage.dataset.views = sheets.reduce((sum, { yaws, pitches }) => sum + yaws.length * pitches.length, 0);
}

async function showView(value) {
  const { url } = value.view, next = { yaw: value.yaw, pitch: value.pitch };
  const loaded = new Image();
  loaded.src = url;
  await loaded.decode().catch(() => {});
  if (viewUrl !== url) return;
  picture.src = url;
  picture.hidden = false;
  exact = next;
  asking = false;
  mark();
  frame ||= requestAnimationFrame(draw);
}

function update() {
  const value = props.value;
  // A message that was overtaken by a newer one, of the head before for example, changes nothing.
  if (!value || typeof value !== "object" || value.version <= version) return;
  version = value.version;
  const known = new Map(wanted.map((sheet) => [sheet.picture.url, sheet]));
  wanted = value.sheets.map((sheet) => known.get(sheet.picture.url) ?? { ...sheet });
  loadSheets();
  if (value.view.url === viewUrl) return;
  const next = { yaw: value.yaw, pitch: value.pitch };
  const moved = drag !== null || timer !== 0;
  viewUrl = value.view.url;
  asking = true; // Until it is shown.
  mark();
  if (!moved || value.head !== stage.dataset.head) {
    pose = next;
    describe();
  }
  stage.dataset.head = value.head;
  showView(value);
}

stage.addEventListener("pointerdown", (event) => {
  if (!canTurn() || event.button !== 0 || event.target.closest("button")) return;
  stage.focus({ preventScroll: true });
  if (event.pointerType !== "touch") event.preventDefault();
  stage.setPointerCapture(event.pointerId);
  drag = { x: event.clientX, y: event.clientY, ...pose, width: stage.clientWidth, touch: event.pointerType === "touch" };
  stage.classList.add("turning");
});
stage.addEventListener("pointermove", (event) => {
  if (drag === null) return;
  const scale = DEGREES_PER_WIDTH / drag.width;
  // A finger that moves up or down scrolls the page.
  const pitch = drag.touch ? drag.pitch : drag.pitch + (event.clientY - drag.y) * scale;
  turnTo(drag.yaw + (event.clientX - drag.x) * scale, pitch, null);
});
for (const name of ["pointerup", "pointercancel"])
  stage.addEventListener(name, () => {
    if (drag === null) return;
    drag = null;
    stage.classList.remove("turning");
    if (!same(exact, pose)) settle(0);
    mark();
    loadSheets();
  });

stage.addEventListener("keydown", (event) => {
  const step = event.shiftKey ? 0.5 : KEY_STEP;
  const moves = {
    ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step],
    PageUp: [0, -15], PageDown: [0, 15], Home: [-180, 0], End: [180, 0],
  };
  const move = moves[event.key];
  if (!move || !canTurn() || event.target !== stage || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  turnTo(pose.yaw + move[0], pose.pitch + move[1], REST);
});

// A wheel that turns sideways, or any wheel once the head has been touched; otherwise it scrolls the page.
stage.addEventListener("wheel", (event) => {
  const sideways = Math.abs(event.deltaX) > Math.abs(event.deltaY) || event.shiftKey;
  if (!canTurn() || event.ctrlKey || !(sideways || document.activeElement === stage)) return;
  event.preventDefault();
  const unit = event.deltaMode === 0 ? 0.1 : 3;
  turnTo(pose.yaw + unit * (Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : event.deltaY), pose.pitch, REST);
}, { passive: false });

panel.addEventListener("input", (event) => {
  if (writing || !(event.target instanceof HTMLInputElement) || event.target.value === "") return;
  const number = Number(event.target.value);
  if (event.target.closest("#yaw")) turnTo(number, pose.pitch, REST);
  else if (event.target.closest("#pitch")) turnTo(pose.yaw, number, REST);
  else if (event.target.closest(".edits")) settle(REST_EDITS);
});

fullButton.addEventListener("click", () => {
  if (document.fullscreenElement) document.exitFullscreen();
  else stage.requestFullscreen();
});
fullButton.hidden = !document.fullscreenEnabled;

// Turning the device turns the head, where there is a sensor and its owner wants it.
let level = null;
function tilt(event) {
  if (!stage.isConnected) return window.removeEventListener("deviceorientation", tilt);
  if (event.gamma === null || !canTurn() || drag !== null) return;
  level ??= { gamma: event.gamma, beta: event.beta, ...pose };
  const yaw = level.yaw + event.gamma - level.gamma, pitch = level.pitch + event.beta - level.beta;
  // A hand is never still.
  if (Math.hypot(yaw - pose.yaw, pitch - pose.pitch) > 1) turnTo(yaw, pitch, REST_TILT);
}
tiltButton.hidden = !(
  "DeviceOrientationEvent" in window && matchMedia("(pointer: coarse)").matches
  && !matchMedia("(prefers-reduced-motion: reduce)").matches
);
tiltButton.addEventListener("click", async () => {
  const on = tiltButton.getAttribute("aria-pressed") !== "true";
  if (on && DeviceOrientationEvent.requestPermission && (await DeviceOrientationEvent.requestPermission()) !== "granted") return;
  tiltButton.setAttribute("aria-pressed", on);
  level = null;
  (on ? window.addEventListener : window.removeEventListener)("deviceorientation", tilt);
});

// Gradio makes the sliders in its own time, after the first view too.
new MutationObserver(() => {
  if (canTurn() === stage.classList.contains("still")) describe();
}).observe(panel, { childList: true, subtree: true });

watch("value", update);
update();
