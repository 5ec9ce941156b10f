// One view of several pictures of the same shape: they are zoomed and moved together, by pointer, touch and keyboard.
// `element` outlives a change of the value; what stands in it does not, so it is looked up each time.
const MAX_ZOOM = 16;
const view = { zoom: 1, x: 0, y: 0 };
const pointers = new Map();
let dividing = false;

const find = (selector) => element.querySelector(selector);
const between = (value, low, high) => Math.min(Math.max(value, low), high);

// The zoom at which a pixel of the largest picture is a pixel of the screen.
function pixelZoom() {
  const widths = [...element.querySelectorAll("img")].map((img) => Number(img.getAttribute("width")));
  return Math.max(...widths) / (find(".frame").clientWidth * window.devicePixelRatio);
}

function show() {
  const frame = find(".frame");
  if (!frame) return;
  view.x = between(view.x, frame.clientWidth * (1 - view.zoom), 0);
  view.y = between(view.y, frame.clientHeight * (1 - view.zoom), 0);
  element.style.setProperty("--zoom", view.zoom);
  element.style.setProperty("--x", `${view.x}px`);
  element.style.setProperty("--y", `${view.y}px`);
  find(".stage").style.touchAction = view.zoom > 1 ? "none" : "pan-y";
  find(".level").textContent = `${Math.round((100 * view.zoom) / pixelZoom())} %`;
}

// (x, y) in the frame, in pixels of the screen, stays where it is.
function zoomTo(zoom, x, y) {
  const frame = find(".frame");
  if (!frame) return;
  x ??= frame.clientWidth / 2;
  y ??= frame.clientHeight / 2;
  zoom = between(zoom, 1, Math.max(MAX_ZOOM, 4 * pixelZoom()));
  view.x = x - ((x - view.x) * zoom) / view.zoom;
  view.y = y - ((y - view.y) * zoom) / view.zoom;
  view.zoom = zoom;
  show();
}

function divideAt(clientX) {
  const box = find(".frame").getBoundingClientRect();
  const range = find(".divide input");
  range.value = (100 * (clientX - box.left)) / box.width;
  range.dispatchEvent(new Event("input", { bubbles: true }));
}

function placeIn(event) {
  const frame = event.target.closest(".frame") ?? find(".frame");
  const box = frame.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function fit() {
  Object.assign(view, { zoom: 1, x: 0, y: 0 });
  show();
}

const actions = {
  in: () => zoomTo(view.zoom * 1.5),
  out: () => zoomTo(view.zoom / 1.5),
  fit,
  pixels: () => zoomTo(pixelZoom()),
};
const keys = { "+": actions.in, "=": actions.in, "-": actions.out, 0: actions.fit, 1: actions.pixels };
const arrows = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };

element.addEventListener("click", (event) => actions[event.target.closest("[data-do]")?.dataset.do]?.());
element.addEventListener("input", (event) => {
  if (event.target.closest(".divide")) element.style.setProperty("--divider", `${event.target.value}%`);
});
element.addEventListener("keydown", (event) => {
  if (!event.target.closest(".stage") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key in keys) keys[event.key]();
  else if (event.key in arrows && view.zoom > 1) {
    view.x += 40 * arrows[event.key][0];
    view.y += 40 * arrows[event.key][1];
    show();
  } else return;
  event.preventDefault();
});
element.addEventListener("dblclick", (event) => {
  if (!event.target.closest(".stage")) return;
  if (view.zoom > 1) fit();
  else zoomTo(Math.max(pixelZoom(), 2), ...placeIn(event));
});
element.addEventListener(
  "wheel",
  (event) => {
    // The wheel alone scrolls the page; with Ctrl, which a pinch on a touchpad also sends, it zooms.
    if (!event.ctrlKey || !event.target.closest(".stage")) return;
    event.preventDefault();
    zoomTo(view.zoom * Math.exp(-event.deltaY / 200), ...placeIn(event));
  },
  { passive: false },
);
element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".stage") || event.button !== 0) return;
  dividing = Boolean(event.target.closest(".handle")) || (view.zoom === 1 && find(".divide") !== null);
  pointers.set(event.pointerId, event);
  event.target.setPointerCapture(event.pointerId);
  if (dividing && pointers.size === 1) divideAt(event.clientX);
});
element.addEventListener("pointermove", (event) => {
  const last = pointers.get(event.pointerId);
  if (!last) return;
  const others = [...pointers.values()].filter((pointer) => pointer.pointerId !== event.pointerId);
  if (others.length === 1) {
    const distance = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    zoomTo((view.zoom * distance(event, others[0])) / Math.max(distance(last, others[0]), 1), ...placeIn(event));
  } else if (dividing) {
    divideAt(event.clientX);
  } else {
    view.x += event.clientX - last.clientX;
    view.y += event.clientY - last.clientY;
    show();
  }
  pointers.set(event.pointerId, event);
});
for (const end of ["pointerup", "pointercancel"]) {
  element.addEventListener(end, (event) => pointers.delete(event.pointerId));
}
new ResizeObserver(show).observe(element);
watch("value", () => {
  element.style.setProperty("--divider", "50%");
  fit();
});
fit();
