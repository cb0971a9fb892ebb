// Select a prompt of the matrix and a step of the validation grids. Without scripts the first and the last are visible.
document.querySelectorAll("[data-chooses]").forEach((input) => {
  const items = Array.from(document.querySelectorAll(`[data-of="${input.dataset.chooses}"]`));
  const output = document.getElementById(`${input.id}-value`);
  const show = () => {
    items.forEach((item, i) => item.classList.toggle("hidden", i !== Number(input.value)));
    const chosen = items[Number(input.value)];
    if (output) output.textContent = chosen.dataset.name;
    if (input.type === "range") input.setAttribute("aria-valuetext", chosen.dataset.name);
  };
  input.addEventListener("input", show);
  show();
});

// Enlarge a picture. The arrow keys go to other steps (left, right) and other prompts (up, down).
const pictures = Array.from(document.querySelectorAll("button.zoom"));
if (pictures.length) {
  const element = (tag, values, ...children) => {
    const made = Object.assign(document.createElement(tag), values);
    made.append(...children);
    return made;
  };
  const image = element("img", { alt: "" }), text = element("p", { id: "viewer-text" });
  const save = element("a", { textContent: "Download picture" });
  const close = element("button", { type: "button", textContent: "Close" });
  const keys = element("p", { className: "keys", textContent: "Arrow keys: steps (left, right), prompts (up, down). Esc closes." });
  const viewer = element("dialog", { id: "viewer" }, text, keys, element("div", { className: "actions" }, save, close));
  viewer.setAttribute("aria-labelledby", "viewer-text");
  document.body.append(viewer);
  let current = null;
  const show = (button) => {
    current = button;
    const shown = button.querySelector("img");
    viewer.prepend(image);
    image.src = shown.src;
    image.alt = shown.alt;
    text.textContent = shown.alt;
    save.href = shown.src;
    save.download = `${shown.alt.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 80)}.${shown.src.slice(11, 15)}`;
    if (!viewer.open) viewer.showModal();
  };
  const at = (change) => {
    const place = { ...current.dataset, ...change };
    const same = (name) => (each) => each.dataset[name] === String(place[name]);
    return ["set", "prompt", "row", "column"].reduce((some, name) => some.filter(same(name)), pictures)[0];
  };
  const moves = { ArrowLeft: ["column", -1], ArrowRight: ["column", 1], ArrowUp: ["prompt", -1], ArrowDown: ["prompt", 1] };
  pictures.forEach((button) => button.addEventListener("click", () => show(button)));
  close.addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => event.target === viewer && viewer.close());
  viewer.addEventListener("close", () => current.offsetParent && current.focus());
  viewer.addEventListener("keydown", (event) => {
    const [name, step] = moves[event.key] ?? [];
    const next = name && at({ [name]: Number(current.dataset[name]) + step });
    if (name) event.preventDefault();
    if (next) show(next);
  });
}

// Sort a table by the column whose head is pressed; once more reverses the order.
document.querySelectorAll("table.sortable").forEach((table) => {
  const heads = Array.from(table.querySelectorAll("thead th")), body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const of = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const number = (value) => (value.trim() === "" || isNaN(value) ? null : Number(value));
      const compare = (a, b) => {
        const [x, y] = [number(of(a)), number(of(b))];
        return x !== null && y !== null ? x - y : of(a).localeCompare(of(b));
      };
      body.append(...Array.from(body.rows).sort((a, b) => (down ? -compare(a, b) : compare(a, b))));
    });
  });
});
