// The brush of paint.py: draws strokes here, sends the painted tokens when the pointer is lifted.

const KEYS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const HELP = "Arrow keys move over the tokens, the space bar paints or erases.";

// JupyterLab takes an arrow or a letter for a shortcut of its own, and goes to another cell, unless
// what has the focus says otherwise by this attribute. That goes for all of the explorer, list and
// buttons, too; in fields to write in, JupyterLab holds back by itself.
function leaveKeys(el) {
  if (!el.isConnected) return requestAnimationFrame(() => leaveKeys(el));
  (el.closest(".explorer") ?? el).addEventListener("focusin", ({ target }) => {
    if (!target.matches("input, textarea")) target.setAttribute("data-lm-suppress-shortcuts", "true");
  });
}

function render({ model, el }) {
  const rows = model.get("rows"), columns = model.get("columns");
  let painted = new Set(), erasing = false, last = null, cursor = [0, 0], picture = null;

  const make = (tag, attributes, ...children) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  };
  const canvas = make("canvas", { tabindex: 0, role: "application", title: HELP });
  const size = make("input", { type: "range", min: 1, max: Math.max(1, Math.min(rows, columns)), value: 1 });
  const button = (text) => make("button", { type: "button" }, text);
  const erase = button("Erase"), clear = button("Clear"), all = button("Invert");
  const count = make("p", { role: "status" });
  const brush = make("label", {}, "Brush ", size);
  const tools = make("div", { class: "tools" }, erase, clear, all, brush);
  el.append(make("div", { class: "explorer-paint" }, canvas, tools, count));
  leaveKeys(el);

  const at = (event) => {
    const box = canvas.getBoundingClientRect();
    return [((event.clientY - box.top) / box.height) * rows, ((event.clientX - box.left) / box.width) * columns];
  };

  // tokens whose centres lie within the brush, and the one below its middle
  function dab([y, x]) {
    const radius = Number(size.value) / 2;
    const put = (r, c) => {
      if (r < 0 || c < 0 || r >= rows || c >= columns) return;
      erasing ? painted.delete(r * columns + c) : painted.add(r * columns + c);
    };
    put(Math.floor(y), Math.floor(x));
    for (let r = Math.floor(y - radius); r <= y + radius; r++)
      for (let c = Math.floor(x - radius); c <= x + radius; c++)
        if (Math.hypot(r + 0.5 - y, c + 0.5 - x) < radius) put(r, c);
  }

  function stroke(to) {
    const [y, x] = last ?? to;
    const n = Math.max(1, Math.ceil(2 * Math.hypot(to[0] - y, to[1] - x)));
    for (let i = 1; i <= n; i++) dab([y + ((to[0] - y) * i) / n, x + ((to[1] - x) * i) / n]);
    last = to;
    draw();
  }

  function send() {
    last = null;
    model.set("mask", [...painted].sort((a, b) => a - b));
    model.save_changes();
    tell();
  }

  function tell(where = "") {
    const n = painted.size;
    count.textContent = where + (n ? `${n} of ${rows * columns} tokens painted` : "nothing painted: everywhere");
  }

  function named() {
    canvas.setAttribute("aria-label", `${model.get("told")}, under a brush of ${rows} by ${columns} tokens. ${HELP}`);
  }

  function draw() {
    const high = model.get("height"), wide = model.get("width");
    const unit = 768 / Math.max(high, wide);
    canvas.height = Math.max(1, Math.round(high * unit));
    canvas.width = Math.max(1, Math.round(wide * unit));
    const paper = canvas.getContext("2d"), dy = canvas.height / rows, dx = canvas.width / columns;
    paper.fillStyle = "#e6e6e6";
    paper.fillRect(0, 0, canvas.width, canvas.height);
    paper.imageSmoothingEnabled = high > 200;
    if (picture) paper.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const has = (r, c) => r >= 0 && c >= 0 && r < rows && c < columns && painted.has(r * columns + c);
    const edge = new Path2D(), grid = new Path2D();
    for (let r = 0; r < rows; r++)
      for (let c = 0; c < columns; c++) {
        const [y, x] = [r * dy, c * dx];
        if (rows * columns <= 1024) grid.rect(x, y, dx, dy);
        if (!has(r, c)) {
          paper.fillStyle = "rgba(255, 255, 255, 0.6)";
          if (painted.size) paper.fillRect(x, y, dx, dy);
          continue;
        }
        const sides = [[-1, 0, x, y, x + dx, y], [1, 0, x, y + dy, x + dx, y + dy],
          [0, -1, x, y, x, y + dy], [0, 1, x + dx, y, x + dx, y + dy]];
        for (const [i, j, x0, y0, x1, y1] of sides)
          if (!has(r + i, c + j)) { edge.moveTo(x0, y0); edge.lineTo(x1, y1); }
      }
    const lines = [[grid, "rgba(0, 0, 0, 0.12)", 1], [edge, "#fff", 10], [edge, "#000", 5]];
    if (document.activeElement === canvas && canvas.matches(":focus-visible")) {
      const here = new Path2D();
      here.rect(cursor[1] * dx, cursor[0] * dy, dx, dy);
      lines.push([here, "#fff", 8], [here, "#0b4f9c", 4]);
    }
    for (const [path, ink, width] of lines) {
      paper.strokeStyle = ink;
      paper.lineWidth = width;
      paper.stroke(path);
    }
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !event.isPrimary) return;
    canvas.setPointerCapture(event.pointerId);
    stroke(at(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last || !event.isPrimary) return;
    for (const each of event.getCoalescedEvents?.() ?? []) stroke(at(each));
    stroke(at(event));
  });
  canvas.addEventListener("pointerup", () => last && send());
  canvas.addEventListener("pointercancel", () => { last = null; taken(); });
  canvas.addEventListener("keydown", (event) => {
    const [down, right] = KEYS[event.key] ?? [0, 0];
    if (event.key === " ") {
      dab([cursor[0] + 0.5, cursor[1] + 0.5]);
      send();
    } else if (!(event.key in KEYS)) return;
    event.preventDefault();
    cursor = [Math.min(rows - 1, Math.max(0, cursor[0] + down)), Math.min(columns - 1, Math.max(0, cursor[1] + right))];
    const is = painted.has(cursor[0] * columns + cursor[1]) ? "painted" : "not painted";
    tell(`Row ${cursor[0] + 1} of ${rows}, column ${cursor[1] + 1} of ${columns}, ${is}; `);
    draw();
  });
  for (const name of ["focus", "blur"]) canvas.addEventListener(name, draw);
  erase.setAttribute("aria-pressed", "false");
  erase.addEventListener("click", () => {
    erasing = !erasing;
    erase.setAttribute("aria-pressed", String(erasing));
  });
  const whole = (keep) => () => {
    painted = new Set([...Array(rows * columns).keys()].filter(keep));
    send();
    draw();
  };
  clear.addEventListener("click", whole(() => false));
  all.addEventListener("click", whole((i) => !painted.has(i)));

  function taken() {
    painted = new Set(model.get("mask"));
    tell();
    draw();
  }

  function shown() {
    const bytes = model.get("picture");
    const next = new Image();
    next.onload = () => { picture = next; draw(); URL.revokeObjectURL(next.src); };
    picture = null;
    named();
    if (bytes?.byteLength) next.src = URL.createObjectURL(new Blob([bytes], { type: "image/png" }));
    taken();
  }

  model.on("change:mask", taken);
  model.on("change:picture", shown);
  model.on("change:told", named);
  shown();
  return () => {
    model.off("change:mask", taken);
    model.off("change:picture", shown);
    model.off("change:told", named);
  };
}

export default { render };
