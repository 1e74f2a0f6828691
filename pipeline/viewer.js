// One photo before and after, with a border between them to drag: shared by report.html and
// serve.html.  They have stage, frame, before, after, divider, slider and zoom, and set `photo`,
// whose size is [width, height].  data-share of the stage: how much of the window's height it gets.
const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

const stage = $("stage"), frame = $("frame"), slider = $("slider");
let photo = null, zoomed = false, drag = "";

function fit() {
  if (!photo) return;
  const [width, height] = photo.size, room = innerHeight * (stage.dataset.share || 0.72);
  const scale = zoomed ? 1 / devicePixelRatio : Math.min(stage.clientWidth / width, room / height);
  frame.style.width = `${width * scale}px`;
  frame.style.height = `${height * scale}px`;
  stage.style.height = `${Math.min(height * scale, room)}px`;
  split();
}

// The divider stands at the slider's share of what can be seen.
function split() {
  const seen = Math.min(stage.clientWidth, frame.clientWidth);
  const x = stage.scrollLeft + (slider.value / 100) * seen;
  $("after").style.clipPath = `inset(0 0 0 ${(100 * x) / frame.clientWidth}%)`;
  $("divider").style.left = `${x}px`;
}

function splitAt(clientX) {
  const left = Math.max(stage.getBoundingClientRect().left, frame.getBoundingClientRect().left);
  slider.value = (100 * (clientX - left)) / Math.min(stage.clientWidth, frame.clientWidth);
  split();
}

function zoom(event) {
  const box = frame.getBoundingClientRect();
  const at = event ? [event.clientX - box.left, event.clientY - box.top] : [box.width / 2, box.height / 2];
  const [x, y] = [at[0] / box.width, at[1] / box.height];
  zoomed = !zoomed;
  stage.classList.toggle("zoomed", zoomed);
  $("zoom").ariaPressed = String(zoomed);
  fit();
  stage.scrollTo(x * frame.clientWidth - stage.clientWidth / 2, y * frame.clientHeight - stage.clientHeight / 2);
  split();
}

stage.onpointerdown = (event) => {
  if (event.button) return;
  drag = zoomed && event.target !== $("divider") ? "pan" : "split";
  if (drag === "pan" && event.pointerType !== "mouse") drag = ""; // fingers scroll by themselves
  if (!drag) return;
  stage.setPointerCapture(event.pointerId);
  if (drag === "split") splitAt(event.clientX);
};
stage.onpointermove = (event) => {
  if (drag === "pan") stage.scrollBy(-event.movementX, -event.movementY);
  if (drag === "split") splitAt(event.clientX);
};
stage.onpointerup = stage.onpointercancel = () => { drag = ""; };
stage.ondblclick = zoom;
stage.onscroll = split;
slider.oninput = split;
onresize = fit;
$("zoom").onclick = () => zoom();
